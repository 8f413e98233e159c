"""The benchmark tool: what is recorded and drawn, threads and processes, what the command line answers.

No time is asserted. That all candidates do the same work is tested in test_bench_peers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench
import bench_children
import bench_mlp
import bench_peers
import bench_plot
import bench_products
import bench_ptb
import bench_scale
import bench_steps
import timing
from bench_task import Record, Task, save_records

from refimpl import kernels
from refimpl.models.language_model import LanguageModel
from refimpl.models.mlp import MLP
from refimpl.weights import SparseWeight

TOOL = Path(bench.__file__)
OWN = ["case", "sparsity", "threads", "implementation", "median_ms", "samples"]


@pytest.fixture(autouse=True)
def definition(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run everything on the definition's kernels, which need not be compiled, and without turns to be filled."""
    monkeypatch.setattr(bench_steps, "TURN", 0.0)
    monkeypatch.setattr(bench_steps, "SETTLE", 0.0)
    with kernels.use("spec"):
        yield


def task(benchmark: str, model: str, **fields: object) -> Task:
    """Return a task of a few milliseconds."""
    usual = {"batch": 3, "threads": 1, "allocator": "default", "sparsity": (0.5, 0.75), "seconds": 1e-9, "peers": ()}
    module = bench.BENCHMARKS[benchmark].module
    return Task(benchmark, module, model, **{**usual, **fields})  # type: ignore[arg-type]


# What is recorded.


@pytest.mark.parametrize(
    ("benchmark", "model", "expected"),
    [
        ("lstm", "2x4", [("numpy-dense", 0.0), ("refimpl", 0.5), ("refimpl", 0.75)]),
        ("mlp", "6-5-3", [("numpy-dense", 0.0), ("refimpl", 0.5), ("refimpl", 0.75)]),
        ("mlp", "3072-4000-1000-4000-10", None),
    ],
)
def test_records_of_steps(benchmark: str, model: str, expected: list | None, capsys: pytest.CaptureFixture) -> None:
    if expected is None:  # only its setting: the network is large
        network = MLP(tuple(int(n) for n in model.split("-")))
        supports = bench_mlp.supports_of(network, 0.1, bench_mlp.USUAL[model].dense_output)
        assert set(supports) == {"layers.0.weight", "layers.1.weight", "layers.2.weight"}
        assert all(s.nnz == round(0.1 * s.size) for s in supports.values())
        return
    own = task(benchmark, model)
    records = sys.modules[own.module].measure(own)
    assert [(r["implementation"], r["sparsity"]) for r in records] == expected
    for r in records:
        assert list(r)[: len(OWN)] == OWN
        assert r["case"] == f"{benchmark}-{model}"
        assert (r["threads"], r["allocator"], r["batch"]) == (1, "default", 3)
        assert r["median_ms"] > 0
        assert r["samples"] >= 5
    table = capsys.readouterr().out
    assert f"{benchmark.upper()} {model}, batch 3" in table
    assert table.count("refimpl") == 2


def test_records_of_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ptb, "VOCABULARY", 13)
    records = bench_ptb.measure(task("ptb", "1x4", sparsity=(0.5,)))
    assert [(r["case"], r["implementation"]) for r in records] == [("ptb-1x4", "numpy-dense"), ("ptb-1x4", "refimpl")]
    model = LanguageModel(13, 4, 4, 1)
    sparse = bench_ptb.trainer(model, 2, 0.5).state.params
    assert {name for name, w in sparse.items() if isinstance(w, SparseWeight)} == {
        "encoder.weight", "decoder.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"
    }  # fmt: skip


def test_records_of_products() -> None:
    records = bench_products.measure(task("products", "6x5", batch=4))
    assert {r["case"] for r in records} == {"products-6x5-b4"}
    found = {(r["implementation"], r["sparsity"], r["product"]): r["median_ms"] for r in records}
    assert {name for name, _, _ in found} == {"numpy-dense", "refimpl", "scipy-csr"}
    for sparsity in (0.5, 0.75):
        own = {product: found["refimpl", sparsity, product] for product in bench_products.PRODUCTS}
        assert found["refimpl", sparsity, "layer"] == own["forward"] + own["backward"]
        assert ("scipy-csr", sparsity, "layer") not in found  # it has no weight gradient


