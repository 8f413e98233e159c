"""Dead units and structural zeros: counts against brute force, and what decompression does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from analysis_cases import Stops, acdc, images
from hypothesis import given
from hypothesis import strategies as st

from refimpl.analysis.watch import Ledger, PhaseTimes, Several, phase_of, read_ledger, seconds_by_phase
from refimpl.analysis.zeros import EpochZeros, Zeros, ZeroWatcher, read_zeros, zeros_of
from refimpl.training.config import override
from refimpl.training.loop import Run
from refimpl.training.start import resume, start
from refimpl.weights import SparseWeight, Support, Weight

pytestmark = pytest.mark.usefixtures("own_folder")


# --- counts


def check_counts(seed: int, count: Callable[[Weight], Zeros] = Zeros.of) -> None:
    """Compare with loops over units and entries, for a dense and a sparse weight of two to four axes."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 5, rng.integers(2, 5)))
    whole = rng.choice([0.0, -0.0, 1.0, -1e-300], shape) * rng.choice([0, 1], (shape[0], *[1] * (len(shape) - 1)))
    mask = rng.random(shape) < 0.6
    for weight, stored in (
        (whole, np.ones(shape, bool)),
        (SparseWeight.from_dense(whole, Support.from_mask(mask)), mask),
    ):
        found = count(weight)
        dead = sum(all(w == 0 or not s for w, s in zip(row.flat, of.flat)) for row, of in zip(whole, stored))
        zeros = sum(w == 0 and s for w, s in zip(whole.flat, stored.flat))
        assert found == Zeros(shape[0], dead, int(stored.sum()), zeros)
        assert found.dead_fraction == dead / shape[0]
        assert found.zero_fraction == (zeros / stored.sum() if stored.any() else 0)


@given(st.integers(0, 2**32))
def test_counts_are_those_of_loops(seed: int) -> None:
    check_counts(seed)


def _fails(seed: int, count: Callable[[Weight], Zeros]) -> bool:
    try:
        check_counts(seed, count)
    except AssertionError:
        return True
    return False


def test_catches_wrong_counts() -> None:
    def by_columns(weight: Weight) -> Zeros:
        found, dense = Zeros.of(weight), weight.dense() if isinstance(weight, SparseWeight) else weight
        dead = int((dense.reshape(len(dense), -1) == 0).all(axis=0).sum())
        return Zeros(found.units, dead, found.stored, found.zeros)

    def empty_rows(weight: Weight) -> Zeros:
        found = Zeros.of(weight)
        if isinstance(weight, SparseWeight):
            return Zeros(found.units, int((weight.support.row_counts == 0).sum()), found.stored, found.zeros)
        return found

    def absent_too(weight: Weight) -> Zeros:
        return Zeros.of(weight.dense() if isinstance(weight, SparseWeight) else weight)

    for planted in (by_columns, empty_rows, absent_too):
        assert any(_fails(seed, planted) for seed in range(20)), planted


def test_weights_together() -> None:
    parts = [Zeros(3, 1, 10, 4), Zeros(2, 2, 6, 6)]
    assert Zeros.total(parts) == Zeros(5, 3, 16, 10)
    assert Zeros.total([]) == Zeros(0, 0, 0, 0)
    assert Zeros.total([]).dead_fraction == Zeros.total([]).zero_fraction == 0


# --- over a run


def check_epochs(watcher: ZeroWatcher) -> None:
    """A compressed phase ends with the absent entries absent; the epoch after it is dense and has few zeros left."""
    run = Run(acdc(), images())
    run.train(watcher)
    assert [found.epoch for found in watcher.epochs] == list(range(7))
    kinds = ["dense", "compressed", *["compressed", "dense"] * 2, "compressed"]
    assert [found.phase for found in watcher.epochs] == kinds
    size = sum(spec.size for spec in run.trainer.specs.values() if spec.prunable)
    for found in watcher.epochs:
        assert found.weights.keys() == {name for name, spec in run.trainer.specs.items() if spec.prunable}
        stored = size if found.phase == "dense" else size - round(0.8 * size)
        assert found.total.stored == stored
    assert watcher.epochs[-1].weights == zeros_of(run.state.params, run.trainer.specs)


def test_every_epoch_is_counted_before_the_next_phase_begins() -> None:
    check_epochs(ZeroWatcher())


def test_catches_watchers_that_come_too_late() -> None:
    class AfterTheExchange(ZeroWatcher):
        def epoch_ended(self, run: Run, epoch: int) -> None:
            pass

        def evaluated(self, run: Run, record: dict[str, Any]) -> None:
            super().epoch_ended(run, record["epoch"] - 1)

    class FromOne(ZeroWatcher):
        def epoch_ended(self, run: Run, epoch: int) -> None:
            super().epoch_ended(run, epoch + 1)

    for planted in (AfterTheExchange, FromOne):
        with pytest.raises(AssertionError):
            check_epochs(planted())


