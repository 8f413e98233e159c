"""The support of a sparse weight: which entries exist."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.kernels import topology

Shape = tuple[int, ...]


def index_dtype(size: int) -> np.dtype[Any]:
    """Return the narrowest unsigned type that indexes ``size`` places: 16 or 32 bits, as the kernels take them."""
    if size > 1 << 32:
        raise ValueError(f"a weight may have 2**32 columns at most; got {size}")
    return np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)


class Support:
    """The set of stored entries of a weight, in row-major order; immutable.

    A weight of shape ``(rows, *rest)`` is seen as a matrix of ``rows`` output units by ``prod(rest)`` columns, and
    stored as compressed sparse rows: row ``i`` holds the columns ``indices[indptr[i]:indptr[i + 1]]``, ascending and
    without duplicates. Everything that is remembered about the weight's entries is an array of length ``nnz`` in this
    order.

    Parameters
    ----------
    shape : tuple of int
        Shape of the weight.
    flat : array_like of int
        Positions in C order, strictly ascending.

    Raises
    ------
    ValueError
        If the positions are not strictly ascending or lie outside the shape.
    """

    def __init__(self, shape: Shape, flat: np.ndarray | Sequence[int]) -> None:
        shape = tuple(int(n) for n in shape)
        positions = np.asarray(flat, dtype=np.int64)
        if not shape or positions.ndim != 1:
            raise ValueError(
                f"a support needs a shape and a list of flat positions; got shape {shape} and {positions.ndim} axes"
            )
        size = int(np.prod(shape))
        if positions.size and (positions[0] < 0 or positions[-1] >= size or (np.diff(positions) <= 0).any()):
            raise ValueError(f"the flat positions of a support must ascend strictly within 0..{size - 1}")
        columns = size // shape[0] if shape[0] else 0
        row_starts = np.arange(shape[0] + 1, dtype=np.int64) * columns
        indptr = np.searchsorted(positions, row_starts).astype(np.int64)
        indices = (positions - np.repeat(row_starts[:-1], np.diff(indptr))).astype(index_dtype(columns))
        self._set(shape, indptr, indices)

    def _set(self, shape: Shape, indptr: np.ndarray, indices: np.ndarray) -> None:
        self.shape = shape
        self.matrix_shape = (shape[0], int(np.prod(shape[1:])) if shape[0] else 0)
        self.indptr = indptr
        self.indices = indices
        for array in (indptr, indices):
            array.flags.writeable = False
        self.plans: dict[str, Any] = {}  # what the kernel tiers derive from the pattern, such as transposed twins

    @classmethod
    def _of_rows(cls, shape: Shape, indptr: np.ndarray, indices: np.ndarray) -> Support:
        """Return the support of rows that are known to be in order."""
        support = cls.__new__(cls)
        support._set(shape, indptr, indices)
        return support

    def exchanged(self, goes: np.ndarray, grown: np.ndarray, *, ranked: bool = False) -> tuple[Support, np.ndarray]:
        """Return the support without some of its entries and with others, in one pass over both.

        Parameters
        ----------
        goes : ndarray of bool, shape (nnz,)
            The entries that are taken out.
        grown : ndarray of int64
            What is put in, strictly ascending: flat positions or, where ``ranked``, numbers of free positions before
            them, when what goes has gone.
        ranked : bool

        Returns
        -------
        support : Support
        source : ndarray of int, shape (support.nnz,)
            For each of its entries the place of it here; −2 − that place if it was taken out and put in again, −1 if
            it was not stored.

        Raises
        ------
        ValueError
            If what is put in does not ascend strictly, lies outside the shape, or is kept.
        """
        indptr, indices, source = topology.exchange(self, goes, grown, ranked)
        return self._of_rows(self.shape, indptr, indices), source

    def entries_before(self, flat: int) -> int:
        """Return how many stored entries lie at positions below ``flat``."""
        if not 0 < flat < self.size:
            return self.nnz if flat > 0 else 0
        row, column = divmod(flat, self.matrix_shape[1])
        low, high = self.indptr[row], self.indptr[row + 1]
        return int(low + np.searchsorted(self.indices[low:high], column))

    @classmethod
    def full(cls, shape: Shape) -> Support:
        """Return the support that holds every entry of ``shape``."""
        return cls(shape, np.arange(int(np.prod(shape)), dtype=np.int64))

    @classmethod
    def empty(cls, shape: Shape) -> Support:
        """Return the support that holds no entry of ``shape``."""
        return cls(shape, np.empty(0, np.int64))

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> Support:
        """Return the support of the entries where ``mask`` is true."""
        mask = np.asarray(mask)
        return cls(mask.shape, np.flatnonzero(mask))

    def mask(self) -> np.ndarray:
        """Return the picture of the support: a boolean array of the weight's shape (dense, for people and tests)."""
        picture = np.zeros(int(np.prod(self.shape)), bool)
        picture[self.flat] = True
        return picture.reshape(self.shape)

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return int(self.indices.size)

    @property
    def size(self) -> int:
        """Number of entries of the dense weight."""
        return self.matrix_shape[0] * self.matrix_shape[1]

    @property
    def density(self) -> float:
        """Fraction of the entries that are stored."""
        return self.nnz / self.size if self.size else 0.0

    @property
    def rows(self) -> np.ndarray:
        """Row of each stored entry, int64 of length nnz."""
        return np.repeat(np.arange(self.matrix_shape[0], dtype=np.int64), np.diff(self.indptr))

    @property
    def flat(self) -> np.ndarray:
        """Positions in C order, int64 of length nnz, ascending."""
        return topology.places(self, 0, self.nnz)

    @cached_property
    def row_counts(self) -> np.ndarray:
        """Number of stored entries in each row."""
        return np.diff(self.indptr)

    def positions_of(self, flat: np.ndarray) -> np.ndarray:
        """Return where each of the flat positions is stored, −1 for those that are not.

        Parameters
        ----------
        flat : ndarray of int64
            Positions in C order, in any order.

        Returns
        -------
        ndarray of int64
            Indices into arrays aligned with this support.
        """
        mine = self.flat
        if not mine.size:
            return np.full(len(flat), -1, np.int64)
        at = np.searchsorted(mine, flat)
        at[at == mine.size] = 0
        return np.where(mine[at] == flat, at, -1)

    def __contains__(self, other: object) -> bool:
        return (
            isinstance(other, Support)
            and self.shape == other.shape
            and bool((self.positions_of(other.flat) >= 0).all())
        )

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Support)
            and self.shape == other.shape
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.nnz, self.indices[:16].tobytes()))

    def __repr__(self) -> str:
        return f"Support(shape={self.shape}, nnz={self.nnz}, density={self.density:.4g})"
