"""Drop criteria: which of the stored entries go.

A criterion is a function of the values of one pool and a drop fraction; it returns indices into those values.
Time is O(entries) with :func:`numpy.partition`, which is several times faster than ``argpartition``; ties are
resolved afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from refimpl.methods.conventions import DropConventions, rounded

Criterion = Callable[[np.ndarray, float, DropConventions], np.ndarray]
"""``(values, drop fraction, conventions) -> indices`` into values, ascending."""


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
    if not 0 <= count <= scores.size:
        raise ValueError(f"{count} of {scores.size} entries cannot be dropped; give a drop fraction from 0 to 1")
    if count == 0:
        return np.empty(0, np.int64)
    threshold = np.partition(scores, count - 1)[count - 1]
    if np.isnan(scores).any():
        raise ValueError(
            "a weight to be ranked is NaN; training has diverged, so lower the learning rate or clip the gradient"
        )
    if ties == "threshold":
        return np.flatnonzero(scores <= threshold)
    goes = scores < threshold
    tied = np.flatnonzero(scores == threshold)
    goes[tied[tied.size - (count - np.count_nonzero(goes)) :]] = True
    return np.flatnonzero(goes)


def keep_largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Find the ``count`` largest scores; of equal ones the lower positions stay.

    Sets of different counts are nested. Arguments, result and errors are those of :func:`drop_smallest`.
    """
    stays = np.ones(scores.size, bool)
    stays[drop_smallest(scores, scores.size - count)] = False
    return np.flatnonzero(stays)


def by_magnitude(values: np.ndarray, fraction: float, conventions: DropConventions) -> np.ndarray:
    r"""Drop the :math:`\mathrm{round}(f n)` smallest :math:`|w|` of a pool of n stored entries.

    Parameters
    ----------
    values : ndarray, shape (n,)
        Stored weights of the pool.
    fraction : float
        :math:`f`.
    conventions : DropConventions
        Of which ``drop_rounding`` and ``drop_ties`` are read.
    """
    count = rounded(fraction * values.size, conventions.drop_rounding)
    return drop_smallest(np.abs(values), count, conventions.drop_ties)


def by_sign(values: np.ndarray, fraction: float, conventions: DropConventions) -> np.ndarray:
    """Drop the fraction of the positive weights, and that of the negative ones, which lie closest to zero.

    The two signs are counted apart, so that the balance between them is kept. A weight of exactly 0 counts as
    positive. Arguments and result are those of :func:`by_magnitude`.
    """
    groups = [np.flatnonzero(values < 0), np.flatnonzero(~(values < 0))]
    return np.sort(np.concatenate([group[by_magnitude(values[group], fraction, conventions)] for group in groups]))