def test_what_decompression_leaves_at_zero() -> None:
    """A hidden unit without weights and with a negative bias stays 0; one that lost only its readers comes back.

    Its readers have a gradient in the first step and its own weights from the second on.
    """
    run = Run(acdc(optimizer={"momentum": 0.0}), images())
    names = [name for name, spec in run.trainer.specs.items() if spec.prunable]
    first, second = names[0], names[1]
    bias = next(name for name in run.trainer.specs if name.endswith(".bias"))
    weights = {name: np.array(run.state.params[name]) for name in names}
    weights[first][0] = 0
    weights[second][:, 0] = 0
    weights[second][:, 1] = 0
    params: dict[str, Any] = run.state.params
    params |= weights
    params[bias][:] = 1.0
    params[bias][0] = -1.0
    before = zeros_of(run.state.params, run.trainer.specs)
    assert before[first].dead == 1
    untouched = np.array(params[first][1])
    run.trainer.step(*run.batches[0])
    assert np.array_equal(params[first][1], untouched)
    run.trainer.step(*run.batches[1])
    assert not np.array_equal(params[first][1], untouched)
    after = zeros_of(run.state.params, run.trainer.specs)
    assert after[first].dead == 1
    assert after[first].zeros == weights[first].shape[1]
    assert not params[first][0].any()


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.5])
def test_a_filter_without_weights_is_dead_unless_its_shift_is_positive(shift: float) -> None:
    """With β ≤ 0 neither the filter nor its scale, its shift or its readers move; with β > 0 it is back at once."""
    config = override(
        acdc(), ["model=small-conv", "sizes=[300,100]", "widths=[4,4]", "compress=[6]", "decompress=auto"]
    )
    run = Run(config, images())
    params: dict[str, Any] = run.state.params
    params["conv1.weight"][0] = 0
    params["bn1.bias"][:] = shift
    before = {name: np.array(params[name]) for name in ("bn1.weight", "bn1.bias", "conv2.weight")}
    watcher = ZeroWatcher()
    run.train(Several([watcher, Stops(8)]))
    dead = shift <= 0
    assert watcher.epochs[0].weights["conv1.weight"] == Zeros(4, int(dead), 36, 9 * int(dead))
    assert np.array_equal(params["bn1.weight"][0], before["bn1.weight"][0]) == dead
    assert np.array_equal(params["bn1.bias"][0], before["bn1.bias"][0]) == dead
    assert np.array_equal(params["conv2.weight"][:, 0], before["conv2.weight"][:, 0]) == dead
    assert not np.array_equal(params["conv2.weight"][:, 1:], before["conv2.weight"][:, 1:])


def test_a_stopped_run_leaves_what_a_straight_one_does() -> None:
    def watch(path: str, steps: int) -> None:
        run = resume(path, corpus=images()) if steps < 0 else start(acdc(), path, images())
        run.train(Several([ZeroWatcher(), PhaseTimes(), Stops(steps)]))
        run.close()

    watch("straight", 0)
    watch("stopped", 27)
    assert [found.epoch for found in read_zeros("stopped")] == [0, 1, 2, 3]
    watch("stopped", -1)
    assert read_zeros("stopped") == read_zeros("straight")
    times = {name: read_ledger_of(name) for name in ("straight", "stopped")}
    assert {epoch: entry["phase"] for epoch, entry in times["straight"].items()} == {
        found.epoch: found.phase for found in read_zeros("straight")
    }
    by_phase = seconds_by_phase(times["straight"])
    assert {kind: len(seconds) for kind, seconds in by_phase.items()} == {"dense": 3 * 6, "compressed": 4 * 6}
    assert all(second > 0 for seconds in by_phase.values() for second in seconds)


def read_ledger_of(name: str) -> dict[int, Any]:
    from pathlib import Path

    return read_ledger(Path(name) / PhaseTimes.file)


def test_times_are_all_of_the_runs_and_a_part_of_an_epoch_has_its_entry() -> None:
    run, times = Run(acdc(training={"max_steps": 38}), images()), PhaseTimes()
    run.train(times)
    assert [len(entry["seconds"]) for entry in times.entries.values()] == [*[6] * 6, 2]
    assert list(times.entries) == list(range(7))
    total = sum(sum(seconds) for seconds in seconds_by_phase(times.entries).values())
    assert total == pytest.approx(run.seconds, rel=1e-12)


def test_entries_from_before_a_run_went_back_are_forgotten() -> None:
    run = start(acdc(), "run", images())
    watcher = ZeroWatcher()
    run.train(Several([watcher, Stops(14)]))
    run.close()
    assert list(watcher.entries) == [0, 1]
    zeros = EpochZeros(0, "dense", watcher.epochs[0].weights)
    assert read_zeros("run")[0] == zeros
    fresh = Run(acdc(), images())

    class Anything(Ledger):
        file = "anything.json"

    ledger = Anything()
    ledger.entries = {0: 1, 1: 2, 5: 3}
    fresh.state.epoch = 1
    ledger.started(fresh)
    assert ledger.entries == {0: 1}
    assert phase_of(fresh.state.params, fresh.trainer.specs) == "dense"


def test_a_folder_without_entries_is_refused() -> None:
    from pathlib import Path

    with pytest.raises(FileNotFoundError, match="give the folder of a run that was watched"):
        read_zeros(".")
    Path("zeros.json").write_text("[1]")
    with pytest.raises(ValueError, match="cannot be read"):
        read_zeros(".")