def test_best_takes_each_product_from_the_fastest() -> None:
    found = {
        ("a", 0.5): {"forward": (1.0, 9), "input-gradient": (5.0, 9)},
        ("b", 0.5): {"forward": (2.0, 9), "input-gradient": (3.0, 9), "weight-gradient": (4.0, 9)},
        ("c", 0.5): {"forward": (9.0, 9), "backward": (6.0, 9)},
    }
    assert bench_products.best(found, ["b"], 0.5) == 9.0
    assert bench_products.best(found, ["a", "b"], 0.5) == 8.0
    assert bench_products.best(found, ["a", "b", "c"], 0.5) == 7.0
    assert bench_products.best(found, ["a"], 0.5) is None
    assert bench_products.best(found, ["c"], 0.5) == 15.0
    found["c", 0.5] |= {"input-gradient": (1.0, 9), "weight-gradient": (1.0, 9)}
    assert bench_products.best(found, ["c"], 0.5) == 11.0
    assert bench_products.layer(found["c", 0.5]) == 15.0  # as layers call it


def test_records_of_scale(capsys: pytest.CaptureFixture) -> None:
    records = bench_scale.measure(task("scale", "90", batch=2))
    assert [r["part"] for r in records] == ["step", "exchange", "rebuild"]
    nnz = records[0]["nnz"]
    assert nnz == 20 * (3312 + 90) + 2 * 20 * 180 + 5 * 90  # the output layer would be denser than dense
    assert {r["sparsity"] for r in records} == {1 - nnz / (3312 * 90 + 2 * 90 * 90 + 5 * 90)}
    assert all(r["peak_bytes"] > 0 for r in records)
    assert "quoted and not measured" in capsys.readouterr().out


def test_an_exchange_at_scale_moves_values_and_momentum() -> None:
    training = bench_scale.Training(90, 2)
    training.step()
    before = {name: w for name, w in training.step.params.items() if isinstance(w, SparseWeight)}
    slots = {name: training.step.update.slots[name]["momentum_buffer"].copy() for name in before}
    training.exchange()
    for name, old in before.items():
        new = training.step.params[name]
        assert isinstance(new, SparseWeight)
        momentum = training.step.update.slots[name]["momentum_buffer"]
        assert new.support != old.support
        assert new.nnz == old.nnz
        to = new.support.positions_of(old.support.flat)
        assert np.array_equal(new.values[to[to >= 0]], old.values[to >= 0])
        assert np.array_equal(momentum[to[to >= 0]], slots[name][to >= 0])
    training.step()


def test_records_of_memory() -> None:
    import bench_memory

    records = bench_memory.measure(task("memory", "1x8", batch=2))
    assert [r["sparsity"] for r in records] == [0.0, 0.5, 0.75]
    assert all(r["peak_bytes"] > r["weights_bytes"] > 0 for r in records)
    assert [r["nnz"] for r in records] == [512, 256, 128]


@pytest.mark.parametrize("benchmark", ["topology", "latency"])
def test_benchmarks_that_stand_elsewhere_are_called(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_elsewhere

    seen = []

    def measure(args: argparse.Namespace) -> list[dict]:
        seen.append(args)
        return [{"case": benchmark}]

    fake = types.ModuleType(f"bench_{benchmark}")
    setattr(fake, f"bench_{benchmark}", measure)
    monkeypatch.setitem(sys.modules, f"bench_{benchmark}", fake)
    assert bench_elsewhere.measure(task(benchmark, "", batch=0, threads=2)) == [{"case": benchmark}]
    assert (seen[0].threads, seen[0].sparsity, seen[0].seconds) == ([2], [0.5, 0.75], 1e-9)


def test_tasks_and_records_come_back_from_files(tmp_path: Path) -> None:
    own = task("lstm", "2x4", peers=("torch",))
    own.save(tmp_path / "task.json")
    assert Task.load(tmp_path / "task.json") == own
    several: list[list[Record]] = [[], [own.record("refimpl", 0.5, 1.5, 7)], [{"a": 1}, {"b": [2]}]]
    for records in several:
        save_records(tmp_path / "records.json", records)
        assert json.loads((tmp_path / "records.json").read_text()) == records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.json", "task.json"]


# Turns, threads, and processes.


def test_candidates_take_turns() -> None:
    said: list[str] = []

    @contextmanager
    def around(name: str) -> Iterator[None]:
        said.append(f"<{name}")
        yield
        said.append(">")

    candidates = {name: (lambda name=name: said.append(name)) for name in "ab"}
    samples = timing.interleaved(candidates, seconds=0, least=3, warm=2, around=around)
    assert said == ["<a", "a", "a", ">", "<b", "b", "b", ">"] + ["<a", "a", ">", "<b", "b", ">"] * 3
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}


