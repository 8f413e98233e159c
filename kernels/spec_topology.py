"""The definition of the kernels that change a topology, in NumPy: sorted lists of places, and nothing dense.

A place is a position of the dense weight in C order. The places that a pattern stores are ascending, and so are all
lists of places here. The *rank* of a free place is the number of free places before it.
"""

from __future__ import annotations

import numpy as np

from refimpl.kernels.types import Pattern

NEW = -1
"""The source of an entry that was not stored before."""


def source_type(nnz: int) -> type[np.signedinteger]:
    """Return the type of sources that point into ``nnz`` entries."""
    return np.int32 if nnz < (1 << 31) - 2 else np.int64


def places(pattern: Pattern, start: int, stop: int, goes: np.ndarray | None = None) -> np.ndarray:
    """List the places of the entries ``start <= k < stop``, without those that go.

    Parameters
    ----------
    pattern : Pattern
    start, stop : int
        A range of its entries.
    goes : ndarray of bool, shape (nnz,), optional

    Returns
    -------
    ndarray of int64
        Ascending.
    """
    entries = np.arange(start, stop)
    if goes is not None:
        entries = entries[~goes[start:stop]]
    row = np.searchsorted(pattern.indptr, entries, side="right") - 1
    return row * pattern.matrix_shape[1] + pattern.indices[entries]


def free_places(taken: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    r"""Return the free places of the given ranks: :math:`r + |\{i : p_i - i \le r\}|` with the taken places p.

    Before the i-th taken place there are :math:`p_i - i` free ones, and those with at most r before them lie before
    the free place of rank r.

    Parameters
    ----------
    taken : ndarray of int64
        Ascending.
    ranks : ndarray of int64
        Ascending.
    """
    return ranks + np.searchsorted(taken - np.arange(taken.size), ranks, side="right")


def exchange(
    old: Pattern, goes: np.ndarray, grown: np.ndarray, ranked: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take entries out of a pattern and put others in.

    Parameters
    ----------
    old : Pattern
    goes : ndarray of bool, shape (nnz,)
        The entries that are taken out.
    grown : ndarray of int64, shape (g,)
        What is put in, ascending and without duplicates: places; or, where ``ranked``, ranks among the places that are
        free when what goes has gone.
    ranked : bool

    Returns
    -------
    indptr : ndarray of int64, shape (R + 1,)
    indices : ndarray, shape (new nnz,)
        The new pattern.
    source : ndarray of int32 or int64, shape (new nnz,)
        For each entry that was kept, where it stood in ``old``; for one that was taken out and put in again,
        −2 − that place; and for a new one −1.

    Raises
    ------
    ValueError
        If a place that is put in is kept.
    """
    rows, columns = old.matrix_shape
    before = places(old, 0, old.indices.size)
    kept = before[~goes]
    grown = free_places(kept, grown) if ranked else grown
    after = np.concatenate([kept, grown])
    order = np.argsort(after, kind="stable")
    after = after[order]
    refuse_clash(bool((after[1:] == after[:-1]).any()))
    found = np.searchsorted(before, after)
    stored = found < before.size
    stored[stored] = before[found[stored]] == after[stored]
    source = np.where(stored, np.where(order >= kept.size, -2 - found, found), NEW)
    indptr = np.searchsorted(after, np.arange(rows + 1) * columns)
    indices = after - np.repeat(np.arange(rows) * columns, np.diff(indptr))
    return indptr.astype(np.int64), indices.astype(old.indices.dtype), source.astype(source_type(before.size))


def refuse_clash(clash: bool) -> None:
    """Raise the error of an exchange that would store a place twice."""
    if clash:
        raise ValueError("an exchange can only grow entries that are not kept, each once")


def carry(source: np.ndarray, aligned: np.ndarray, fill: float, reset: bool) -> np.ndarray:
    """Return an array aligned with the new pattern from one aligned with the old.

    Parameters
    ----------
    source : ndarray
        As :func:`exchange` gives it.
    aligned : ndarray, shape (old nnz, ...)
    fill : float
        Number of new entries.
    reset : bool
        Whether entries that were put in again are new too.
    """
    at = source if reset else np.maximum(source, -2 - source)
    out = np.full((source.size, *aligned.shape[1:]), fill, aligned.dtype)
    out[at >= 0] = aligned[at[at >= 0]]
    return out


def collect(
    piece: np.ndarray, start: int, taken: np.ndarray, threshold: float, found: np.ndarray, scores: np.ndarray, held: int
) -> tuple[int, int]:
    r"""Append the free places whose score :math:`|g|` exceeds a threshold to a list, until the list may be full.

    Parameters
    ----------
    piece : ndarray, shape (k,)
        Gradient g of the places ``start``, ``start + 1``, ...
    start : int
    taken : ndarray of int64
        Places that are not free, ascending; those outside the piece do not matter.
    threshold : float
        A negative one lets all pass.
    found, scores : ndarray, shape (capacity,)
        The list; more than :data:`STRETCH` must be free beyond ``held``.
    held : int
        Its length so far.

    Returns
    -------
    held : int
        The length now.
    done : int
        How many scores of the piece were looked at.

    Raises
    ------
    ValueError
        If a score that was looked at is NaN.
    """
    done = min(piece.size, found.size - held)
    score = np.abs(piece[:done])
    refuse_nan(bool(np.isnan(score).any()))
    enters = score > threshold
    low, high = np.searchsorted(taken, [start, start + done])
    enters[taken[low:high] - start] = False
    at = np.flatnonzero(enters)
    found[held : held + at.size] = at + start
    scores[held : held + at.size] = score[at]
    return held + at.size, done


def shorten(found: np.ndarray, scores: np.ndarray, want: int) -> float:
    """Move the ``want`` largest scores and their places to the front of both lists, in order; of equal ones the first.

    Parameters
    ----------
    found, scores : ndarray, shape (n,)
        Lists from :func:`collect`, in place; ``n >= want > 0``.
    want : int

    Returns
    -------
    float
        The ``want``-th largest score.
    """
    best = np.sort(np.argsort(-scores, kind="stable")[:want])
    found[:want], scores[:want] = found[best], scores[best]
    return float(scores[:want].min())


STRETCH = 4096
"""Scores that a tier may look at together in :func:`collect`."""


def refuse_nan(nan: bool) -> None:
    """Raise the error of a gradient that cannot be ranked."""
    if nan:
        raise ValueError("a gradient to be ranked is NaN; training has diverged, so lower the learning rate or clip")
