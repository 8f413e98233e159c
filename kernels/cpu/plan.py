"""What the row kernels derive from a pattern: the lines of either orientation, cut into tiles.

Tiles depend on the topology alone. They are made when a kernel first needs them, kept with the pattern, and take memory
in proportion to its non-zeros: an index and a place for each entry in each tiling that is in use, and one pointer for
every few entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numba import prange

from refimpl.kernels import memory, threads
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import quads
from refimpl.kernels.types import Pattern

_TILE_BYTES = 40 << 10  # of the gathered panel: what the level-1 cache holds beside the stream of values and indices
_SECOND_LEVEL_BYTES = 512 << 10
_NEAR_ENTRIES = 5 << 18  # whose values and indices some cache keeps from one product to the next: 8 MiB
SHORT_BYTES = 128  # of a row: beginning a line anew then costs more than the level-1 cache saves
_SHORT_TILE_BYTES = 24 << 10  # short rows: the stream is a greater share of what is read
_LEAST = 20  # fewer entries of a line in a tile, and loading and storing its row costs more than the cache saves
_SHORT_LEAST = 30
WORTH_SHARING = 8e6
"""Operations below which work stays on one thread: in a tenth of a millisecond, waking and waiting cost what they save.
"""


@dataclass(frozen=True)
class Tiles:
    """Lines cut into tiles.

    They are stored tile by tile, so that a kernel reads values and indices straight on; or, of rows, left where they
    lie in the pattern, which costs the kernel some time and saves moving values to and fro.

    Attributes
    ----------
    index : ndarray of unsigned int, shape (nnz,)
        Places across, in the tiles' order.
    starts, ends : ndarray of int64, shape (tiles, lines)
        The entries of the ``j``-th line of tile ``t`` are ``starts[t, j] <= k < ends[t, j]``.
    lines : ndarray of int32, shape (tiles, lines), or None
        Which line comes ``j``-th in each tile; None if they come in order.
    place : ndarray of unsigned int, or None
        Of rows: where each entry of the pattern stands here; None if that is where it was.
    source : ndarray of unsigned int, or None
        Of columns: where each entry here stands in the pattern. Either way values move as few streams at a time as
        there are tiles, or rows in a tile.
    """

    index: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lines: np.ndarray | None = None
    place: np.ndarray | None = None
    source: np.ndarray | None = None

    @property
    def apart(self) -> bool:
        """Whether the lines of a tile do not follow each other in memory."""
        return len(self.starts) > 1 and self.place is None and self.source is None


class Job(NamedTuple):
    """How a kernel goes through the lines on panels of one width."""

    quads: tuple[int, ...]
    tiles: Tiles
    bounds: np.ndarray
    alone: bool  # whether there is too little to do for a second thread


class Lines:
    """The rows of a pattern, or its columns.

    Parameters
    ----------
    pattern : Pattern
    transposed : bool
        Whether lines are columns.
    """

    def __init__(self, pattern: Pattern, transposed: bool) -> None:
        self._pointer, self._index = pattern.indptr, pattern.indices
        self.transposed = transposed
        rows, columns = pattern.matrix_shape
        self.count, self.across = (columns, rows) if transposed else (rows, columns)
        self.nnz = int(self._index.size)
        self._tiles: dict[tuple[int, int, int, bool], Tiles] = {}
        self._chunks: dict[tuple[int, int], np.ndarray] = {}
        self._jobs: dict[tuple[int, int, int, bool], Job] = {}

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of entries of each line."""
        return np.bincount(self._index, minlength=self.count) if self.transposed else np.diff(self._pointer)

    @property
    def near(self) -> bool:
        """Whether some cache keeps the entries from one product to the next."""
        return self.nnz <= _NEAR_ENTRIES

    def job(self, width: int, itemsize: int, panels: int, flops_each: float, copied: bool = True) -> Job:
        """Return how to do this many operations for each non-zero and column; made once for each width."""
        count = chunk_count(flops_each * self.nnz * panels * width)
        key = (width, itemsize, count, copied)
        job = self._jobs.get(key)
        if job is None:
            job = Job(quads(width), self.tiles(width * itemsize, copied), self.chunks(count), count == 1)
            self._jobs[key] = job
        return job

    def tiles(self, row_bytes: int, copied: bool = True) -> Tiles:
        """Cut the lines into tiles: stretches of the other axis whose gathered rows fit in the level-1 cache.

        Parameters
        ----------
        row_bytes : int
            Of a gathered row.
        copied : bool
            Whether rows are stored tile by tile; columns always are.
        """
        copied |= self.transposed
        if row_bytes > SHORT_BYTES:
            count = self._count(row_bytes, _TILE_BYTES, _LEAST)
        elif copied:
            count = self._count(row_bytes, _SHORT_TILE_BYTES, _SHORT_LEAST)
        else:  # a stream from afar, cut in pieces, costs more than it saves
            count = self._count(row_bytes, _TILE_BYTES if self.near else _SECOND_LEVEL_BYTES, 5 * _LEAST)
        return self._cut(count, 0, 0, copied)

    def sorted_tiles(self, row_bytes: int, chunks: int, groups: int = 1) -> Tiles:
        """Cut the lines into tiles, and sort the lines of each chunk of each tile by their length there.

        A loop that is left after as many turns as last time is predicted; one that is left at random costs twenty
        cycles, as much as all the loads of a short row. (Wide rows gain less from that than they lose by being read
        out of order.)

        Parameters
        ----------
        row_bytes : int
            Of a gathered row.
        chunks, groups : int
            As in :meth:`chunks`: the ``j``-th lines of a chunk are ``groups`` times its bounds.
        """
        return self._cut(self._count(row_bytes, _SHORT_TILE_BYTES, _SHORT_LEAST), chunks, groups, True)

    def cut(self, count: int) -> Tiles:
        """Cut the lines into a number of tiles, stored tile by tile."""
        return self._cut(count, 0, 0, True)

    def _count(self, row_bytes: int, tile_bytes: int, least: int) -> int:
        wanted = -(-self.across * row_bytes // tile_bytes)
        return int(max(1, min(wanted, self.nnz / max(self.count, 1) // least)))

    def chunks(self, count: int, groups: int = 1) -> np.ndarray:
        """Cut the lines into ``count`` stretches of about equal numbers of entries.

        With ``groups`` > 1, line ``u`` stands for itself and the lines ``u + lines / groups``, ... : the gates of a
        hidden unit.
        """
        key = (count, groups)
        if key not in self._chunks:
            lines = self.count // groups
            if count == 1:
                self._chunks[key] = np.array([0, lines])
                return self._chunks[key]
            weight = self.lengths.reshape(groups, lines).sum(axis=0) + 1
            total = np.concatenate([[0], np.cumsum(weight)])
            bounds = np.searchsorted(total, np.linspace(0, total[-1], count + 1)).astype(np.int64)
            bounds[0], bounds[-1] = 0, lines
            self._chunks[key] = bounds
        return self._chunks[key]

    def _cut(self, tiles: int, chunks: int, groups: int, copied: bool) -> Tiles:
        key = (tiles, chunks, groups, copied)
        if key not in self._tiles:
            self._tiles[key] = self._made(tiles, chunks, groups, copied)
        return self._tiles[key]

    def _made(self, tiles: int, chunks: int, groups: int, copied: bool) -> Tiles:
        if tiles == 1 and not self.transposed and not chunks:
            return Tiles(self._index, self._pointer[None, :-1], self._pointer[None, 1:])
        span = -(-self.across // tiles)
        lengths = np.zeros((tiles, self.count), np.int64)
        run(count_columns if self.transposed else count_rows, self._pointer, self._index, span, lengths)
        if not copied:
            bounds = np.empty((tiles + 1, self.count), np.int64)
            bounds[0] = self._pointer[:-1]
            np.cumsum(lengths, axis=0, out=bounds[1:])
            bounds[1:] += bounds[0]
            _freeze(bounds)
            return Tiles(self._index, bounds[:-1], bounds[1:])
        lines = None
        if chunks:
            lines = np.empty((tiles, self.count), np.int32)
            run(sort_lines, lengths, self.chunks(chunks, groups), groups, lines)
        starts, ends, first = (np.empty((tiles, self.count), np.int64) for _ in range(3))
        order = np.arange(self.count, dtype=np.int32)[None] if lines is None else lines
        run(lay_out, lengths, order, starts, ends, first)
        index = memory.empty((self.nnz,), np.uint16 if self.across <= 1 << 16 else np.uint32)
        moves = memory.empty((self.nnz,), np.uint32 if self.nnz < 1 << 32 else np.uint64)
        run(fill_columns if self.transposed else fill_rows, self._pointer, self._index, span, first, index, moves)
        place, source = (None, moves) if self.transposed else (moves, None)
        _freeze(index, starts, ends)
        return Tiles(index, starts, ends, lines, place, source)


def _freeze(*arrays: np.ndarray) -> None:
    """Make arrays read-only like the pattern's own: to Numba that is another type, and another compilation."""
    for array in arrays:
        array.flags.writeable = False


class Plan:
    """The lines of a pattern in both orientations."""

    def __init__(self, pattern: Pattern) -> None:
        self.rows = Lines(pattern, transposed=False)
        self.columns = Lines(pattern, transposed=True)


@kernel(parallel=False)
def count_rows(pointer, index, span, lengths):  # type: ignore[no-untyped-def]
    """Count the entries of each row in each tile of ``span`` columns; ``lengths`` (tiles, rows) starts as zeros."""
    for i in range(pointer.size - 1):
        tile, edge = 0, span
        for k in range(pointer[i], pointer[i + 1]):
            while index[k] >= edge:
                tile += 1
                edge += span
            lengths[tile, i] += 1


@kernel
def fill_rows(pointer, index, span, first, tile_index, place):  # type: ignore[no-untyped-def]
    """Move the entries of each row to where its stretch of each tile begins, ``first`` (tiles, rows)."""
    for i in prange(pointer.size - 1):
        tile, edge = 0, span
        shift = first[0, i] - pointer[i]
        for k in range(pointer[i], pointer[i + 1]):
            if index[k] >= edge:
                while index[k] >= edge:
                    tile += 1
                    edge += span
                shift = first[tile, i] - k
            tile_index[k + shift] = index[k]
            place[k] = k + shift


@kernel(parallel=False)
def count_columns(pointer, index, span, lengths):  # type: ignore[no-untyped-def]
    """Count the entries of each column in each tile of ``span`` rows; ``lengths`` (tiles, columns) starts as zeros."""
    rows = pointer.size - 1
    for tile in range(lengths.shape[0]):
        own = lengths[tile]
        for k in range(pointer[min(tile * span, rows)], pointer[min((tile + 1) * span, rows)]):
            own[index[k]] += 1


@kernel
def fill_columns(pointer, index, span, first, tile_index, source):  # type: ignore[no-untyped-def]
    """Sort the entries of each tile by column: a counting sort, which leaves the rows of each column ascending.

    ``first`` (tiles, columns), where each column's stretch begins, is used up.
    """
    rows = pointer.size - 1
    for tile in prange(first.shape[0]):
        following = first[tile]
        for i in range(min(tile * span, rows), min((tile + 1) * span, rows)):
            for k in range(pointer[i], pointer[i + 1]):
                to = following[index[k]]
                following[index[k]] = to + 1
                tile_index[to] = i
                source[to] = k


@kernel(parallel=False)
def sort_lines(lengths, bounds, groups, lines):  # type: ignore[no-untyped-def]
    """Sort the lines of each chunk of each tile by length: ``lines`` (tiles, lines), chunk after chunk.

    The lines of chunk ``c`` are ``g * (lines / groups) + u`` for ``bounds[c] <= u < bounds[c + 1]`` and each group g.
    """
    tiles, count = lengths.shape
    units = count // groups
    chunks = bounds.size - 1
    for job in range(tiles * chunks):
        tile, c = job // chunks, job % chunks
        longest = 0
        for group in range(groups):
            for u in range(bounds[c], bounds[c + 1]):
                longest = max(longest, lengths[tile, group * units + u])
        following = np.zeros(longest + 2, np.int64)
        for group in range(groups):
            for u in range(bounds[c], bounds[c + 1]):
                following[lengths[tile, group * units + u] + 1] += 1
        following[0] = groups * bounds[c]
        for length in range(1, longest + 2):
            following[length] += following[length - 1]
        for group in range(groups):
            for u in range(bounds[c], bounds[c + 1]):
                length = lengths[tile, group * units + u]
                lines[tile, following[length]] = group * units + u
                following[length] += 1


@kernel(parallel=False)
def lay_out(lengths, lines, starts, ends, first):  # type: ignore[no-untyped-def]
    """Lay the lines of each tile end to end, in the order of ``lines`` (tiles, lines), or (1, lines) for all tiles."""
    tiles, count = lengths.shape
    before = 0
    for tile in range(tiles):
        for j in range(count):
            i = lines[min(tile, lines.shape[0] - 1), j]
            starts[tile, j] = first[tile, i] = before
            before += lengths[tile, i]
            ends[tile, j] = before


def plan(pattern: Pattern) -> Plan:
    """Return the pattern's plan, made on first use."""
    made = pattern.plans.get("cpu")
    if made is None:
        made = pattern.plans["cpu"] = Plan(pattern)
    return made


def chunk_count(flops: float) -> int:
    """Return into how many chunks to cut a product: one where a second thread would not pay for being woken, else one
    for each thread. More would not share the work better, for each thread is told beforehand which are its own; and
    every chunk reads anew all that is gathered.
    """
    return 1 if threads.get() == 1 or flops < WORTH_SHARING else threads.get()
