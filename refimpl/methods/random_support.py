"""Supports drawn at random, in memory proportional to what is drawn."""

from __future__ import annotations

import numpy as np

from refimpl.kernels import memory
from refimpl.weights.support import Shape, Support

_PLACES_PER_SORTED = 256
"""Counting the flags of so many places takes as long as to sort one number."""

_FLAGS_PER_DRAW = 16
"""With fewer places than this for each that is drawn, flags for all of them take no longer than a sorted list."""


def draw_distinct(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    r"""Draw a uniformly random subset of ``{0, …, size − 1}``.

    As many numbers as are missing are drawn with replacement, repetitions are discarded, and so on until
    ``count`` different ones have come. No number is treated unlike another, so every set of ``count`` is
    equally likely. At most half the range is drawn in this way, so that a round leaves at most about half of
    what was missing; of a larger subset the complement is drawn.

    Parameters
    ----------
    size, count : int
        ``0 <= count <= size``.
    rng : numpy.random.Generator
        Source of the draws.

    Returns
    -------
    ndarray of int64, shape (count,)
        Ascending. Memory is O(count): nothing of length ``size`` is made unless ``count`` exceeds 1/16 of it.

    Raises
    ------
    ValueError
        If more numbers are asked for than there are.
    """
    if not 0 <= count <= size:
        raise ValueError(f"{count} distinct places were asked for among {size}; ask for at most {size}")
    if 2 * count > size:
        chosen = np.ones(size, bool)
        chosen[draw_distinct(size, size - count, rng)] = False
        return np.flatnonzero(chosen)
    if size <= _FLAGS_PER_DRAW * count:
        chosen = memory.zeros((int(size),), bool)
        missing = count
        while missing:
            drawn = rng.integers(size, size=missing)
            if missing > size // _PLACES_PER_SORTED:
                chosen[drawn] = True
                missing = count - int(np.count_nonzero(chosen))
            else:
                fresh = _distinct(drawn[~chosen[drawn]])
                chosen[fresh] = True
                missing -= fresh.size
        return np.flatnonzero(chosen)
    kind = np.uint32 if size <= 1 << 32 else np.int64  # half the width is sorted in a third of the time
    found = _distinct(rng.integers(size, size=count).astype(kind))
    more = np.empty(0, kind)
    while missing := count - found.size - more.size:
        drawn = rng.integers(size, size=missing).astype(kind)
        at = np.minimum(np.searchsorted(found, drawn), found.size - 1)
        more = _distinct(np.concatenate([more, drawn[found[at] != drawn]]))
    if more.size:
        found = np.concatenate([found, more])
        found.sort()
    return found.astype(np.int64)


def _distinct(drawn: np.ndarray) -> np.ndarray:
    """Sort an array in place and leave out what repeats; NumPy's ``unique`` may count by hashing, which is slower."""
    drawn.sort()
    first = np.ones(drawn.size, bool)
    np.not_equal(drawn[1:], drawn[:-1], out=first[1:])
    return drawn[first]


def exact_support(shape: Shape, count: int, rng: np.random.Generator) -> Support:
    """Draw a support of exactly ``count`` entries, each set of that size being equally likely.

    Raises
    ------
    ValueError
        If the shape has fewer entries.
    """
    return Support(shape, draw_distinct(int(np.prod(shape)), count, rng))


def bernoulli_support(shape: Shape, density: float, rng: np.random.Generator) -> Support:
    """Draw a support to which each entry belongs independently with probability ``density``.

    The number of entries is drawn first, from Binomial(n, density), and then that many distinct ones. The law
    is the same as that of n coin tosses, because under those all sets of one size are equally likely; the
    memory is O(nnz).

    Raises
    ------
    ValueError
        If the density is not in [0, 1].
    """
    size = int(np.prod(shape))
    return exact_support(shape, int(rng.binomial(size, density)), rng)
