"""Embedding lookup in a sparse matrix, and its gradient: work in proportion to the non-zeros of the rows that occur."""

from __future__ import annotations

import numpy as np
from numba import prange

from refimpl.kernels import memory
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.types import Pattern, SparseMatrix


@kernel
def lookup(tokens, indptr, index, values, out):  # type: ignore[no-untyped-def]
    """``out[t, index[k], b] = values[k]`` for the entries ``k`` of row ``tokens[t, b]``; out (T, E, B) is zeroed."""
    for t in prange(tokens.shape[0]):
        out[t] = 0
        for b in range(tokens.shape[1]):
            for k in range(indptr[tokens[t, b]], indptr[tokens[t, b] + 1]):
                out[t, index[k], b] = values[k]


@kernel(parallel=False)
def scatter(tokens, indptr, index, dx, out):  # type: ignore[no-untyped-def]
    """``out[k] += dx[t, index[k], b]`` for the entries of each token's row, in the text's order."""
    for t in range(tokens.shape[0]):
        for b in range(tokens.shape[1]):
            for k in range(indptr[tokens[t, b]], indptr[tokens[t, b] + 1]):
                out[k] += dx[t, index[k], b]


def embed(w: SparseMatrix, tokens: np.ndarray) -> np.ndarray:
    """Look up rows; see :func:`refimpl.kernels.spec.embed`."""
    out = memory.empty((tokens.shape[0], w.support.matrix_shape[1], tokens.shape[1]), w.values.dtype)
    run(lookup, tokens, w.support.indptr, w.support.indices, w.values, out)
    return out


def embed_gradient(support: Pattern, tokens: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Return the gradient on a support; see :func:`refimpl.kernels.spec.embed_gradient`."""
    out = np.zeros(support.indices.size, dx.dtype)
    run(scatter, tokens, support.indptr, support.indices, np.ascontiguousarray(dx), out)
    return out
