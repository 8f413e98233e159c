"""What the row kernels derive from a pattern: its transposed twin, and tiles of columns.

Both depend on the topology alone. They are made once for each support, kept with it, and take memory in proportion to
its non-zeros: an index and a place for each entry in each orientation and tiling that is in use, and one pointer for
every twenty entries at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse

from refimpl.kernels import threads
from refimpl.kernels.types import Pattern

_TILE_BYTES = 40 << 10  # of the gathered panel: what the level-1 cache holds beside the stream of values and indices
_MIN_ROW_NONZEROS = (
    20  # fewer in a row of a tile, and loading and storing the accumulated row costs more than the cache saves
)
_CHUNKS_PER_THREAD = 4


@dataclass(frozen=True)
class Tiles:
    """Lines cut into tiles, stored tile by tile so that a kernel reads values and indices straight on.

    Attributes
    ----------
    index : ndarray of unsigned int, shape (nnz,)
        Places across, in the tiles' order.
    starts : ndarray of int64, shape (tiles, lines + 1)
        The entries of line ``i`` in tile ``t`` are ``starts[t, i] <= k < starts[t, i + 1]``.
    place : ndarray of int or None
        Where each entry of the pattern stands here; None if the orders are the same.
    order : ndarray of int or None
        The inverse of ``place``, for columns. Values of rows are read straight on and written to as many streams as
        there are tiles; for columns there would be thousands of streams, and random reads within a tile, which the
        level-2 cache holds, are faster.
    """

    index: np.ndarray
    starts: np.ndarray
    place: np.ndarray | None
    order: np.ndarray | None


class Lines:
    """Lines of a sparse matrix (rows, or columns of the twin): ``index[pointer[i]:pointer[i + 1]]`` for line ``i``.

    Parameters
    ----------
    pointer : ndarray of int64, shape (lines + 1,)
    index : ndarray of unsigned int, shape (nnz,)
    across : int
        Extent of the other axis, that ``index`` runs over.
    order : ndarray of int, optional
        Place in the pattern of each of the lines' entries; by default the same.
    """

    def __init__(self, pointer: np.ndarray, index: np.ndarray, across: int, order: np.ndarray | None = None) -> None:
        self.pointer = pointer
        self.index = index
        self.across = across
        self.order = order
        self.count = pointer.size - 1
        self._tiles: dict[int, Tiles] = {}
        self._chunks: dict[tuple[int, int], np.ndarray] = {}

    def tiles(self, row_bytes: int, least: int = _MIN_ROW_NONZEROS) -> Tiles:
        """Cut the lines into tiles: stretches of the other axis whose gathered rows fit in the level-1 cache.

        Parameters
        ----------
        row_bytes : int
            Of a gathered row.
        least : int
            Average number of entries that a line must keep in each tile.
        """
        wanted = -(-self.across * row_bytes // _TILE_BYTES)
        count = int(max(1, min(wanted, self.index.size / max(self.count, 1) // least)))
        if count not in self._tiles:
            self._tiles[count] = self._cut(count)
        return self._tiles[count]

    def _cut(self, count: int) -> Tiles:
        if count == 1:
            return Tiles(self.index, self.pointer[None, :], _inverse(self.order), self.order)
        span = -(-self.across // count)
        tile = (self.index // np.int64(span)).astype(np.uint16)
        key = (
            np.repeat(np.arange(self.count, dtype=np.int64), np.diff(self.pointer)) + tile.astype(np.int64) * self.count
        )
        sizes = np.bincount(key, minlength=self.count * count).reshape(count, self.count)
        starts = np.zeros((count, self.count + 1), np.int64)
        np.cumsum(sizes, axis=1, out=starts[:, 1:])
        starts[1:] += np.cumsum(starts[:-1, -1])[:, None]
        sort = np.argsort(tile, kind="stable")  # lines stay in order within a tile
        order = sort.astype(_narrow(sort.size)) if self.order is None else self.order[sort]
        index, place = _frozen(self.index[sort]), _inverse(order)
        return Tiles(index, _frozen(starts), place, None if self.order is None else order)

    def chunks(self, count: int, groups: int = 1) -> np.ndarray:
        """Cut the lines into ``count`` stretches of about equal numbers of entries.

        With ``groups`` > 1, line ``u`` stands for itself and the lines ``u + lines / groups``, ... : the gates of a
        hidden unit.
        """
        key = (count, groups)
        if key not in self._chunks:
            lines = self.count // groups
            weight = np.diff(self.pointer).reshape(groups, lines).sum(axis=0) + 1
            total = np.concatenate([[0], np.cumsum(weight)])
            bounds = np.searchsorted(total, np.linspace(0, total[-1], count + 1)).astype(np.int64)
            bounds[0], bounds[-1] = 0, lines
            self._chunks[key] = bounds
        return self._chunks[key]


class Plan:
    """The rows of a pattern, and the columns of its transposed twin."""

    def __init__(self, pattern: Pattern) -> None:
        self.rows = Lines(pattern.indptr, pattern.indices, pattern.matrix_shape[1])
        self._extent = pattern.matrix_shape[0]

    @cached_property
    def columns(self) -> Lines:
        """The twin's lines: column ``j`` holds its rows, ascending."""
        nnz, narrow = self.rows.index.size, _narrow(self.rows.index.size)
        csr = scipy.sparse.csr_array(
            (np.arange(nnz, dtype=narrow), self.rows.index.astype(narrow), self.rows.pointer.astype(narrow)),
            shape=(self._extent, self.rows.across),
        )
        csc = csr.tocsc()
        index = csc.indices.astype(np.uint16 if self._extent <= 1 << 16 else np.uint32)
        return Lines(_frozen(csc.indptr.astype(np.int64)), _frozen(index), self._extent, csc.data)


def _inverse(order: np.ndarray | None) -> np.ndarray | None:
    """Return the inverse of a permutation."""
    if order is None:
        return None
    place = np.empty_like(order)
    place[order] = np.arange(order.size, dtype=order.dtype)
    return place


def _frozen(array: np.ndarray) -> np.ndarray:
    """Make an array read-only like the pattern's own: to Numba that is another type, and another compilation."""
    array.flags.writeable = False
    return array


def _narrow(size: int) -> Any:
    return np.int32 if size < 1 << 31 else np.int64


def plan(pattern: Pattern) -> Plan:
    """Return the pattern's plan, made on first use."""
    if "cpu" not in pattern.plans:
        pattern.plans["cpu"] = Plan(pattern)
    return pattern.plans["cpu"]


def chunk_count(flops: float) -> int:
    """Return into how many chunks to cut a product: one where a second thread would not pay for being woken."""
    return 1 if threads.get() == 1 or flops < 2e6 else _CHUNKS_PER_THREAD * threads.get()
