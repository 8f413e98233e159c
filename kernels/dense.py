"""Dense products, in fixed blocks of rows that our threads share out to a single-threaded BLAS.

The blocks depend on the shapes alone, so the same bits come out for any number of threads.
"""

from __future__ import annotations

import numpy as np

from refimpl.kernels import memory, threads

_LEAST_ROWS = 128  # BLAS copies all of b for each block
_BLOCK_FLOPS = 1 << 27  # about a millisecond of one core: long enough to hide the hand-over to a thread


def gemm(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return ``a @ b`` for two matrices (M, K) and (K, N)."""
    (m, k), n = a.shape, b.shape[1]
    if out is None:
        out = memory.empty((m, n), np.result_type(a, b))
    rows = max(_LEAST_ROWS, _BLOCK_FLOPS // max(2 * k * n, 1))

    def block(start: int) -> None:
        np.matmul(a[start : start + rows], b, out=out[start : start + rows])

    with threads.one_blas_thread():
        threads.share(block, range(0, m, rows))
    return out


def columns(x: np.ndarray) -> np.ndarray:
    """Return (..., F, N) as one matrix (F, panels · N)."""
    if x.ndim == 2:
        return x
    panels = x.reshape(-1, *x.shape[-2:])
    return panels.transpose(1, 0, 2).reshape(x.shape[-2], -1)


def matmul(w: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``w @ x + bias`` for all panels of ``x`` (..., C, N) at once: (..., R, N), a view of (R, ..., N)."""
    y = gemm(w, columns(x))
    if bias is not None:
        y += bias[:, None]
    if x.ndim == 2:
        return y
    return np.moveaxis(y.reshape(w.shape[0], *x.shape[:-2], x.shape[-1]), 0, -2)


def outer(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``dy @ x^T`` summed over panels: the dense gradient (R, C) of a linear map."""
    return gemm(columns(dy), columns(x).T)
