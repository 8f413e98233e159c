"""Drop criteria: which of the stored entries go.

A criterion is a function of the values of one pool and a drop fraction; it returns a flag for each value.
Time is O(entries) with :func:`numpy.partition`, which is several times faster than ``argpartition`` (and than itself
asked for two places at once); ties are resolved afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from refimpl.kernels import memory
from refimpl.methods.conventions import DropConventions, kept_after

Criterion = Callable[..., np.ndarray]
"""``(values, drop fraction, conventions) -> flags`` of the values that go, or indices into them. Where the conventions
count by the density of a pool, its number of places is handed in too, as ``size``."""


def drop_smallest(scores: np.ndarray, count: int, ties: Literal["exact", "threshold"] = "exact") -> np.ndarray:
    """Find the ``count`` smallest scores.

    Parameters
    ----------
    scores : ndarray, shape (n,)
        Real numbers in row-major order of their entries.
    count : int
        ``0 <= count <= n``.
    ties : {"exact", "threshold"}
        With *exact*, of equal scores those at lower positions survive. With *threshold*, everything up to and
        including the ``count``-th smallest score is taken. A count of 0 takes nothing.

    Returns
    -------
    ndarray of int64
        Indices into ``scores``, ascending.

    Raises
    ------
    ValueError
        If a score is NaN, or there are fewer than ``count``.
    """
    return np.flatnonzero(_smallest(scores, count, ties))


def _smallest(scores: np.ndarray, count: int, ties: Literal["exact", "threshold"]) -> np.ndarray:
    """Flag the ``count`` smallest scores, as :func:`drop_smallest` finds them."""
    _check_count(count, scores.size)
    if count == 0:
        return np.zeros(scores.size, bool)
    threshold = _ranked(scores, count - 1)[count - 1]
    _refuse_nan(scores)
    goes = np.less_equal(scores, threshold, out=memory.empty(scores.shape, bool))
    if ties == "exact":
        _spare(goes, scores == threshold, int(np.count_nonzero(goes)) - count)
    return goes


def _ranked(scores: np.ndarray, place: int) -> np.ndarray:
    """Return a copy in which the score of this place, counted from the smallest, parts the smaller from the larger."""
    ranked = memory.empty(scores.shape, scores.dtype)
    ranked[...] = scores
    ranked.partition(place)
    return ranked


def _check_count(count: int, available: int) -> None:
    if not 0 <= count <= available:
        raise ValueError(f"{count} of {available} entries cannot be dropped; give a drop fraction from 0 to 1")


def _refuse_nan(scores: np.ndarray) -> None:
    if np.isnan(scores.max()):
        raise ValueError(
            "a weight to be ranked is NaN; training has diverged, so lower the learning rate or clip the gradient"
        )


def _spare(goes: np.ndarray, tied: np.ndarray, surplus: int) -> None:
    """Let the first ``surplus`` of the tied entries stay."""
    if surplus:
        goes[np.flatnonzero(tied)[:surplus]] = False


def keep_largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Find the ``count`` largest scores; of equal ones the lower positions stay.

    Sets of different counts are nested. Arguments, result and errors are those of :func:`drop_smallest`.
    """
    return np.flatnonzero(~_smallest(scores, scores.size - count, "exact"))


def by_magnitude(
    values: np.ndarray, fraction: float, conventions: DropConventions, *, size: int | None = None
) -> np.ndarray:
    r"""Drop the :math:`\mathrm{round}(f n)` smallest :math:`|w|` of a pool of n stored entries.

    Parameters
    ----------
    values : ndarray, shape (n,)
        Stored weights of the pool.
    fraction : float
        :math:`f`.
    conventions : DropConventions
        Of which ``drop_of``, ``drop_rounding``, ``drop_width``, ``drop_ties`` and ``drop_none`` are read.
    size : int, optional
        Places of the pool, for the counts that go by its density.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for those that go.

    Raises
    ------
    ValueError
        If a value is NaN, or the fraction is outside its range.
    """
    # A convention of another topic that also bounds drops; a caller with the drop topic alone has no such bound.
    least = int(getattr(conventions, "kept_minimum", "none") == "one")
    count = values.size - kept_after(values.size, fraction, conventions, size=size, minimum=least)
    if not count and conventions.drop_ties == "threshold" and conventions.drop_none == "zeros":
        return values == 0
    scores = np.abs(values, out=memory.empty(values.shape, values.dtype))
    return _smallest(scores, count, conventions.drop_ties)


def by_sign(
    values: np.ndarray, fraction: float, conventions: DropConventions, *, size: int | None = None
) -> np.ndarray:
    """Drop the fraction of the positive weights, and that of the negative ones, which lie closest to zero.

    The two signs are counted apart, so that the balance between them is kept. A weight of exactly 0 counts as
    positive. Other programs' readings of the criterion are the convention ``signed_drop``. Arguments and result are
    those of :func:`by_magnitude`.
    """
    if conventions.signed_drop != "balanced":
        return _as_programmed(values, fraction, conventions.signed_drop)
    negative = int(np.count_nonzero(values < 0))
    positive = values.size - negative
    below, above = (n - kept_after(n, fraction, conventions, size=size) for n in (negative, positive))
    _check_count(below, negative)
    _check_count(above, positive)
    if above:
        _refuse_nan(values)
    if not below + above:
        return np.zeros(values.size, bool)
    # In ascending order the entries that go are one stretch, which zero divides: two order statistics bound it.
    ranked = _ranked(values, negative - below if below else negative)
    low = ranked[negative - below] if below else 0.0
    high = 0.0
    if above:
        ranked = ranked[negative - below :]
        ranked.partition(below + above - 1)
        high = ranked[below + above - 1]
    goes = (values >= low) & ((values <= high) if above else (values < 0))
    if conventions.drop_ties == "exact" and np.count_nonzero(goes) != below + above:
        lower = int(np.count_nonzero(goes & (values < 0)))
        _spare(goes, (values == low) & (values < 0), lower - below)
        _spare(goes, (values == high) & ~(values < 0), int(np.count_nonzero(goes)) - below - above)
    return goes


def _as_programmed(values: np.ndarray, fraction: float, how: str) -> np.ndarray:
    """Drop as one of the programs does whose signed criterion is another; see ``Conventions.signed_drop``."""
    if not values.size:
        return np.zeros(values.size, bool)
    _refuse_nan(values)
    ranked = np.sort(values)
    if how == "set-original":
        n1, magnitude = values.size, np.abs(ranked)
        first, last = int(magnitude.argmin()), n1 - int(magnitude[::-1].argmin())
        low, high = int((1 - fraction) * first), int(min(n1 - 1, last + fraction * (n1 - last)))
        return (values >= ranked[low]) & (values <= ranked[high])
    half = math.ceil(math.ceil(fraction * values.size) / 2)
    if not half:
        return np.zeros(values.size, bool)
    if how == "sparse-learning":
        survivors = np.zeros(values.size, bool)
        survivors[np.argsort(values, kind="stable")[:half]] = True
        return ~survivors | _smallest(np.abs(values), half, "exact")
    positive, negative = ranked[ranked > 0], ranked[ranked < 0]
    stays = np.zeros(values.size, bool)
    if positive.size:
        stays |= values > positive[min(half, positive.size) - 1]
    if negative.size:
        threshold = negative[min(half, negative.size) - 1]
        stays |= (values < threshold) if how == "itop" else (values > threshold) & (values < 0)
    return ~stays
