"""Changing a topology: linear passes over sorted lists.

All loops do the same work whichever way a comparison falls: a branch on it would be mispredicted for every third entry
and cost more than the rest. Comparisons become masks of 64 bits, 0 or −1, that select, and that counters are advanced
by. Each list is walked from both ends at once: the next step of a merge waits for the comparison before it, and two
walks wait at the same time. Counters are unsigned, because Numba would wrap negative ones.

Large arrays come from the pool: a page that the system hands out anew can cost more than all that is done with it here.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from refimpl.kernels import memory
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.spec_topology import STRETCH, refuse_clash, refuse_nan, source_type
from refimpl.kernels.spec_topology import carry as carry_any
from refimpl.kernels.spec_topology import exchange as exchange_lists
from refimpl.kernels.types import Pattern

_ONE = np.uintp(1)
_LONG_ROW = 1 << 20  # columns: rows that are longer by more than all entries are not worth buffers of their length
_HALF = np.uintp(32)
_FRESH = (1 << 32) - 1  # in the lower half of an entry that is merged


def places(pattern: Pattern, start: int, stop: int, goes: np.ndarray | None = None) -> np.ndarray:
    """See :func:`refimpl.kernels.spec_topology.places`. O(rows + entries)."""
    stays = stop - start if goes is None else stop - start - int(np.count_nonzero(goes[start:stop]))
    out = memory.empty((stays + 1,), np.int64)  # one more: what goes is written and then overwritten
    none = np.empty(0, bool)
    run(
        _places,
        pattern.indptr,
        pattern.indices,
        pattern.matrix_shape[1],
        start,
        stop,
        none if goes is None else goes,
        out,
    )
    return out[:stays]


def free_places(taken: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """See :func:`refimpl.kernels.spec_topology.free_places`. O(taken + ranks)."""
    out = memory.empty(ranks.shape, np.int64)
    run(_free_places, taken, ranks, out)
    return out


def exchange(
    old: Pattern, goes: np.ndarray, grown: np.ndarray, ranked: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See :func:`refimpl.kernels.spec_topology.exchange`. O(rows + columns + nnz + grown) time and memory."""
    if old.matrix_shape[1] > _LONG_ROW + goes.size + grown.size:
        return exchange_lists(old, goes, grown, ranked)
    nnz = goes.size - int(np.count_nonzero(goes)) + grown.size
    indptr = np.zeros(old.indptr.size, np.int64)
    indices = memory.empty((nnz,), old.indices.dtype)
    source = memory.empty((nnz,), source_type(goes.size))
    clash = np.zeros(1, np.int64)
    run(_exchange, old.indptr, old.indices, goes, grown, old.matrix_shape[1], ranked, indptr, indices, source, clash)
    refuse_clash(bool(clash[0]))
    return indptr, indices, source


def carry(source: np.ndarray, aligned: np.ndarray, fill: float, reset: bool) -> np.ndarray:
    """See :func:`refimpl.kernels.spec_topology.carry`. Bits are moved, not numbers."""
    if aligned.ndim > 1 or not aligned.size or aligned.itemsize not in (4, 8) or not aligned.flags.c_contiguous:
        return carry_any(source, aligned, fill, reset)
    bits = np.dtype(f"u{aligned.itemsize}")
    out = memory.empty(source.shape, aligned.dtype)
    filler = np.full(1, fill, aligned.dtype)
    run(_carry, source, aligned.view(bits), filler.view(bits)[0], reset, out.view(bits))
    return out


def collect(
    piece: np.ndarray, start: int, taken: np.ndarray, threshold: float, found: np.ndarray, scores: np.ndarray, held: int
) -> tuple[int, int]:
    """See :func:`refimpl.kernels.spec_topology.collect`. O(piece), most of it in vectors."""
    low = int(np.searchsorted(taken, start))
    state = np.array([held, 0, 0])
    run(_collect, piece, start, taken[low:], piece.dtype.type(threshold), found, scores, state)
    refuse_nan(bool(state[2]))
    return int(state[0]), int(state[1])


