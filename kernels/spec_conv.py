r"""Convolutions of images by definition: products with the columns of the padded image.

Column :math:`(h, w, b)` of an image (I, H, W, B) is what window :math:`(h, w)` of sample b sees: its
:math:`I k_h k_w` numbers, in the order of a weight's row. With these columns X a convolution is the linear map
:math:`Y = W X + b`, and its gradients are :math:`dX = W^\top dY`, of which each pixel gets the sum over all windows
that see it, and :math:`dW = dY X^\top`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refimpl.kernels import spec
from refimpl.kernels.types import Geometry, Inset, Pattern, SparseMatrix


def convolve(w: SparseMatrix, x: Inset, geometry: Geometry, bias: np.ndarray | None = None) -> np.ndarray:
    """Return the convolution of images.

    Parameters
    ----------
    w : SparseMatrix
        (O, I · kh · kw) as a matrix.
    x : Inset
        Images (I, H, W, B), with at least the zeros around them that the windows see.
    geometry : Geometry
    bias : ndarray, shape (O,), optional

    Returns
    -------
    ndarray, shape (O, H', W', B)
    """
    y = spec.matmul(w, _columns(x, geometry), bias)
    return y.reshape(len(y), *geometry.outputs, x.whole.shape[3])


def convolve_dot(support: Pattern, dy: Inset, x: Inset, geometry: Geometry) -> np.ndarray:
    """Return the weight's gradient ``dY X^T`` on a support, (nnz,).

    Parameters
    ----------
    support : Pattern
    dy : Inset
        Gradients (O, H', W', B), with any margin.
    x : Inset
    geometry : Geometry
    """
    return spec.sddmm(support, _flat(dy, geometry), _columns(x, geometry))


def convolve_backward(w: SparseMatrix, dy: Inset, x: Inset, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient of the images, (I, H, W, B), and the weight's on its support, (nnz,)."""
    flat, columns = _flat(dy, geometry), _columns(x, geometry)
    d_columns, grad = spec.matmul_t_sddmm(w, flat, columns)
    d_whole = np.zeros(x.whole.shape, flat.dtype)
    for tap, pixels in enumerate(_taps(d_whole, x.at, geometry)):
        windows = d_columns.reshape(len(d_whole), -1, *pixels.shape[1:])
        pixels += windows[:, tap]
    (t, l), (h, w_) = x.at, geometry.image
    return np.ascontiguousarray(d_whole[:, t : t + h, l : l + w_]), grad


def _taps(whole: np.ndarray, at: tuple[int, int], geometry: Geometry) -> Iterator[np.ndarray]:
    """Yield what all windows see at each tap, views (C, H', W', B): no two windows see one pixel."""
    (sh, sw), (h, w) = geometry.stride, geometry.outputs
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            top, left = at[0] - geometry.padding[0] + i, at[1] - geometry.padding[1] + j
            yield whole[:, top : top + sh * (h - 1) + 1 : sh, left : left + sw * (w - 1) + 1 : sw]


def _columns(x: Inset, geometry: Geometry) -> np.ndarray:
    taps = np.stack(list(_taps(x.whole, x.at, geometry)), axis=1)  # (I, taps, H', W', B)
    return taps.reshape(taps.shape[0] * taps.shape[1], -1)


def _flat(dy: Inset, geometry: Geometry) -> np.ndarray:
    (t, l), (h, w) = dy.at, geometry.outputs
    return dy.whole[:, t : t + h, l : l + w].reshape(len(dy.whole), -1)
