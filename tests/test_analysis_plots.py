"""Figures of AC/DC: what stands in which panel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.analysis.masks import PhaseChange
from refimpl.analysis.memorisation import Memory
from refimpl.analysis.twins import Agreement, MaskChange, agreement
from refimpl.analysis.zeros import EpochZeros, Zeros
from refimpl.plots_acdc import (
    draw_agreement,
    draw_comparison,
    draw_mask_changes,
    draw_memorisation,
    draw_zeros,
    shares,
)

pytest.importorskip("matplotlib")
PHASES = ("dense", "compressed", "compressed", "dense", "compressed")


def lines(axis: Any) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def shaded(axis: Any) -> list[tuple[float, float]]:
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axis.patches]


def test_masks() -> None:
    changes = [
        PhaseChange(2, 4, {"a": MaskChange(100, 18, 2, 2), "b": MaskChange(100, 10, 0, 0)}),
        PhaseChange(4, 6, {"a": MaskChange(100, 20, 0, 0)}),
    ]
    left, right = draw_mask_changes({"0.8": changes, "none": []}).axes
    assert lines(left)["0.8"] == [[4, 2.0], [6, 0.0]]  # 2 · 2 of 200 entries, in per cent
    assert lines(right)["0.8"] == [[4, 28 / 32], [6, 1.0]]
    with pytest.raises(ValueError, match="no run has two compressed phases"):
        draw_mask_changes({"none": []})


def test_agreement() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 200))
    labels = rng.integers(4, size=200)
    pair = agreement(a, b, labels)
    x, y = a.argmax(axis=0), b.argmax(axis=0)
    wanted = {
        "both right": (x == labels) & (y == labels),
        "first right": (x == labels) & (y != labels),
        "second right": (x != labels) & (y == labels),
        "wrong alike": (x != labels) & (x == y),
        "wrong, each its own way": (x != labels) & (y != labels) & (x != y),
    }
    assert shares(pair) == pytest.approx({kind: of.mean() for kind, of in wanted.items()})
    (axis,) = draw_agreement({"one": pair, "other": pair}).axes
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axis.patches]
    assert [row for row, _, _ in bars] == pytest.approx([0] * 5 + [1] * 5)
    assert [width for _, _, width in bars[:5]] == pytest.approx(list(shares(pair).values()))
    assert [start for _, start, _ in bars[:5]] == pytest.approx([0, *np.cumsum(list(shares(pair).values()))[:4]])
    assert axis.texts[0].get_text().startswith(f"{pair.same:.1%} alike")
    nan = float("nan")
    for pairs in ({}, {"no targets": Agreement(5, 0.5, 1.0, (nan, nan), nan, nan)}):
        with pytest.raises(ValueError, match="compared with targets; give at least one"):
            draw_agreement(pairs)


def test_memorisation() -> None:
    run = [Memory(k, phase, k / 10, 1 - k / 10) for k, phase in enumerate(PHASES)]
    first, second = draw_memorisation({"one": run, "dense": [Memory(0, "dense", 0.5, 0.25)]}).axes
    assert lines(first)["random label"] == [[k + 1, k / 10] for k in range(5)]
    assert lines(first)["true label"] == [[k + 1, 1 - k / 10] for k in range(5)]
    assert shaded(first) == [(1.5, 3.5), (4.5, 5.5)]
    assert lines(second)["true label"] == [[1, 0.25]]
    assert shaded(second) == []
    assert [axis.get_title() for axis in (first, second)] == ["one", "dense"]
    five = draw_memorisation({str(k): run for k in range(5)}).axes
    assert [axis.get_title() for axis in five] == ["0", "1", "2", "3", "4"]  # in three rows of two
    for draw in (draw_memorisation, draw_zeros, draw_comparison):
        with pytest.raises(ValueError, match="give at least one run"):
            draw({})


def test_zeros() -> None:
    run = [EpochZeros(k, p, {"a": Zeros(4, k, 10, k), "b": Zeros(4, 0, 10, 0)}) for k, p in enumerate(PHASES)]
    more = [EpochZeros(0, "dense", {"a": Zeros(2, 2, 10, 10)})]
    first, second = draw_zeros({"one": run, "other": more}).axes
    assert lines(first)["dead units"] == [[k + 1, k / 8] for k in range(5)]
    assert lines(first)["stored zeros"] == [[k + 1, k / 20] for k in range(5)]
    assert shaded(first) == [(1.5, 3.5), (4.5, 5.5)]
    assert lines(second)["dead units"] == [[1, 1]]
    low, high = first.get_ylim()  # one axis for both
    assert low == 0
    assert high > 1


def test_a_comparison() -> None:
    points: dict[str, Any] = {
        "dense": [(None, 1.0, [0.9, 0.92])],
        "sparse": [(0.8, 0.6, [0.8, 0.9]), (0.9, 0.5, [0.7, 0.8, 0.9])],
        "single": [(0.8, 0.3, [0.6])],
    }
    left, right = draw_comparison(points).axes
    by_place = {tuple(map(tuple, line.get_xydata())): line for line in left.lines}
    assert ((0.0, 0.91), (1.0, 0.91)) in by_place  # over all sparsities
    assert any(np.allclose(place, [(0.8, 0.85), (0.9, 0.8)]) for place in by_place if len(place) == 2)
    assert ((0.8, 0.6),) in by_place
    spans = [path for bars in left.collections for path in bars.get_segments()]
    assert np.allclose(spans[0], [[0.8, 0.8], [0.8, 0.9]])
    costs = sorted(x for line in right.lines for x, _ in line.get_xydata() if line.get_marker() == "o")
    assert costs == [0.3, 0.5, 0.6, 1.0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["dense", "sparse", "single"]
