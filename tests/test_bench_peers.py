"""The candidates of a benchmark do the same work: NumPy's, torch's and other libraries' steps and products are ours.

Two programs that start from the same parameters must end in the same ones.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench_csr
import bench_lstm
import bench_mlp
import bench_numpy
import bench_peers
import bench_products
import bench_ptb

from refimpl import kernels
from refimpl.methods.random_support import exact_support
from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.testing.bounds import gamma
from refimpl.weights import SparseWeight, values_of


@pytest.fixture(autouse=True)
def definition() -> Iterator[None]:
    """Run ours on the definition's kernels, which need not be compiled."""
    with kernels.use("spec"):
        yield


def is_installed(name: str) -> bool:
    """Tell whether a peer can be imported."""
    return bench_peers.find([name], os.environ)[0] == [name]


def assert_same(name: str, got: np.ndarray | float, wanted: np.ndarray | float) -> None:
    """Compare float64 results of two programs.

    No number goes through more than 10^4 roundings in these sizes, and nothing on its way is larger than 1 but the
    parameters; a mistake moves the result by the size of an update, which is 10^9 times as much.
    """
    bound = gamma(10_000, np.float64) * (1 + np.abs(wanted))
    assert (np.abs(got - wanted) <= bound).all(), (name, np.abs(got - wanted).max())


def torch_module() -> types.ModuleType:
    """Import the torch peers, or skip."""
    pytest.importorskip("torch")
    import bench_torch

    return bench_torch


LSTM, TIME, BATCH = (2, 5), 6, 3  # layers and units


def lstm_case() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, TIME, LSTM[1], BATCH))
    return x, dy


@pytest.mark.parametrize("largest", [0.25, 1e6])
@pytest.mark.parametrize("peer", ["numpy", "torch"])
def test_lstm_steps_are_the_same(peer: str, largest: float) -> None:
    x, dy = lstm_case()
    layers, size = LSTM
    params = bench_lstm.params_of(size, layers, 1.0, np.float64)
    start = bench_numpy.dense_arrays(params)
    ours = bench_lstm.LSTMStep(params, layers, x, dy, 0.5, largest)
    xt, dyt = (bench_lstm.batch_major(part) for part in (x, dy))
    dense = bench_numpy.dense_arrays(params)
    if peer == "numpy":
        theirs: Callable[[], object] = bench_numpy.LSTMStep(dense, layers, xt, dyt, 0.5, largest)
    else:
        theirs = torch_module().LSTMStep(dense, layers, xt, dyt, 0.5, largest)
    for _ in range(2):
        ours()
        theirs()
    found = dense if peer == "numpy" else state_of(theirs, "rnn.")
    for name, weight in params.items():
        assert not np.allclose(values_of(weight), start[name], rtol=0, atol=1e-4)
        assert_same(name, found[name], values_of(weight))


def state_of(step: object, prefix: str = "") -> dict[str, np.ndarray]:
    """Return the parameters of a torch peer."""
    return {prefix + name: value.numpy() for name, value in step.model.state_dict().items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("peer", ["numpy", "torch"])
def test_language_model_steps_are_the_same(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ptb, "LR", 0.5)
    layers, size, vocabulary = 2, 4, 11
    model = LanguageModel(vocabulary, size, size, layers)
    ours = bench_ptb.trainer(model, BATCH, 1.0, np.float64)
    dense = bench_numpy.dense_arrays(ours.state.params)
    if peer == "numpy":
        theirs: Callable[..., float] = bench_numpy.LanguageModelStep(dense, layers, TIME, BATCH, 0.5, bench_ptb.CLIP)
    else:
        theirs = torch_module().LanguageModelStep(dense, layers, BATCH, 0.5, bench_ptb.CLIP)
    tokens = np.random.default_rng(2).integers(vocabulary, size=(3, 2, TIME, BATCH))
    for pair in tokens:  # the state is carried from window to window
        assert_same("loss", theirs(*pair), ours.step(*pair).loss)
    found = dense if peer == "numpy" else state_of(theirs)
    assert set(found) == set(ours.state.params)
    for name, weight in ours.state.params.items():
        assert_same(name, found[name], values_of(weight))


@pytest.mark.parametrize("peer", ["numpy", "torch"])
def test_perceptron_steps_are_the_same(peer: str) -> None:
    model = MLP((7, 6, 5, 4))
    params = model.init(0, np.float64)
    rng = np.random.default_rng(3)
    x, labels = rng.standard_normal((7, BATCH)), rng.integers(4, size=BATCH)
    ours = bench_mlp.MLPStep(model, params, x, labels, 0.1, 0.9)
    dense = bench_numpy.dense_arrays(params)
    module = bench_numpy if peer == "numpy" else torch_module()
    theirs = module.MLPStep(dense, np.ascontiguousarray(x.T), labels, 0.1, 0.9)
    for _ in range(4):
        assert_same("loss", theirs(), ours())
    found = dense if peer == "numpy" else state_of(theirs)
    assert set(found) == set(params)
    for name, weight in params.items():
        assert_same(name, found[name], values_of(weight))


@pytest.mark.parametrize("implementation", ["refimpl", "numpy-dense", "torch-dense", *bench_csr.PEERS])
def test_products_are_the_same(implementation: str) -> None:
    package = {"torch-dense": "torch"}.get(implementation, bench_csr.PEERS.get(implementation, ("",))[0])
    if package and not is_installed(package):
        pytest.skip(f"{package} cannot be imported")
    rows, columns, batch = 12, 9, 8
    rng = np.random.default_rng(4)
    whole = rng.integers(-3, 4, (3, rows, columns)).astype(np.float32)  # small integers: every sum is exact
    support = exact_support((rows, columns), 40, rng)
    w = SparseWeight.from_dense(whole[0] + 7, support)  # no zero among them
    x, dy = (rng.integers(-3, 4, (n, batch)).astype(np.float32) for n in (columns, rows))
    dense = w.dense()
    layouts = {"": bench_products.ours(w, x, dy)} if implementation == "refimpl" else {}
    if implementation == "numpy-dense":
        layouts = bench_csr.dense_products(dense, x, dy)
    elif implementation == "torch-dense":
        layouts = {"rows": bench_csr.torch_dense(dense, x, dy)}
    elif implementation in bench_csr.PEERS:
        layouts = {"": bench_csr.PEERS[implementation][1](w, x, dy)}
    on_support = (dy @ x.T).reshape(-1)[support.flat]
    wanted = {"forward": dense @ x, "input-gradient": dense.T @ dy, "weight-gradient": dy @ x.T}
    for layout, calls in layouts.items():
        for product, call in calls.items():
            got: Any = call()
            if product == "backward":
                dx = unpacked(got[0], (columns, batch)) if implementation == "refimpl" else got[0]
                assert np.array_equal(dx, wanted["input-gradient"])
                assert np.array_equal(got[1], on_support)
                continue
            values = getattr(got, "values", None)
            if product == "weight-gradient" and not implementation.endswith("dense"):
                assert np.array_equal(np.asarray(got if values is None else values()), on_support)
                continue
            out = np.asarray(got)
            out = unpacked(out, wanted[product].shape) if implementation == "refimpl" else out
            if layout == "rows" and product != "weight-gradient":
                out = out.T
            assert np.array_equal(out, wanted[product]), product


def unpacked(panels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the columns of panels as a matrix."""
    return kernels.from_panels(panels, (1, *shape))[0]
