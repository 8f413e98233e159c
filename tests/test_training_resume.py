"""A run that was stopped or killed anywhere and goes on from its folder is the one that never stopped, bit for bit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from refimpl.kernels import threads
from refimpl.testing.training import tiny_config, tiny_corpus
from refimpl.training import checkpoint, state
from refimpl.training.config import Config
from refimpl.training.loop import Observer, Run
from refimpl.training.metrics import read_metrics
from refimpl.training.run_folder import RunFolder
from refimpl.training.state import pack
from refimpl.training.trainer import StepResult

CORPUS = tiny_corpus(vocabulary=30, train=140, valid=60)
EPOCHS, STEPS = 4, 28
TIMES = ("seconds", "tokens_per_second")
Result = dict[str, Any]
Way = Literal["asked", "killed", "killed before the checkpoint"]

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "static": {},
    "set": {"convention": {"regrow": "reset"}},
    "selfish": {"conventions": "selfish-authors"},
    "rigl": {"interval": 3},
    "topkast": {"refresh": 4, "backward_sparsity": 0.3},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "snt-asgd": {"lr": 8.0, "nonmono": 0},
    "nt-asgd": {"lr": 8.0, "nonmono": 0, "leak": True},
    "adam": {"lr": 0.02, "schedule": "cosine", "warmup": 3},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = threads.get()
    yield
    threads.set_count(before)


def config_of(method: str, optimizer: str, every: int = 0) -> Config:
    """Return four epochs of seven steps, the last of each on a shorter window."""
    return tiny_config(
        model={"dropout_hidden": 0.2, "dropout_embedding": 0.1, "weight_drop": 0.1},
        method={"name": method, **METHODS[method]},
        optimizer={"name": optimizer, "clip": 0.5, **OPTIMIZERS[optimizer]},
        training={"epochs": EPOCHS, "checkpoint_every": every},
    )


class Stop(Observer):
    """Ends a run at a step: politely, or by an exception that nobody expects."""

    def __init__(self, step: int, way: Way) -> None:
        self.at, self.way = step, way

    def stepped(self, run: Run, result: StepResult) -> None:
        """Stop after the step."""
        if run.state.step == self.at and self.way == "asked":
            run.stop_asked = True
        elif run.state.step == self.at and self.way == "killed":
            raise Killed

    def evaluated(self, run: Run, record: dict[str, Any]) -> None:
        """Die between the record of an epoch and its checkpoint."""
        if run.state.step >= self.at and self.way == "killed before the checkpoint":
            raise Killed


class Killed(BaseException):
    """Stands for a process that is gone."""


def finish(path: Path, config: Config, stops: tuple[tuple[int, Way], ...] = ()) -> Result:
    """Train a run to its end, with a new process's objects after each stop; return all that it left."""
    folder = RunFolder.create(path, config, {"sha256": CORPUS.sha256})
    for step, way in stops:
        run = Run(config, CORPUS, folder)
        try:
            outcome = run.train(Stop(step, way))
            assert outcome == ("finished" if run.state.step == STEPS else "stopped")
        except Killed:
            assert way != "asked"
        finally:
            run.close()
        folder = RunFolder.open(path, write=True)
    run = Run(config, CORPUS, folder)
    try:
        assert run.train() == "finished"
        return left_by(run, path)
    finally:
        run.close()


def left_by(run: Run, path: Path) -> Result:
    """Return the state as bytes, the records without times, and both kinds of checkpoints."""
    arrays, meta = pack(run.state, run.trainer.method)
    latest = RunFolder.open(path).latest_valid()
    best = RunFolder.open(path).best()
    assert latest is not None
    saved = latest.arrays
    assert saved.keys() == arrays.keys()
    assert all(np.array_equal(saved[name], arrays[name]) for name in arrays)
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(path / "metrics.jsonl")]
    return {
        "arrays": {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()},
        "meta": json.loads(json.dumps(meta)),
        "best": {name: a.tobytes() for name, a in best.arrays.items()},
        "best of": {key: best.meta[key] for key in ("valid_loss", "epoch", "step")},
        "records": records,
    }


