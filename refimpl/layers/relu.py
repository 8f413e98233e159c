r"""Rectified linear unit: :math:`Y = \max(X, 0)`, :math:`dX = dY \odot [Y > 0]`.

Backward needs the output alone, so the input may be overwritten. The sum of :math:`dX` over the columns is the gradient
of the bias of the map below; it comes out of the same pass over the memory.
"""

from __future__ import annotations

import numpy as np

from refimpl import kernels

Cache = np.ndarray
"""The output."""


def forward(x: np.ndarray, *, in_place: bool = False) -> tuple[np.ndarray, Cache]:
    """Return ``max(x, 0)`` for ``x`` of shape (..., F, N); with ``in_place`` it overwrites ``x``.

    NaN stays NaN.
    """
    y = kernels.relu(x, x if in_place else None)
    return y, y


def backward(dy: np.ndarray, cache: Cache, *, in_place: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient of ``x``, and its sum over all columns, of shape (F,); with ``in_place`` the gradient
    overwrites ``dy``.
    """
    return kernels.relu_backward(dy, cache, dy if in_place else None)
