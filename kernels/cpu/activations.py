"""Rectified linear units on panels, in place: one pass that reads and writes each number once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from refimpl.kernels import spec
from refimpl.kernels.cpu.panels import MAX_BYTES
from refimpl.kernels.cpu.plan import chunk_count
from refimpl.kernels.cpu.rows import Frame
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import QUAD, quads

_FLOPS_EACH = 16.0  # of one number, counted as its memory traffic costs


@kernel
def rectify(x, chunks):  # type: ignore[no-untyped-def]
    """``x = max(x, 0)``; flat."""
    zero = x.dtype.type(0)
    for c in prange(chunks):
        part = x[c * x.size // chunks : (c + 1) * x.size // chunks]  # loops from 0 are vectorised, others are not
        for k in range(part.size):
            part[k] = zero if part[k] <= zero else part[k]


@intrinsic
def rectify_row(typingctx, quads, dy, y, at):  # type: ignore[no-untyped-def]
    """``dy = 0 where y <= 0`` on a row, whose sum is returned; ``dy[at : at + width]``, ``y[at : at + width]``."""
    signature = dy.dtype(quads, dy, y, types.intp)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, dy = f.rows, f.pointer(1, 3)
        kept = [
            b.select(b.fcmp_ordered("<=", v, zero), zero, d)
            for v, d, zero in zip(rows.load(f.pointer(2, 3)), rows.load(dy), rows.zero(), strict=True)
        ]
        rows.store(kept, dy)
        return rows.sum(rows.dot(kept, rows.constant(1.0)))

    return signature, generate


@kernel
def rectify_backward(quads, dy, y, sums, chunks):  # type: ignore[no-untyped-def]
    """``dy = 0 where y <= 0``, ``sums[i] = sum over p, b of dy[p, i, b]``; dy and y (P, F, w)."""
    panels, lines, width = dy.shape
    flat_dy, flat_y = dy.reshape(-1), y.reshape(-1)
    for c in prange(chunks):
        for i in range(c * lines // chunks, (c + 1) * lines // chunks):
            total = rectify_row(quads, flat_dy, flat_y, i * width)
            for p in range(1, panels):
                total += rectify_row(quads, flat_dy, flat_y, (p * lines + i) * width)
            sums[i] = total


def relu(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return ``max(X, 0)``; see :func:`refimpl.kernels.spec.relu`."""
    if out is None or not out.flags.c_contiguous:
        return spec.relu(x, out)
    if out is not x:
        out[...] = x
    chunks = chunk_count(_FLOPS_EACH * out.size)
    run(rectify, out.reshape(-1), chunks, alone=chunks == 1)
    return out


def relu_backward(dy: np.ndarray, y: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return dX and its sums over the columns; see :func:`refimpl.kernels.spec.relu_backward`."""
    if out is None or not (_has_rows(out) and _has_rows(y) and out.dtype == y.dtype):
        return spec.relu_backward(dy, y, out)
    if out is not dy:
        out[...] = dy
    sums = np.empty(y.shape[1], y.dtype)
    chunks = chunk_count(_FLOPS_EACH * out.size)
    run(rectify_backward, quads(y.shape[2]), out, y, sums, chunks, alone=chunks == 1)
    return out, sums


def _has_rows(x: np.ndarray[Any, Any]) -> bool:
    """Tell whether an array is (P, F, w) with rows of a width that row kernels take."""
    return (
        x.ndim == 3
        and x.flags.c_contiguous
        and x.shape[2] % QUAD == 0
        and 0 < x.shape[2] * x.itemsize <= MAX_BYTES
        and x.size > 0
    )
