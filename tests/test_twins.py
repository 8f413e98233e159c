"""Mask change between compressed phases, and agreement of two models, against counts in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.analysis.twins import Agreement, MaskChange, agreement, mask_changes
from refimpl.weights import Support

quick = settings(max_examples=60, deadline=None)
masks = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=3, max_size=3)] * 2)
)


def supports(pair: Any) -> tuple[Support, Support]:
    before, after = (Support.from_mask(np.array(mask)) for mask in pair)
    return before, after


# --- masks


def check_change(pair: Any, between: Callable[[Support, Support], MaskChange] = MaskChange.between) -> None:
    """Compare with sets; the logged figure with the formula of the program that logs it: H − (z' − z)."""
    before, after = supports(pair)
    found, (a, b) = between(before, after), (set(before.flat.tolist()), set(after.flat.tolist()))
    assert (found.kept, found.grown, found.dropped) == (len(a & b), len(b - a), len(a - b))
    assert (found.size, found.hamming) == (before.size, len(a ^ b))
    assert found.iou == (len(a & b) / len(a | b) if a | b else 1)
    zeros = [before.size - before.nnz, after.size - after.nnz]
    assert found.change * found.size == pytest.approx(found.hamming - (zeros[1] - zeros[0]), abs=1e-9)


@quick
@given(masks)
def test_changes_are_those_of_sets(pair: Any) -> None:
    check_change(pair)


@quick
@given(st.integers(2, 60), st.integers(0, 2**32), st.data())
def test_with_a_fixed_budget_all_three_are_one(size: int, seed: int, data: Any) -> None:
    """K entries in both phases and g new ones: the change is H/n, IoU (K − g)/(K + g), and at most 2 d changes."""
    kept = data.draw(st.integers(1, size))
    rng = np.random.default_rng(seed)
    before, after = (Support((size,), np.sort(rng.choice(size, kept, replace=False))) for _ in range(2))
    found = MaskChange.between(before, after)
    assert found.grown == found.dropped
    assert found.change == pytest.approx(found.hamming / size)
    assert found.iou == pytest.approx((kept - found.grown) / (kept + found.grown))
    assert found.change <= 2 * kept / size


def test_a_known_change() -> None:
    """28 of 268,336 entries new: the figure that a small residual network's run logged."""
    found = MaskChange(size=268_336, kept=26_834 - 28, grown=28, dropped=28)
    assert 100 * found.change == pytest.approx(0.02087, abs=5e-6)
    assert found.iou == pytest.approx(0.9979, abs=5e-5)


def test_weights_together() -> None:
    full, half, other = (Support((4,), flat) for flat in ([0, 1, 2, 3], [0, 1], [1, 2]))
    changes = mask_changes({"a": half, "b": half, "c": half}, {"a": other, "b": full, "d": half})
    assert changes == {"a": MaskChange(4, 1, 1, 1), "d": MaskChange(4, 2, 0, 2)}  # b is dense, d was
    total = MaskChange.total(changes.values())
    assert total == MaskChange(8, 3, 1, 3)
    assert total.change == 2 / 8
    assert MaskChange.total([]).change == 0
    assert MaskChange.total([]).iou == 1
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(5,\).*give two of the same weight"):
        MaskChange.between(half, Support((5,), [1]))


# --- two models


def check_agreement(seed: int, compare: Callable[..., Agreement] = agreement) -> None:
    """Compare with counts sample by sample, and with the bounds that two accuracies set."""
    rng = np.random.default_rng(seed)
    classes, samples = int(rng.integers(2, 6)), int(rng.integers(1, 20))
    first, second = rng.standard_normal((2, classes, samples)) * 3
    targets = rng.integers(classes, size=samples)
    found = compare(first, second, targets)
    a, b = ([int(np.argmax(x[:, i])) for i in range(samples)] for x in (first, second))
    n, answers = samples, list(zip(a, b, targets.tolist(), strict=True))
    assert found.same * n == pytest.approx(sum(x == y for x, y, _ in answers))
    assert found.both_right * n == pytest.approx(sum(x == y == t for x, y, t in answers))
    assert found.both_wrong_alike * n == pytest.approx(sum(x == y != t for x, y, t in answers))
    assert found.accuracies == pytest.approx([np.mean(x == targets) for x in (np.array(a), np.array(b))])
    low, high = sum(found.accuracies) - 1, 1 - abs(found.accuracies[0] - found.accuracies[1])
    assert low - 1e-12 <= found.same <= high + 1e-12
    p, q = (np.exp(x) / np.exp(x).sum(axis=0) for x in (first, second))
    cross = [-sum(p[c, i] * np.log(q[c, i]) for c in range(classes)) for i in range(samples)]
    assert found.cross_entropy == pytest.approx(np.mean(cross), rel=1e-12)
    entropy = -(p * np.log(p)).sum(axis=0).mean()
    assert found.cross_entropy >= entropy - 1e-12
    itself = compare(first, first + 7.0, targets)
    assert itself.same == 1
    assert itself.cross_entropy == pytest.approx(entropy, rel=1e-12)


@quick
@given(st.integers(0, 2**32))
def test_agreement_is_that_of_each_sample(seed: int) -> None:
    check_agreement(seed)


def test_agreement_without_targets_and_at_extremes() -> None:
    sure = np.array([[1000.0, -1000.0], [-1000.0, 1000.0]], np.float32)
    found = agreement(sure, -sure)
    assert (found.samples, found.same, found.cross_entropy) == (2, 0, 2000)
    assert agreement(sure, sure).cross_entropy == 0
    assert np.isnan([*found.accuracies, found.both_right, found.both_wrong_alike]).all()
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 3\).*give two arrays"):
        agreement(sure, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="give two arrays"):
        agreement(np.zeros((2, 0)), np.zeros((2, 0)))
    with pytest.raises(ValueError, match=r"targets of shape \(3,\) for 2 samples"):
        agreement(sure, sure, np.zeros(3, int))


# --- planted mistakes


def test_catches_wrong_ways_to_count() -> None:
    pair = (
        [[True, True, False], [True, False, False], [False] * 3],
        [[True, False, True], [False, False, True], [True] * 3],
    )
    check_change(pair)

    def backwards(before: Support, after: Support) -> MaskChange:
        return MaskChange.between(after, before)

    def of_union(before: Support, after: Support) -> MaskChange:
        found = MaskChange.between(before, after)
        return MaskChange(found.kept + found.hamming, found.kept, found.grown, found.dropped)

    for planted in (backwards, of_union):
        with pytest.raises(AssertionError):
            check_change(pair, planted)

    def other_order(first: np.ndarray, second: np.ndarray, targets: Any = None) -> Agreement:
        return agreement(second, first, targets)

    def by_axis(first: np.ndarray, second: np.ndarray, targets: Any = None) -> Agreement:
        return agreement(first[::-1], second, targets)

    for wrong in (other_order, by_axis):
        with pytest.raises(AssertionError):
            check_agreement(3, wrong)
