"""Growth: which of the free places are filled.

The free places of a pool are never listed. They are counted, and the r-th of them is found from the sorted
list of those that are taken: before the i-th taken place p_i lie p_i − i free ones, so the r-th free place
(from 0) is r plus the number of taken places with p_i − i ≤ r.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from refimpl.methods.random_support import draw_distinct


class Candidates:
    """The places of a pool that are not taken.

    Parameters
    ----------
    size : int
        Places in the pool, free or taken.
    taken : ndarray of int64
        Those that are taken, ascending.
    """

    def __init__(self, size: int, taken: np.ndarray) -> None:
        self.size = size
        self.taken = taken

    @property
    def count(self) -> int:
        """Number of free places."""
        return self.size - int(self.taken.size)

    def at(self, ranks: np.ndarray) -> np.ndarray:
        """Return the places of the given ranks among the free ones.

        Parameters
        ----------
        ranks : ndarray of int
            From 0 to ``count − 1``, in any order.

        Returns
        -------
        ndarray of int64
            Places in the pool, in the order of the ranks. O(taken) memory, O(ranks · log taken) time.

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
        free_before = self.taken - np.arange(self.taken.size)
        return ranks + np.searchsorted(free_before, ranks, side="right")

    def require(self, want: int) -> None:
        """Raise a ValueError if there are fewer than ``want`` free places."""
        if want > self.count:
            raise ValueError(
                f"growth needs {want} free places but only {self.count} are eligible; lower the "
                "drop fraction, or let dropped "
                "entries grow back (regrow 'keep' or 'reset')"
            )


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
    candidates.require(want)
    if ranks is None:
        if rng is None:
            raise ValueError("random growth needs a source of draws; give rng or ranks")
        number = want
        if count == "bernoulli" and want:
            number = int(rng.binomial(candidates.count, want / candidates.count))
        ranks = draw_distinct(candidates.count, number, rng)
    else:
        ranks = np.sort(np.asarray(ranks, np.int64))
        if (np.diff(ranks) == 0).any() or (count == "exact" and ranks.size != want):
            raise ValueError(
                f"the {ranks.size} growth ranks must all differ, and for an exact count there must be {want}"
            )
    return candidates.at(ranks)


class BestCandidates:
    """The ``want`` free places of largest score, found while the scores pass by in pieces.

    Keeps no more than ``want`` places and one piece. Of equal scores the lower place wins.

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
        self.want = want
        self.places = np.empty(0, np.int64)
        self.scores = np.empty(0)

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
        scores = np.abs(piece)
        if np.isnan(scores.max()):
            raise ValueError(
                "a gradient to be ranked is NaN; training has diverged, so lower the learning rate or clip"
            )
        low, high = np.searchsorted(self.candidates.taken, [start, start + piece.size])
        scores[self.candidates.taken[low:high] - start] = -1  # below every magnitude
        full = self.places.size == self.want
        # A later place loses a tie, so once the list is full only a strictly larger score can enter it.
        enters = np.flatnonzero(scores > self.scores.min()) if full else np.flatnonzero(scores >= 0)
        self.places = np.concatenate([self.places, enters + start])
        self.scores = np.concatenate([self.scores, scores[enters]])
        if self.places.size > self.want:
            threshold = -np.partition(-self.scores, self.want - 1)[self.want - 1]
            stays = self.scores > threshold
            tied = np.flatnonzero(self.scores == threshold)  # ascending places, as everything was appended in order
            stays[tied[: self.want - np.count_nonzero(stays)]] = True
            self.places, self.scores = self.places[stays], self.scores[stays]