def shorten(found: np.ndarray, scores: np.ndarray, want: int) -> float:
    """See :func:`refimpl.kernels.spec_topology.shorten`. O(found)."""
    ranked = memory.empty(scores.shape, scores.dtype)
    ranked[...] = scores
    ranked.partition(scores.size - want)
    upper = ranked[scores.size - want :]
    threshold = upper[0]
    run(_shorten, found, scores, threshold, want - int(np.count_nonzero(upper > threshold)))
    return float(threshold)


@kernel(parallel=False)
def _places(indptr, indices, columns, start, stop, goes, out):  # type: ignore[no-untyped-def]
    """``out``: the places of the entries that stay; without ``goes`` all do."""
    n = np.uintp(0)
    for i in range(np.searchsorted(indptr, start, side="right") - 1, indptr.size - 1):
        if indptr[i] >= stop:
            break
        first, low, high = i * columns, max(indptr[i], start), min(indptr[i + 1], stop)
        if goes.size:
            for k in range(low, high):
                out[n] = first + indices[k]
                n += np.uintp(not goes[k])
        else:
            for k in range(low, high):
                out[n] = first + indices[k]
                n += _ONE


@kernel(parallel=False)
def _free_places(taken, ranks, out):  # type: ignore[no-untyped-def]
    """A merge of the ranks with the numbers of free places before each taken one."""
    i, j, n, m = np.uintp(0), np.uintp(0), np.uintp(taken.size), np.uintp(ranks.size)
    while (i + _ONE < n) & (j + _ONE < m):
        rank = ranks[j]
        out[j] = rank + np.int64(i)
        before = taken[i] - np.int64(i) <= rank
        i += np.uintp(before)
        j += np.uintp(not before)
        rank = ranks[m - _ONE]
        out[m - _ONE] = rank + np.int64(n)
        behind = taken[n - _ONE] - np.int64(n - _ONE) > rank
        n -= np.uintp(behind)
        m -= np.uintp(not behind)
    while (i < n) & (j < m):
        rank = ranks[j]
        out[j] = rank + np.int64(i)
        before = taken[i] - np.int64(i) <= rank
        i += np.uintp(before)
        j += np.uintp(not before)
    while j < m:
        out[j] = ranks[j] + np.int64(i)
        j += _ONE


@register_jitable
def _stretch(keys, start, bound):  # type: ignore[no-untyped-def]
    """Return the end of the keys from ``start`` on that lie below a bound, which is usually near."""
    reach = 16
    while start + reach < keys.size and keys[start + reach] < bound:
        reach *= 2
    low, high = start, min(start + reach, keys.size)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < bound:
            low = middle + 1
        else:
            high = middle
    return low


@kernel(parallel=False)
def _exchange(indptr, indices, goes, grown, columns, ranked, new_indptr, new_indices, source, clash):  # type: ignore[no-untyped-def]
    """Merge what is kept of each row with what grows in it.

    An entry is one number while it is merged: its column, and in the lower half its place in the row or, if it is new,
    ``_FRESH``. ``first`` is the key, place or rank, of the row's first free column; a rank r stands for column r + m
    where m entries are kept before. For each column ``stamp`` has the last entry that stood in it: what is new where
    one of this row stood grows again, for it cannot stand where one stays.
    """
    ranks = np.int64(-1) if ranked else np.int64(0)
    kept, fresh = np.empty(columns + 1, np.int64), np.empty(columns + 1, np.int64)
    merged = np.empty(columns + 1, np.int64)
    stamp = np.full(columns, -1, source.dtype)
    stop, kept_before, bad = 0, 0, False
    for r in range(indptr.size - 1):
        row = indptr[r]
        n = np.uintp(0)
        for e in range(row, indptr[r + 1]):
            column = np.int64(indices[e])
            kept[n] = column << 32 | e - row
            stamp[column] = e
            n += np.uintp(not goes[e])
        first = r * columns - (kept_before & ranks)
        start, stop = stop, _stretch(grown, stop, first + columns - (np.int64(n) & ranks))
        kept_before += np.int64(n)
        keys = grown[start:stop]
        for u in range(keys.size):
            fresh[u] = (keys[u] - first) << 32 | _FRESH
        count = np.int64(n) + keys.size
        _merge(kept, n, fresh, np.uintp(keys.size), ranks << 32, merged)
        to = new_indptr[r]
        new_indptr[r + 1] = to + count
        row_indices, row_source = new_indices[to : to + count], source[to : to + count]
        for u in range(count):
            column, place = np.uintp(merged[u]) >> _HALF, merged[u] & _FRESH
            row_indices[u] = column
            went = np.int64(stamp[column])
            again = -2 - went if went >= row else np.int64(-1)
            row_source[u] = again if place == _FRESH else row + place
        for u in range(1, count):
            bad |= row_indices[u] == row_indices[u - 1]
    clash[0] = bad


