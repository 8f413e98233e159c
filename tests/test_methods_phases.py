"""Phases of a run: the published schedules, any others, and lists that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods.phases import Phase, Phases


def of_ranges(triples: list[tuple[int, int, int]]) -> tuple[int, ...]:
    """Return the epochs of the published configurations' triples (start, frequency, end), the end excluded."""
    return tuple(sorted(epoch for start, every, end in triples for epoch in range(start, end, every)))


REGULAR = {"warmup": 10, "compressed": 5, "dense": 5, "last_dense": 10, "final": 15}
TABLE: dict[str, tuple[int, dict[str, int], Any, Any, tuple[int, int]]] = {
    "ResNet-50, MobileNetV1": (
        100, REGULAR, [(10, 10, 71), (85, 20, 100)], [(15, 10, 66), (75, 20, 86)], (50, 50),
    ),
    "ResNet-50, 150 epochs": (
        150, REGULAR, [(10, 10, 121), (135, 20, 150)], [(15, 10, 116), (125, 20, 134)], (75, 75),
    ),
    "ResNet-50, 2x": (200, REGULAR, [(10, 10, 171), (185, 20, 200)], [(15, 10, 166), (175, 20, 186)], (100, 100)),
    "WideResNet-28-10, phases of 20": (
        200, {"warmup": 10, "compressed": 20, "dense": 20, "final": 30}, [(10, 40, 171)], [(30, 40, 161)], (110, 90),
    ),
    "WideResNet-28-10, dense phases of 13": (
        225, {"warmup": 10, "compressed": 20, "dense": 13, "final": 50}, [(10, 33, 180)], [(30, 33, 170)], (150, 75),
    ),
    "ResNet-20, memorisation": (
        200, {"warmup": 10, "compressed": 20, "dense": 20, "final": 30}, [(10, 40, 171)], [(30, 40, 151)], (110, 90),
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", TABLE)
def test_published_schedules(run: str) -> None:
    epochs, lengths, prune, restore, totals = TABLE[run]
    phases = Phases.regular(epochs, **lengths)
    assert phases == Phases(of_ranges(prune), of_ranges(restore))
    found = phases.until(epochs)
    assert found[0] == Phase("dense", 0, lengths["warmup"])
    assert found[-1] == Phase("compressed", epochs - lengths["final"], epochs)
    assert found[-2].length == lengths.get("last_dense", lengths["dense"])
    assert {p.length for p in found[1:-2:2]} == {lengths["compressed"]}
    assert {p.length for p in found[2:-2:2]} == {lengths["dense"]}
    assert totals == tuple(sum(p.length for p in found if p.kind == kind) for kind in ("compressed", "dense"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=11))
def test_phases_cover_the_run_in_turn(lengths: list[int]) -> None:
    lengths = lengths[: len(lengths) // 2 * 2]  # dense first, compressed last
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    phases = Phases(tuple(starts[1::2]), tuple(starts[2::2]))
    found = phases.until(sum(lengths))
    assert [p.length for p in found] == lengths
    assert [p.kind for p in found] == ["dense", "compressed"] * (len(lengths) // 2)
    for phase in found:
        assert all(phases.compressed(e) == (phase.kind == "compressed") for e in range(phase.start, phase.stop))


@pytest.mark.parametrize("epochs", [*range(2, 60), 100, 137, 1000])
def test_phases_for_a_run_of_any_length(epochs: int) -> None:
    phases = Phases.spread(epochs)
    found = phases.until(epochs)
    assert found[0].kind == "dense"
    assert found[-1].kind == "compressed"
    if epochs == 100:
        assert phases == Phases.regular(100, **REGULAR)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: Phases((10, 20), (25,)), "dense phase begins at epoch 0|compressed phase begins at epoch 10.*overlap"),
        (lambda: Phases((10, 20), ()), "epoch 10 and the next phase is to be a compressed one, from epoch 20"),
        (lambda: Phases((10, 20), (5, 15)), "epoch 0 and the next phase is to be a dense one, from epoch 5"),
        (lambda: Phases((10, 20), (10,)), "overlap"),
        (lambda: Phases((10,), (15,)), "the last phase, from epoch 15, is dense"),
        (lambda: Phases((20, 10), (15,)), "compress lists the epochs 20, 10; give them in ascending order"),
        (lambda: Phases((10, 20, 30), (15, 15)), "decompress lists the epochs 15, 15"),
        (lambda: Phases(()), "no epoch is given"),
        (lambda: Phases((0, 2), (1,)), "epoch 0, but a run begins with a dense one"),
        (lambda: Phases((10, 20), (15,)).until(20), "begins at epoch 20, but the run has 20 epochs"),
        (lambda: Phases.regular(101, **REGULAR), "leave 66, which is not k . 10 - 5"),
        (lambda: Phases.regular(30, **REGULAR), "leave -5"),
        (lambda: Phases.regular(100, **{**REGULAR, "dense": 0}), "dense is 0 epochs; give at least 1"),
        (lambda: Phases.spread(1), "a run of 1 epochs has no room"),
    ],
)
def test_phases_that_cannot_be(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


# --- planted mistakes


def test_catches_ranges_that_include_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the test of activity in the authors' program does; their two tests together exclude it."""

    def inclusive(triples: list[tuple[int, int, int]]) -> tuple[int, ...]:
        return tuple(sorted(epoch for start, every, end in triples for epoch in range(start, end + every, every)))

    monkeypatch.setitem(globals(), "of_ranges", inclusive)
    with pytest.raises((AssertionError, ValueError)):
        test_published_schedules("ResNet-50, MobileNetV1")


def test_catches_an_intermediate_phase_in_place_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "short", (95, {**REGULAR, "last_dense": 5}, *TABLE["ResNet-50, MobileNetV1"][2:]))
    with pytest.raises(AssertionError):
        test_published_schedules("short")
