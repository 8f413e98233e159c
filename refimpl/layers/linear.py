r"""Linear map: :math:`Y = W X + b`, :math:`dX = W^\top dY`, :math:`dW = dY X^\top`, :math:`db = dY \mathbf{1}`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl import kernels
from refimpl.weights import Grads, LinearGrad, Params, SparseWeight, Weight, add_to, values_of, whole_support

FEW_ROWS = 32
"""Rows of a dense weight, such as that of an output layer, up to which sparse products beat BLAS, which copies all of
``x`` for them."""
_FEW_ENTRIES = 1 << 20  # a support takes memory


class Cache(NamedTuple):
    """What backward needs."""

    weight: str
    bias: str | None
    w: Weight  # the weight as the forward pass saw it, for dX
    x: np.ndarray  # (..., C, N), for dW


def forward(params: Params, weight: str, bias: str | None, x: np.ndarray) -> tuple[np.ndarray, Cache]:
    """Return ``W x + b`` for ``x`` of shape (..., C, N): (..., R, N)."""
    w = _with_support(params[weight], x)
    y = kernels.matmul(w, x, None if bias is None else values_of(params[bias]))
    return y, Cache(weight, bias, w, x)


def backward(
    dy: np.ndarray,
    cache: Cache,
    grads: Grads,
    *,
    input_gradient: bool = True,
    bias_gradient: np.ndarray | None = None,
) -> np.ndarray | None:
    """Add the gradients of weight and bias to ``grads`` and return ``dx``, or None if it is not wanted.

    ``bias_gradient`` is the sum of ``dy`` over its columns, where the layer above has it already.
    """
    w, x = cache.w, cache.x
    dx, known = None, None
    if input_gradient:
        if isinstance(w, SparseWeight):
            dx, on_support = kernels.matmul_t_sddmm(w, dy, x)  # each row of dY is read once for both
            known = (w.support, on_support)
        else:
            dx = kernels.matmul_t(w, dy)
    add_to(grads, cache.weight, LinearGrad(w.shape, dy, x, known))
    if cache.bias is not None:
        add_to(grads, cache.bias, kernels.sum_rows(dy) if bias_gradient is None else bias_gradient)
    return dx


def _with_support(w: Weight, x: np.ndarray) -> Weight:
    """Return a dense weight of few rows as a sparse one on its full support; any other as it is."""
    if isinstance(w, SparseWeight) or w.ndim != 2 or w.shape[0] > FEW_ROWS or w.size > _FEW_ENTRIES:
        return w
    usual = w.flags.c_contiguous and w.dtype.char in "fd" and x.dtype == w.dtype
    return SparseWeight(whole_support(w.shape), w.reshape(-1)) if usual else w