@register_jitable
def _merge(kept, n, fresh, g, ranks, merged):  # type: ignore[no-untyped-def]
    """Merge ``n`` kept and ``g`` fresh entries; with ranks, each fresh one moves on by the kept ones before it."""
    m, j, k, end = np.uintp(0), np.uintp(0), np.uintp(0), n + g
    while (m + _ONE < n) & (j + _ONE < g):
        a, b = kept[m], fresh[j] + (np.int64(m) << 32 & ranks)
        new = (b - a) >> 63
        merged[k] = a ^ ((a ^ b) & new)
        k += _ONE
        m += np.uintp(new + 1)
        j -= np.uintp(new)
        n -= _ONE  # now from the back: the last of each, if the kept one is last
        g -= _ONE
        end -= _ONE
        a, b = kept[n], fresh[g] + (np.int64(n) << 32 & ranks)
        new = (a - b) >> 63
        merged[end] = a ^ ((a ^ (b + (ranks & 1 << 32))) & new)
        n -= np.uintp(new)
        g += np.uintp(new + 1)
    while (m < n) & (j < g):
        a, b = kept[m], fresh[j] + (np.int64(m) << 32 & ranks)
        new = (b - a) >> 63
        merged[k] = a ^ ((a ^ b) & new)
        k += _ONE
        m += np.uintp(new + 1)
        j -= np.uintp(new)
    while j < g:
        merged[k] = fresh[j] + (np.int64(m) << 32 & ranks)
        k += _ONE
        j += _ONE
    while m < n:
        merged[k] = kept[m]
        k += _ONE
        m += _ONE


@kernel(parallel=False)
def _carry(source, aligned, fill, reset, out):  # type: ignore[no-untyped-def]
    """``out[k]``: what stood at the source of entry ``k``, or ``fill``."""
    if reset:
        for k in range(source.size):
            at = np.int64(source[k])
            held = aligned[max(at, 0)]
            out[k] = held if at >= 0 else fill
    else:
        for k in range(source.size):
            at = np.int64(source[k])
            at = max(at, -2 - at)
            held = aligned[max(at, 0)]
            out[k] = held if at >= 0 else fill


@kernel(parallel=False)
def _shorten(found, scores, threshold, room):  # type: ignore[no-untyped-def]
    """Keep the scores above a threshold, and the first ``room`` that equal it, in place and in order."""
    n = np.uintp(0)
    for u in range(scores.size):
        score, place = scores[u], found[u]
        tied = np.int64(score == threshold) & np.int64(room > 0)
        found[n], scores[n] = place, score
        room -= tied
        n += np.uintp(np.int64(score > threshold) | tied)


@kernel(parallel=False)
def _collect(piece, start, taken, threshold, found, scores, state):  # type: ignore[no-untyped-def]
    """Compare a stretch in vectors, strike out what is taken, and append what is left, eight flags at a time.

    ``state``: the length of the list, the scores looked at, and whether one was NaN. A NaN passes the comparison.
    """
    flags = np.empty(STRETCH, np.uint8)
    octets = flags.view(np.uint64)
    n, p, at, nan = np.uintp(state[0]), 0, 0, 0
    while at < piece.size and n + np.uintp(STRETCH) <= np.uintp(found.size):
        part = piece[at : at + STRETCH]
        size = part.size
        for u in range(size):
            x = part[u]
            flags[u] = not (abs(x) <= threshold)
            nan |= x != x
        if nan:
            break
        while p < taken.size and taken[p] < start + at + size:
            flags[taken[p] - start - at] = 0
            p += 1
        for w in range((size + 7) // 8):
            if octets[w]:
                for u in range(8 * w, min(8 * w + 8, size)):
                    found[n] = start + at + u
                    scores[n] = abs(part[u])
                    n += np.uintp(flags[u])
        at += size
    state[0], state[1], state[2] = n, at, nan
