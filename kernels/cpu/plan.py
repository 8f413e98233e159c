"""What the row kernels derive from a pattern: its transposed twin, and tiles of columns.

Both depend on the topology alone. They are made once for each support, kept with it, and take memory in proportion to its non-zeros: an index and a
permutation for each entry of the twin, and for the tiles one pointer for every twenty entries at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from refimpl.kernels import threads
from refimpl.kernels.types import Pattern

_TILE_BYTES = 40 << 10  # of the gathered panel: what the level-1 cache holds beside the stream of values and indices
_MIN_ROW_NONZEROS = 20  # fewer in a row of a tile, and loading and storing the accumulated row costs more than the cache saves
_CHUNKS_PER_THREAD = 4


class Lines:
    """Lines of a sparse matrix (rows, or columns of the twin): ``index[pointer[i]:pointer[i + 1]]`` for line ``i``.

    Parameters
    ----------
    pointer : ndarray of int64, shape (lines + 1,)
    index : ndarray of unsigned int, shape (nnz,)
    across : int
        Extent of the other axis, that ``index`` runs over.
    """

    def __init__(self, pointer: np.ndarray, index: np.ndarray, across: int) -> None:
        self.pointer = pointer
        self.index = index
        self.across = across
        self.count = pointer.size - 1
        self._tiles: dict[int, np.ndarray] = {}
        self._chunks: dict[tuple[int, int], np.ndarray] = {}

    def tiles(self, row_bytes: int, least: int = _MIN_ROW_NONZEROS) -> np.ndarray:
        """Return where each tile of each line starts, int64 of shape (tiles + 1, lines).

        Entries ``k`` of line ``i`` in tile ``t`` are ``tiles[t, i] <= k < tiles[t + 1, i]``: lines are sorted, so a tile is a stretch of each of
        them, and nothing is reordered.

        Parameters
        ----------
        row_bytes : int
            Of a gathered row: a tile spans as many rows as fit in the level-1 cache.
        least : int
            Average number of entries that a line must keep in each tile.
        """
        wanted = -(-self.across * row_bytes // _TILE_BYTES)
        count = int(max(1, min(wanted, self.index.size / max(self.count, 1) // least)))
        if count not in self._tiles:
            span = -(-self.across // count)
            key = np.repeat(np.arange(self.count) * count, np.diff(self.pointer)) + self.index // np.int64(span)
            sizes = np.bincount(key, minlength=self.count * count).reshape(self.count, count)
            starts = np.empty((count + 1, self.count), np.int64)
            starts[0] = self.pointer[:-1]
            np.cumsum(sizes.T, axis=0, out=starts[1:])
            starts[1:] += self.pointer[:-1]
            self._tiles[count] = starts
        return self._tiles[count]

    def chunks(self, count: int, groups: int = 1) -> np.ndarray:
        """Cut the lines into ``count`` stretches of about equal numbers of entries.

        With ``groups`` > 1, line ``u`` stands for itself and the lines ``u + lines / groups``, ... : the gates of a hidden unit.
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
        self._pattern = pattern
        self._columns: Lines | None = None
        self._place: np.ndarray | None = None

    @property
    def columns(self) -> Lines:
        """The twin's lines: column ``j`` holds its rows, ascending."""
        if self._columns is None:
            self._transpose()
        assert self._columns is not None
        return self._columns

    @property
    def place(self) -> np.ndarray:
        """Place in the twin of each entry of the pattern: ``twin_values[place] = values``."""
        if self._place is None:
            self._transpose()
        assert self._place is not None
        return self._place

    def _transpose(self) -> None:
        r, c = self._pattern.matrix_shape
        nnz = self.rows.index.size
        narrow: Any = np.int32 if nnz < 1 << 31 else np.int64
        csr = scipy.sparse.csr_array(
            (np.arange(nnz, dtype=narrow), self.rows.index.astype(narrow), self.rows.pointer.astype(narrow)), shape=(r, c)
        )
        csc = csr.tocsc()
        self._columns = Lines(
            csc.indptr.astype(np.int64), csc.indices.astype(np.uint16 if r <= 1 << 16 else np.uint32), r
        )
        self._place = np.empty_like(csc.data)
        self._place[csc.data] = np.arange(nnz, dtype=narrow)


def plan(pattern: Pattern) -> Plan:
    """Return the pattern's plan, made on first use."""
    if "cpu" not in pattern.plans:
        pattern.plans["cpu"] = Plan(pattern)
    return pattern.plans["cpu"]


def chunk_count(flops: float) -> int:
    """Return into how many chunks to cut a product: one where a second thread would not pay for being woken."""
    return 1 if threads.get() == 1 or flops < 2e6 else _CHUNKS_PER_THREAD * threads.get()
