"""A sparse weight: a support and one value for each of its entries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from refimpl import kernels
from refimpl.weights.support import Shape, Support


class SparseWeight:
    """A weight that stores only the entries of its support.

    Parameters
    ----------
    support : Support
        Which entries exist.
    values : ndarray, shape (nnz,)
        Their values in row-major order, contiguous, float32 or float64. Kept by reference: optimizers update them in
        place.

    Raises
    ------
    ValueError
        If there is not exactly one value for each entry, or they are not contiguous numbers of these types.
    """

    __slots__ = ("support", "values")

    def __init__(self, support: Support, values: np.ndarray) -> None:
        if values.shape != (support.nnz,):
            raise ValueError(
                f"a support of {support.nnz} entries needs as many values; got an array of shape {values.shape}"
            )
        if values.dtype not in (np.float32, np.float64):
            raise ValueError(f"values must be float32 or float64; got {values.dtype}")
        if not values.flags.c_contiguous:
            raise ValueError(
                "values must lie next to each other; got a strided view, of which np.ascontiguousarray makes a copy"
            )
        self.support = support
        self.values = values

    @classmethod
    def from_dense(cls, dense: np.ndarray, support: Support | None = None) -> SparseWeight:
        """Take the entries of ``dense`` on ``support`` (by default, where it is not zero)."""
        if support is None:
            support = Support.from_mask(dense != 0)
        if dense.shape != support.shape:
            raise ValueError(f"the support has shape {support.shape}, the weight {dense.shape}")
        return cls(support, dense.reshape(-1)[support.flat])

    @property
    def shape(self) -> Shape:
        """Shape of the dense weight."""
        return self.support.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.values.dtype

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.support.nnz

    @property
    def density(self) -> float:
        """Fraction of the entries that are stored."""
        return self.support.density

    def dense(self) -> np.ndarray:
        """Return the weight as a dense array, zeros outside the support (for people, tests and exports)."""
        out = np.zeros(self.support.size, self.dtype)
        out[self.support.flat] = self.values
        return out.reshape(self.shape)

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        return kernels.matmul(self, x)

    def __repr__(self) -> str:
        return f"SparseWeight(shape={self.shape}, nnz={self.nnz}, density={self.density:.4g}, dtype={self.dtype})"


Weight = np.ndarray | SparseWeight
"""A trained array: dense, or a sparse weight. Code above the kernels treats the two alike."""


def values_of(weight: Weight) -> np.ndarray:
    """Return the array of trained numbers of a weight: a view that optimizers update in place."""
    return weight.values if isinstance(weight, SparseWeight) else weight


def support_of(weight: Weight) -> Support:
    """Return the support of a sparse weight, and the full one of a dense weight."""
    return weight.support if isinstance(weight, SparseWeight) else Support.full(weight.shape)


def as_sparse(weight: Weight) -> SparseWeight:
    """Return a weight as a sparse one: a dense array on its full support, its values not copied."""
    return weight if isinstance(weight, SparseWeight) else SparseWeight(Support.full(weight.shape), weight.reshape(-1))


@lru_cache(maxsize=256)
def whole_support(shape: Shape) -> Support:
    """Return the full support of a shape, always the same one: what kernels derive from it is kept with it.

    For small weights that stay dense and are multiplied as sparse ones.
    """
    return Support.full(shape)


def density_of(weight: Weight) -> float:
    """Return the fraction of a weight's entries that are stored, 1 for a dense one."""
    return weight.density if isinstance(weight, SparseWeight) else 1.0


def draw_uniform(rng: np.random.Generator, shape: Shape, bound: float, dtype: Any, support: Support | None) -> Weight:
    """Draw a weight from U(±bound): of a sparse one, only the values that exist; a dense array without a support."""
    values = rng.uniform(-bound, bound, shape if support is None else support.nnz).astype(dtype)
    return values if support is None else SparseWeight(support, values)
