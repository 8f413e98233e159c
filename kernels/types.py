"""What the kernels take: a pattern, a sparse matrix over it, or a dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Pattern(Protocol):
    """Compressed sparse rows without values, such as ``refimpl.weights.Support``.

    Attributes
    ----------
    matrix_shape : tuple of int
        (rows R, columns C).
    indptr : ndarray of int64, shape (R + 1,)
    indices : ndarray of uint16 or uint32, shape (nnz,)
        Columns, ascending in each row.
    plans : dict
        Where a tier keeps what it derives from the pattern.
    """

    matrix_shape: tuple[int, int]
    indptr: np.ndarray
    indices: np.ndarray
    plans: dict[str, Any]


class SparseMatrix(Protocol):
    """A pattern and its values, float32 or float64, in the pattern's order."""

    @property
    def support(self) -> Pattern: ...

    @property
    def values(self) -> np.ndarray: ...


Matrix = np.ndarray | SparseMatrix


def is_sparse(w: Matrix) -> TypeIs[SparseMatrix]:
    """Tell a sparse matrix from a dense array."""
    return hasattr(w, "support")


class Geometry(NamedTuple):
    """Which pixels of an image the windows of a convolution see, heights before widths.

    Window (h, w) sees the pixels ``(stride * h + i - padding, stride * w + j - padding)`` for the taps (i, j) of the
    kernel; what lies outside the image is zero.

    Attributes
    ----------
    kernel, stride : tuple of int
    padding : tuple of int
        (top, left).
    image, outputs : tuple of int
        Sizes.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    image: tuple[int, int]
    outputs: tuple[int, int]


class Inset(NamedTuple):
    """Images inside a contiguous array (C, H, W, B) that has zeros around them.

    Attributes
    ----------
    whole : ndarray
    at : tuple of int
        (row, column) of the images' first pixel.
    """

    whole: np.ndarray
    at: tuple[int, int]