def test_a_turn_is_filled_and_its_first_call_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    cost = iter([5.0, 1.0, 1.0, 1.0, 99.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += next(cost)

    assert timing._turn(call, 7.5) == [1.0, 1.0, 1.0]  # after 8 seconds the turn is over
    assert timing._turn(call, 7.5) == [99.0]  # the only call counts


def test_only_a_peer_on_blas_gets_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @contextmanager
    def limits(count: int, user_api: str) -> Iterator[None]:
        asked.append((count, user_api))
        yield

    monkeypatch.setattr(bench_steps, "threadpool_limits", limits)
    for name in ("refimpl", "torch-dense", "scipy-csr", "numpy-dense", "mkl-csr"):
        with bench_steps.turn_of(name, 2):
            pass
    assert asked == [(2, "blas"), (2, "blas")]
    with bench_steps.turn_of("numpy-dense", 1):
        pass
    assert len(asked) == 2


def test_environment_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    plain, tuned = bench_children.environment(3), bench_children.environment(3, "tuned")
    assert not set(bench_children.TUNED) & set(plain)
    assert {name: tuned[name] for name in bench_children.TUNED} == bench_children.TUNED
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "REFIMPL_THREADS"):
        assert plain[name] == tuned[name] == "3"
    assert plain["OPENBLAS_CORETYPE"] == (bench_children.fastest_blas() or "Prescott")


# The figure.


def record(implementation: str, sparsity: float, ms: float, **fields: object) -> dict:
    """Return a record of a case called ``c``."""
    usual = {"case": "c", "threads": 1, "allocator": "default", "samples": 5}
    return {**usual, "implementation": implementation, "sparsity": sparsity, "median_ms": ms, **fields}


def test_ratios_are_formed_within_a_process() -> None:
    records = [
        record("torch-dense", 0.0, 8.0), record("numpy-dense", 0.0, 12.0), record("torch-csr", 0.5, 6.0),
        record("refimpl", 0.5, 4.0), record("refimpl", 0.75, 2.0),
        record("torch-dense-tuned", 0.0, 5.0, allocator="tuned"), record("refimpl", 0.5, 5.0, allocator="tuned"),
        record("torch-dense", 0.0, 3.0, threads=2), record("refimpl", 0.5, 1.0, threads=2),
        record("refimpl", 0.5, 99.0, product="forward"), record("refimpl", 0.9, 1.0, case="alone"),
    ]  # fmt: skip
    assert bench_plot.curves(records) == {
        "c": {
            ("torch-dense", 1): [(0.25, 4.0), (0.5, 2.0)],
            ("numpy-dense", 1): [(0.25, 6.0), (0.5, 3.0)],
            ("torch-csr", 1): [(0.5, 1.5)],
            ("torch-dense-tuned", 1): [(0.5, 1.0)],
            ("torch-dense", 2): [(0.5, 3.0)],
        }
    }


def test_the_figure_shows_the_bound() -> None:
    pytest.importorskip("matplotlib")
    records = [record("torch-dense", 0.0, 8.0), record("refimpl", 0.5, 4.0), record("refimpl", 0.9, 1.0)]
    records += [{**r, "case": f"c{k}"} for k in range(3) for r in records]
    figure = bench_plot.draw(records)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["c", "c0", "c1", "c2"]
    bound, _, ratio = panels[0].lines
    assert np.allclose(bound.get_ydata(), 0.8 / bound.get_xdata())
    assert np.allclose(bound.get_xdata(), [0.1, 0.5])
    assert np.allclose(ratio.get_ydata(), [8.0, 2.0])


# The command line.


@pytest.fixture
def hiding(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which none of the peers can be imported."""
    for name in bench_peers.INSTALL:
        folder = tmp_path / "hidden" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise ImportError('hidden by a test')\n")
    path = os.pathsep.join([str(tmp_path / "hidden"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return {**os.environ, "PYTHONPATH": path, "REFIMPL_KERNELS": "spec"}


def test_the_command_measures_writes_and_draws(tmp_path: Path, hiding: dict[str, str]) -> None:
    drawn = ["--plot", str(tmp_path / "a.svg")] if has_matplotlib() else []
    command = [sys.executable, str(TOOL), "lstm", "--models", "1x4,2x4", "--threads", "1"]
    command += ["--sparsity", "0.5,0.9", "--seconds", "0.01", "--json", str(tmp_path / "a.json"), *drawn]
    done = subprocess.run(command, env=hiding, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out: torch cannot be imported (ImportError hidden by a test)") == 1
    assert done.stdout.count("batch 20, 35 steps, 1 thread, allocator as installed") == 2
    records = json.loads((tmp_path / "a.json").read_text())
    assert [(r["case"], r["implementation"], r["sparsity"]) for r in records] == [
        (case, *candidate)
        for case in ("lstm-1x4", "lstm-2x4")
        for candidate in (("numpy-dense", 0.0), ("refimpl", 0.5), ("refimpl", 0.9))
    ]
    assert not drawn or "<svg" in (tmp_path / "a.svg").read_text()


def has_matplotlib() -> bool:
    """Tell whether figures can be drawn."""
    return bench_peers._is_there("matplotlib")


def test_a_process_that_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("REFIMPL_KERNELS", "none-of-these")
    monkeypatch.setattr(bench_peers, "find", lambda names, environment: ([], {}))
    words = ["lstm", "--models", "1x4", "--threads", "1", "--seconds", "0.01", "--json", str(tmp_path / "a.json")]
    assert bench.main(words) == 1
    assert "the process that measured lstm-1x4 ended with status 1" in capfd.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_a_missing_peer_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_peers.INSTALL, "no_such_package", "pip install it")
    there, missing = bench_peers.find(["json", "no_such_package"], os.environ)
    assert there == ["json"]
    assert missing == {"no_such_package": "is not installed (pip install it)"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lsmt"], "argument BENCHMARK: invalid choice: 'lsmt'"),
        ([], "the following arguments are required: BENCHMARK"),
        (["lstm", "--threads", "0"], "argument --threads: got '0'; give whole numbers from 1 on, separated by commas"),
        (["lstm", "--threads", "1,two"], "argument --threads: got '1,two'"),
        (["lstm", "--threads", "100000"], "--threads 100000: this process may use"),
        (["lstm", "--sparsity", "0.5,1"], "argument --sparsity: got '0.5,1'; give numbers from 0 to just below 1"),
        (["lstm", "--sparsity", "nan"], "argument --sparsity: got 'nan'"),
        (["lstm", "--seconds", "-1"], "argument --seconds: got '-1'; give a number above 0"),
        (["lstm", "--models", "1500"], "--models '1500': the benchmark lstm takes models such as 2x1500, 2x650"),
        (["mlp", "--models", "7-0-3"], "--models '7-0-3': the benchmark mlp takes models such as 3072-4000"),
        (["latency", "--models", "2x5"], "--models: the benchmark latency has no models to choose from"),
        (["latency", "--batch", "2"], "--batch: the benchmark latency has a batch of its own; leave it out"),
        (["scale", "--sparsity", "0.9"], "--sparsity: in the benchmark scale it follows from the sizes; leave it out"),
        (["scale", "--plot", "a.png"], "--plot: the benchmark scale has no ratios to draw"),
        (["lstm", "--plot", "a.gif"], "--plot a.gif: give a name that ends in .png, .pdf, .svg"),
        (["lstm", "--json", "no/such/a.json"], "--json no/such/a.json: there is no folder no/such; make it first"),
        (["lstm", "--json", "."], "--json .: this is a folder"),
        (["lstm", "--thread", "1"], "unrecognized arguments: --thread 1"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(own: Task) -> list:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(bench_children, "run", measured)
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bench.py: {sentence}")
    assert said.count("\n") == 1


def test_tables_come_twice_where_torch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "processors", lambda: 4)
    monkeypatch.setattr(sys, "platform", "linux")
    args = bench.parser().parse_args(["lstm", "--models", "2x4"])
    found = [(t.threads, t.allocator) for t in bench.tasks(args, ("torch",))]
    assert found == [(1, "default"), (1, "tuned"), (2, "default"), (2, "tuned")]
    assert [(t.threads, t.allocator) for t in bench.tasks(args, ())] == [(1, "default"), (2, "default")]
    args = bench.parser().parse_args(["products", "--models", "2x4,4x2", "--batch", "3,5", "--threads", "2"])
    assert [(t.model, t.batch) for t in bench.tasks(args, ("torch",))] == [
        ("2x4", 3), ("2x4", 5), ("4x2", 3), ("4x2", 5),
    ]  # fmt: skip
