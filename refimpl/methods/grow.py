"""Growth: which of the free places are filled.

The free places of a pool are never listed. They are counted, and the r-th of them is found from the sorted
list of those that are taken: before the i-th taken place p_i lie p_i − i free ones, so the r-th free place
(from 0) is r plus the number of taken places with p_i − i ≤ r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from refimpl.kernels import memory, topology
from refimpl.methods.random_support import draw_distinct


class Candidates:
    """The places of a pool that are not taken.

    Parameters
    ----------
    size : int
        Places in the pool, free or taken.
    taken : ndarray of int64, or callable
        Those that are taken, ascending; or what lists them when they are first asked for.
    number : int, optional
        How many are taken, where they are not listed yet.
    """

    def __init__(self, size: int, taken: np.ndarray | Callable[[], np.ndarray], number: int | None = None) -> None:
        self.size = size
        self._taken = taken
        self._number = number

    @cached_property
    def taken(self) -> np.ndarray:
        """The places that are taken, ascending."""
        return self._taken() if callable(self._taken) else np.ascontiguousarray(self._taken, np.int64)

    @property
    def count(self) -> int:
        """Number of free places."""
        return self.size - (self.taken.size if self._number is None else self._number)

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """Return the places of the given ranks among the free ones.

        Parameters
        ----------
        ranks : ndarray of int
            From 0 to ``count − 1``, in any order.

        Returns
        -------
        ndarray of int64
            Places in the pool, in the order of the ranks. O(taken + ranks) time, beside sorting ranks that do not
            ascend.

        Raises
        ------
        ValueError
            If a rank is out of range.
        """
        ranks = np.asarray(ranks, np.int64)
        if ranks.size and not (ranks.min() >= 0 and ranks.max() < self.count):
            raise ValueError(
                f"growth ranks must lie from 0 to {self.count - 1}, the free places counted from the first"
            )
        if (ranks[1:] >= ranks[:-1]).all():
            return topology.free_places(self.taken, np.ascontiguousarray(ranks))
        order = np.argsort(ranks)
        places = np.empty_like(ranks)
        places[order] = topology.free_places(self.taken, ranks[order])
        return places

    def require(self, want: int) -> None:
        """Raise a ValueError if there are fewer than ``want`` free places."""
        if want > self.count:
            raise ValueError(
                f"growth needs {want} free places but only {self.count} are eligible; lower the "
                "drop fraction, or let dropped "
                "entries grow back (regrow 'keep' or 'reset')"
            )


@dataclass(frozen=True)
class Ranked:
    """Places that are known by their ranks among the candidates: a merge needs no more.

    Attributes
    ----------
    candidates : Candidates
    ranks : ndarray of int64
        Ascending.
    """

    candidates: Candidates
    ranks: np.ndarray

    @property
    def places(self) -> np.ndarray:
        """The places in the pool, ascending."""
        return self.candidates.at(self.ranks)


def grow_random(
    candidates: Candidates,
    want: int,
    rng: np.random.Generator | None = None,
    *,
    count: Literal["exact", "bernoulli"] = "exact",
    ranks: np.ndarray | None = None,
) -> np.ndarray:
    """Choose free places uniformly at random.

    Parameters
    ----------
    candidates : Candidates
        The free places.
    want : int
        How many, exactly or on average.
    rng : numpy.random.Generator, optional
        Source of the draws.
    count : {"exact", "bernoulli"}
        *Exact*: every set of ``want`` places is equally likely. *Bernoulli*: each place independently with
        probability ``want / candidates.count``; the number is drawn from the binomial law and then that many
        places, which is the same law.
    ranks : ndarray of int, optional
        Draws made elsewhere: different ranks among the free places, used in place of ``rng``.

    Returns
    -------
    ndarray of int64
        Places in the pool, ascending. Memory is in proportion to them and to the taken ones.

    Raises
    ------
    ValueError
        If there are fewer free places than wanted, ranks repeat or are out of range, or an exact count comes
        with another number of ranks, or there is neither ``rng`` nor ``ranks``.
    """
    if ranks is None:
        if rng is None:
            candidates.require(want)
            raise ValueError("random growth needs a source of draws; give rng or ranks")
        ranks = draw_ranks(candidates, want, rng, count)
    else:
        candidates.require(want)
        ranks = np.sort(np.asarray(ranks, np.int64))
        if (np.diff(ranks) == 0).any() or (count == "exact" and ranks.size != want):
            raise ValueError(
                f"the {ranks.size} growth ranks must all differ, and for an exact count there must be {want}"
            )
    return candidates.at(ranks)


def draw_ranks(
    candidates: Candidates, want: int, rng: np.random.Generator, count: Literal["exact", "bernoulli"] = "exact"
) -> np.ndarray:
    """Draw the ranks of the free places that :func:`grow_random` chooses, ascending; no list of places is made."""
    candidates.require(want)
    if count == "bernoulli" and want:
        want = int(rng.binomial(candidates.count, want / candidates.count))
    return draw_distinct(candidates.count, want, rng)


class BestCandidates:
    """The ``want`` free places of largest score, found while the scores pass by in pieces.

    Keeps twice as many places at most, and one piece. What is appended to the list exceeds the ``want``-th largest
    score of an earlier moment; when the list is full it is cut back to ``want``, and that score rises. Of equal scores
    the lower place wins.

    Parameters
    ----------
    candidates : Candidates
        The free places.
    want : int
        How many of them.

    Raises
    ------
    ValueError
        If there are fewer.
    """

    def __init__(self, candidates: Candidates, want: int) -> None:
        candidates.require(want)
        self.candidates = candidates
        self.want = int(want)
        self._places = np.empty(0, np.int64)
        self._scores = np.empty(0)
        self._held = 0
        self._threshold = -1.0  # below every magnitude: until the list was full, everything enters

    @property
    def places(self) -> np.ndarray:
        """The places found so far, ascending."""
        self._cut()
        return self._places[: self._held]

    def add(self, start: int, piece: np.ndarray) -> None:
        """Look at the scores of the places from ``start`` on; pieces come in ascending order.

        Parameters
        ----------
        start : int
            Place of the first score.
        piece : ndarray, shape (k,)
            The gradient; its magnitude is the score. It is not kept.

        Raises
        ------
        ValueError
            If a score is NaN.
        """
        if not self.want or not piece.size:
            return
        if not self._places.size:
            capacity = self.want + max(self.want, 2 * topology.STRETCH)
            self._places, self._scores = memory.empty((capacity,), np.int64), memory.empty((capacity,), piece.dtype)
        done = 0
        while True:
            self._held, more = topology.collect(
                piece[done:], start + done, self.candidates.taken, self._threshold,
                self._places, self._scores, self._held,
            )  # fmt: skip
            done += more
            if done == piece.size:
                return
            self._cut()

    def _cut(self) -> None:
        """Shorten the list to the best, of which the last is the new threshold."""
        if self._held <= self.want:
            return
        self._threshold = topology.shorten(self._places[: self._held], self._scores[: self._held], self.want)
        self._held = self.want  # a later place loses a tie: from now on only a strictly larger score can enter
