"""What the row kernels derive from a pattern: its transposed twin, and tiles of columns.

Both depend on the topology alone. They are made once for each support, kept with it, and take memory in proportion to
its non-zeros: an index and a place for each entry in each orientation and tiling that is in use, and one pointer for
every twenty entries at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.kernels import threads
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.types import Pattern

_TILE_BYTES = 40 << 10  # of the gathered panel: what the level-1 cache holds beside the stream of values and indices
_MIN_ROW_NONZEROS = (
    20  # fewer in a row of a tile, and loading and storing the accumulated row costs more than the cache saves
)
_CHUNKS_PER_THREAD = 4


Entries = tuple[np.ndarray, np.ndarray | None]


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
    """Lines of a sparse matrix: its rows, or the columns of its transposed twin.

    Parameters
    ----------
    pointer : ndarray of int64, shape (lines + 1,)
        Line ``i`` has the entries ``pointer[i] <= k < pointer[i + 1]``.
    across : int
        Extent of the other axis.
    entries : callable
        Returns the place across of each entry, and the place in the pattern of each (None if it is the same). It is
        called for each new tiling, so that nothing but tiles that are in use is kept.
    """

    def __init__(self, pointer: np.ndarray, across: int, entries: Callable[[], Entries]) -> None:
        self.pointer = pointer
        self.across = across
        self.count = pointer.size - 1
        self.nnz = int(pointer[-1])
        self._entries = entries
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
        count = int(max(1, min(wanted, self.nnz / max(self.count, 1) // least)))
        if count not in self._tiles:
            self._tiles[count] = self._cut(count)
        return self._tiles[count]

    def _cut(self, count: int) -> Tiles:
        index, order = self._entries()
        if count == 1:
            return Tiles(index, self.pointer[None, :], _inverse(order), order)
        starts = np.zeros((count, self.count + 1), np.int64)
        moved, source = np.empty_like(index), np.empty(self.nnz, _narrow(self.nnz))
        run(cut_lines, self.pointer, index, -(-self.across // count), starts, moved, source)
        moved_order = source if order is None else order[source]
        return Tiles(_frozen(moved), _frozen(starts), _inverse(moved_order), None if order is None else moved_order)

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
        self._pointer, self._index = pattern.indptr, pattern.indices
        self._row_count, columns = pattern.matrix_shape
        self.rows = Lines(pattern.indptr, columns, lambda: (self._index, None))

    @cached_property
    def columns(self) -> Lines:
        """The twin's lines: column ``j`` holds its rows, ascending."""
        pointer = np.zeros(self.rows.across + 1, np.int64)
        np.cumsum(np.bincount(self._index, minlength=self.rows.across), out=pointer[1:])
        return Lines(_frozen(pointer), self._row_count, self._transposed)

    def _transposed(self) -> Entries:
        nnz = self._index.size
        index = np.empty(nnz, np.uint16 if self._row_count <= 1 << 16 else np.uint32)
        order = np.empty(nnz, _narrow(nnz))
        run(transpose, self._pointer, self._index, self.columns.pointer, index, order)
        return _frozen(index), order


@kernel(parallel=False)
def transpose(pointer, index, column_pointer, row_index, order):  # type: ignore[no-untyped-def]
    """Sort the entries of rows by column: a counting sort, which leaves the rows of each column ascending.

    ``order[k]`` is the place among the rows' entries of entry ``k``.
    """
    following = column_pointer[:-1].copy()
    for i in range(pointer.size - 1):
        for k in range(pointer[i], pointer[i + 1]):
            to = following[index[k]]
            following[index[k]] += 1
            row_index[to] = i
            order[to] = k


@kernel(parallel=False)
def cut_lines(pointer, index, span, starts, tile_index, source):  # type: ignore[no-untyped-def]
    """Move the entries of lines to their tiles, each of ``span`` places across.

    ``starts`` (tiles, lines + 1) starts as zeros; ``source[k]`` is the place among the lines' entries of entry ``k``.
    """
    tiles, lines = starts.shape[0], starts.shape[1] - 1
    for i in range(lines):
        for k in range(pointer[i], pointer[i + 1]):
            starts[np.int64(index[k]) // span, i + 1] += 1
    before = 0
    for t in range(tiles):
        starts[t, 0] = before
        for i in range(lines):
            starts[t, i + 1] += starts[t, i]
        before = starts[t, lines]
    following = np.empty(tiles, np.int64)
    for i in range(lines):
        following[:] = starts[:, i]
        for k in range(pointer[i], pointer[i + 1]):
            t = np.int64(index[k]) // span
            tile_index[following[t]] = index[k]
            source[following[t]] = k
            following[t] += 1


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
