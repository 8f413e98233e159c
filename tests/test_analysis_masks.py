"""The masks of a run's compressed phases: what is kept, what is read, and what a run that was stopped leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_cases import Stops, acdc, images
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.analysis.masks import (
    PhaseChange,
    SupportKeeper,
    Supports,
    phase_changes,
    read_supports,
    write_supports,
)
from refimpl.analysis.watch import Several
from refimpl.training.loop import Observer, Run
from refimpl.training.start import resume, start
from refimpl.weights import SparseWeight, Support

pytestmark = pytest.mark.usefixtures("own_folder")

sets = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=4, max_size=4)


class Masks(Observer):
    """Takes down the mask that each epoch's first step sees."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, np.ndarray]] = {}

    def stepped(self, run: Run, result: object) -> None:
        weights = run.state.params.items()
        masks = {name: w.support.mask() for name, w in weights if isinstance(w, SparseWeight)}
        if masks and run.state.epoch not in self.of:
            self.of[run.state.epoch] = masks


def check_kept(keeper: SupportKeeper) -> None:
    """What is kept are the masks that the first step of each compressed phase sees, and no others."""
    seen = Masks()
    Run(acdc(), images()).train(Several([keeper, seen]))
    assert list(keeper.kept) == [1, 4, 6]
    for epoch, supports in keeper.kept.items():
        assert {name: s.mask().tolist() for name, s in supports.items()} == {
            name: mask.tolist() for name, mask in seen.of[epoch].items()
        }


def test_the_masks_of_compressed_phases_are_kept() -> None:
    check_kept(SupportKeeper())


def test_catches_keepers_that_look_at_the_wrong_time() -> None:
    class EveryEpoch(SupportKeeper):
        def evaluated(self, run: Run, record: dict[str, Any]) -> None:
            super().evaluated(run, {"exchanged": True})
            self.kept.setdefault(run.state.epoch, {})

    class BeforeTheExchange(SupportKeeper):
        def stepped(self, run: Run, result: object) -> None:
            if run.state.window == run.steps_per_epoch:
                super().evaluated(run, {"exchanged": True})

        def evaluated(self, run: Run, record: dict[str, Any]) -> None:
            pass

    for planted in (EveryEpoch, BeforeTheExchange):
        with pytest.raises(AssertionError):
            check_kept(planted())


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.sampled_from("ab"), sets, min_size=1), min_size=1, max_size=3))
def test_what_is_written_is_read(phases: list[dict[str, Any]]) -> None:
    for path in Path().glob("supports/*"):
        path.unlink()
    kept = {
        3 * k + 1: {name: Support.from_mask(np.array(mask)) for name, mask in phase.items()}
        for k, phase in enumerate(phases)
    }
    for epoch in reversed(kept):
        write_supports(".", epoch, kept[epoch])
    assert read_supports(".") == kept
    assert list(read_supports(".")) == sorted(kept)


def test_a_stopped_run_leaves_what_a_straight_one_does() -> None:
    straight = start(acdc(), "straight", images())
    straight.train(SupportKeeper())
    straight.close()
    run = start(acdc(), "stopped", images())
    run.train(Several([SupportKeeper(), Stops(27)]))
    run.close()
    assert list(read_supports("stopped")) == [1, 4]
    future = read_supports("straight")[6]
    write_supports("stopped", 99, future)  # from before the run went back to an older checkpoint
    run = resume("stopped", corpus=images())
    run.train(SupportKeeper())
    run.close()
    assert read_supports("stopped") == read_supports("straight")
    changes = phase_changes(read_supports("stopped"))
    assert [(c.before, c.epoch) for c in changes] == [(1, 4), (4, 6)]


@given(st.lists(sets, min_size=2, max_size=4))
def test_changes_are_between_neighbours(masks: list[Any]) -> None:
    kept: dict[int, Supports] = {10 * k: {"w": Support.from_mask(np.array(mask))} for k, mask in enumerate(masks)}
    changes = phase_changes(dict(reversed(kept.items())))
    assert len(changes) == len(masks) - 1
    for k, change in enumerate(changes):
        a, b = np.array(masks[k]), np.array(masks[k + 1])
        if b.all():  # dense in the second
            assert change == PhaseChange(10 * k, 10 * k + 10, {})
            continue
        assert (change.before, change.epoch) == (10 * k, 10 * k + 10)
        assert (change.total.grown, change.total.dropped) == ((b & ~a).sum(), (a & ~b).sum())
    assert phase_changes({}) == []


def test_a_folder_without_supports_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="holds no supports of compressed phases; train the run with"):
        read_supports(".")
    path = write_supports(".", 2, {"w": Support((4,), [1])})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        read_supports(".")