@cache
def straight(method: str, optimizer: str) -> Result:
    """Return what a run leaves that nothing stopped."""
    with tempfile.TemporaryDirectory() as folder:
        return finish(Path(folder) / "run", config_of(method, optimizer))


def differing(one: Result, other: Result) -> list[str]:
    """Name what differs."""
    found = [key for key in one if one[key] != other[key]]
    if one["arrays"].keys() == other["arrays"].keys():
        found += [name for name in one["arrays"] if one["arrays"][name] != other["arrays"][name]]
    return found


def check(method: str, optimizer: str, stops: tuple[tuple[int, Way], ...], every: int) -> None:
    """Compare a run that stopped with one that did not."""
    folder = tempfile.mkdtemp()
    try:
        stopped = finish(Path(folder) / "run", config_of(method, optimizer, every), stops)
    finally:
        shutil.rmtree(folder)
    assert not differing(straight(method, optimizer), stopped)


stop = st.tuples(st.integers(1, STEPS), st.sampled_from(["asked", "killed", "killed before the checkpoint"]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=2, phases=[Phase.generate])  # a few runs each, and not a thousand to shrink a failure
@given(stops=st.lists(stop, min_size=1, max_size=2).map(tuple), every=st.sampled_from([0, 2, 5]))
def test_any_method_and_optimizer(method: str, optimizer: str, stops: Any, every: int) -> None:
    check(method, optimizer, stops, every)


@settings(max_examples=2, phases=[Phase.explicit, Phase.generate])
@given(step=st.integers(1, STEPS), every=st.sampled_from([0, 3]))
@example(step=7, every=0)
@example(step=28, every=0)
@example(step=13, every=3)
def test_around_the_ends_of_epochs_and_the_trigger(step: int, every: int) -> None:
    for way in ("asked", "killed", "killed before the checkpoint"):
        check("selfish", "snt-asgd", ((step, way),), every)


@pytest.mark.parametrize("optimizer", ["snt-asgd", "nt-asgd"])
@pytest.mark.parametrize("method", METHODS)
def test_the_trigger_is_among_what_is_crossed(method: str, optimizer: str) -> None:
    """A guard of this file: averaging begins in the middle of these runs."""
    fired = [record["epoch"] for record in straight(method, optimizer)["records"] if record.get("trigger")]
    assert len(fired) == 1
    assert 1 < fired[0] < EPOCHS


# --- planted mistakes ---


@pytest.mark.parametrize("key", ["updates", "history", "averaging", "loss_sum", "best", "window", "flops", "epoch"])
def test_catches_a_forgotten_counter(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = json_copy(straight("selfish", "nt-asgd"))
    monkeypatch.setattr(state, "_COUNTERS", tuple(k for k in state._COUNTERS if k != key))
    at = 10 if key == "history" else 24  # after the trigger nobody asks for the history
    with tempfile.TemporaryDirectory() as folder:
        try:
            stopped = finish(Path(folder) / "run", config_of("selfish", "nt-asgd"), ((at, "asked"),))
        except (IndexError, AssertionError, KeyError):
            return  # it did not even run to its end
    expected["meta"]["state"].pop(key)  # which the other state lacks in any case
    assert differing(expected, stopped)


@pytest.mark.parametrize("part", ["carried/0/h", "carried/1/c", "slot/average", "slot/age"])
def test_catches_a_forgotten_array(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load

    def without(path: Any) -> Any:
        arrays, meta = load(path)
        return {name: np.zeros_like(a) if part in name else a for name, a in arrays.items()}, meta

    expected = straight("selfish", "snt-asgd")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        config = config_of("selfish", "snt-asgd")
        created = RunFolder.create(path, config, {"sha256": CORPUS.sha256})
        run = Run(config, CORPUS, created)
        run.train(Stop(24, "asked"))
        run.close()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "load", without)
            run = Run(config, CORPUS, RunFolder.open(path, write=True))
        run.train()
        run.close()
        assert differing(expected, left_by(run, path))


def json_copy(result: Result) -> Result:
    """Return a copy whose ``meta`` may be changed."""
    return {**result, "meta": json.loads(json.dumps(result["meta"]))}
