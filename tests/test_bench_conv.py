"""The benchmark of convolutions: its candidates do the same work, and what is recorded. No time is asserted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench
import bench_conv
import bench_plot
import bench_steps
from bench_numpy import dense_arrays
from bench_task import Task

from refimpl import kernels
from refimpl.models.resnet import ResNet
from refimpl.testing.bounds import gamma
from refimpl.weights import SparseWeight, values_of


@pytest.fixture(autouse=True)
def definition(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run ours on the definition's kernels, which need not be compiled, and without turns to be filled."""
    monkeypatch.setattr(bench_steps, "TURN", 0.0)
    monkeypatch.setattr(bench_steps, "SETTLE", 0.0)
    with kernels.use("spec"):
        yield


def task(model: str, **fields: Any) -> Task:
    """Return a task of a few milliseconds."""
    usual = {"batch": 2, "threads": 1, "allocator": "default", "sparsity": (0.5, 0.75), "seconds": 1e-9, "peers": ()}
    return Task("conv", "bench_conv", model, **{**usual, **fields})


def assert_same(name: str, got: np.ndarray | float, wanted: np.ndarray | float) -> None:
    """Compare float64 results: no number goes through more than 10^4 roundings, none on its way is larger than 10."""
    bound = 10 * gamma(10_000, np.float64) * (1 + np.abs(wanted))
    assert (np.abs(got - wanted) <= bound).all(), (name, np.abs(got - wanted).max())


@pytest.mark.parametrize("layout", bench_conv.LAYOUTS)
def test_layers_are_the_same(layout: str) -> None:
    pytest.importorskip("torch")
    import bench_torch_conv

    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 4, 5, 6, 3))
    w = rng.standard_normal((4, 4, 3, 3))
    peer = bench_torch_conv.ConvStep(w, x, dy, layout)
    peer()
    peer()  # gradients do not add up
    support = SparseWeight.from_dense(w, bench_conv.exact_support(w.shape, 50, rng)).support
    for ours in (w, SparseWeight(support, w.reshape(-1)[support.flat])):
        _, dx, dw = bench_conv.ConvStep(ours, x, dy)()
        wanted = peer.w.grad.numpy()
        if isinstance(ours, SparseWeight):
            wanted = wanted.reshape(-1)[support.flat]
        else:
            assert_same("dx", dx, np.moveaxis(peer.x.grad.numpy(), 0, -1))
        assert_same("dw", dw, wanted)


@pytest.mark.parametrize("layout", bench_conv.LAYOUTS)
def test_network_steps_are_the_same(layout: str) -> None:
    pytest.importorskip("torch")
    import bench_torch_conv

    rng = np.random.default_rng(0)
    model = ResNet(8, width=4)
    x, labels = rng.standard_normal((*model.input_shape, 3)), rng.integers(10, size=3)
    params, lr, momentum = model.init(0, np.float64), 0.01, 0.9
    whole = {**dense_arrays(params), **model.buffers(np.float64)}
    peer = bench_torch_conv.ResNetStep(8, 4, {n: w.copy() for n, w in whole.items()}, x, labels, lr, momentum, layout)
    ours = bench_conv.NetworkStep(model, params, x, labels, lr, momentum)
    for _ in range(2):
        assert_same("the loss", ours(), peer())
    after = {name: array.numpy() for name, array in peer.model.state_dict().items()}
    assert after.keys() == {**params, **ours.buffers}.keys()
    for name, array in {**params, **ours.buffers}.items():
        assert_same(name, values_of(array), after[name])


def test_all_convolutions_but_the_first_are_sparse() -> None:
    model = ResNet(8, width=4)
    supports = bench_conv.supports_of(model, 0.25)
    assert len(supports) == 6
    assert all(name.startswith("layer") and s.nnz == round(0.25 * s.size) for name, s in supports.items())


@pytest.mark.parametrize(
    ("model", "case"), [("4-5x6", "conv-4-5x6"), ("resnet8-w4", "resnet8-w4")], ids=["layer", "network"]
)
def test_records(model: str, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = bench_conv.measure(task(model))
    expected = [("refimpl-dense", 0.0), ("refimpl", 0.5), ("refimpl", 0.75)]
    assert [(r["implementation"], r["sparsity"]) for r in records] == expected
    assert {(r["case"], r["threads"], r["allocator"], r["batch"]) for r in records} == {(case, 1, "default", 2)}
    assert all(r["median_ms"] > 0 and r["samples"] >= 5 for r in records)
    table = capsys.readouterr().out
    assert "batch 2" in table
    assert table.count("refimpl") == 3


def test_the_faster_layout_stands_for_torch(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    for allocator, name in (("default", "torch-dense"), ("tuned", "torch-dense-tuned")):
        records = bench_conv.measure(task("4-5x6", peers=("torch",), allocator=allocator))
        found = {(r["implementation"], r["sparsity"]): r for r in records}
        faster = found[name, 0.0]
        both = {layout: found[f"torch-{layout}", 0.0]["median_ms"] for layout in bench_conv.LAYOUTS}
        assert faster["median_ms"] == min(both.values()) == both[faster["layout"]]
        assert [point[0] for point in bench_plot.curves(records)["conv-4-5x6"][name, 1]] == [0.25, 0.5]
    assert "channels-last /  faster /" in capsys.readouterr().out


def test_usual_batches() -> None:
    for model, batch in (("64-4x4", 32), ("16-4x4", 128)):
        records = bench_conv.measure(task(model, batch=0, sparsity=(0.9,)))
        assert {r["batch"] for r in records} == {batch}


def test_models_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = bench.parser().parse_args(["conv", "--models", "64-32x32,resnet20-w64", "--threads", "1"])
    assert bench.complaint(args) is None
    assert [t.case for t in bench.tasks(args, ())] == ["conv-64-32x32", "conv-resnet20-w64"]
    for wrong in ("64", "64x32x32", "0-4x4", "resnet20"):
        args = bench.parser().parse_args(["conv", "--models", wrong])
        assert "takes models such as 64-32x32" in (bench.complaint(args) or "")
