"""The products of a sparse linear map: loops of row kernels over panels, tiles and chunks of lines.

Every output element is computed by one thread in an order that depends on the pattern and the panel's width alone, so
the number of threads does not change a bit of the result.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from refimpl.kernels import dense, memory
from refimpl.kernels.cpu.panels import are_panels, pack, unpack
from refimpl.kernels.cpu.plan import Lines, Tiles, chunk_count, plan
from refimpl.kernels.cpu.rows import dot_row, gather_dot_row, gather_row, row_sum
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import quads
from refimpl.kernels.types import Pattern, SparseMatrix


@kernel
def gather(quads, values, index, starts, bounds, x, offset, out):  # type: ignore[no-untyped-def]
    """``out[p, i] = offset[i] + sum over k in line i of values[k] * x[p, index[k]]``.

    x (P, across, w), offset (lines,), out (P, lines, w). Reads nnz · P rows of w numbers, of which a tile's stay in the
    level-1 cache.
    """
    panels, across, width = x.shape
    lines = out.shape[1]
    chunks = bounds.size - 1
    flat_x, flat_out = x.reshape(-1), out.reshape(-1)
    for job in prange(panels * chunks):
        p, c = job // chunks, job % chunks
        for t in range(starts.shape[0]):
            for i in range(bounds[c], bounds[c + 1]):
                gather_row(
                    quads, flat_x, p * across * width, width, values, index, starts[t, i], starts[t, i + 1],
                    flat_out, (p * lines + i) * width, t > 0, offset[i],
                )  # fmt: skip


@kernel
def dot(quads, index, starts, bounds, y, x, out):  # type: ignore[no-untyped-def]
    """``out[k] = sum over p of <y[p, i], x[p, index[k]]>`` for the entries ``k`` of each line ``i``.

    y (P, lines, w), x (P, across, w), out (nnz,).
    """
    panels, across, width = x.shape
    lines = y.shape[1]
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for c in prange(bounds.size - 1):
        for p in range(panels):
            for t in range(starts.shape[0]):
                for i in range(bounds[c], bounds[c + 1]):
                    dot_row(
                        quads, flat_x, p * across * width, width, flat_y, (p * lines + i) * width, index,
                        starts[t, i], starts[t, i + 1], out, p > 0,
                    )  # fmt: skip


@kernel
def gather_dot(quads, values, index, starts, bounds, y, x, out, grad):  # type: ignore[no-untyped-def]
    """Both backward products over the lines of the transposed twin: ``out = W^T y`` and
    ``grad[k] = <x[j], y[index[k]]>``.

    y (P, across, w), x and out (P, lines, w), grad (nnz,) in the twin's order.
    """
    panels, across, width = y.shape
    lines = x.shape[1]
    flat_x, flat_y, flat_out = x.reshape(-1), y.reshape(-1), out.reshape(-1)
    for c in prange(bounds.size - 1):
        for p in range(panels):
            for t in range(starts.shape[0]):
                for j in range(bounds[c], bounds[c + 1]):
                    at = (p * lines + j) * width
                    gather_dot_row(
                        quads, flat_y, p * across * width, width, flat_x, at, values, index,
                        starts[t, j], starts[t, j + 1], grad, p > 0, flat_out, at, t > 0,
                    )  # fmt: skip


@kernel
def take(values, order, bounds, out):  # type: ignore[no-untyped-def]
    """``out[k] = values[order[k]]``."""
    for c in prange(bounds.size - 1):
        for k in range(bounds[c], bounds[c + 1]):
            out[k] = values[order[k]]


@kernel
def put(values, place, bounds, out):  # type: ignore[no-untyped-def]
    """``out[place[k]] = values[k]``."""
    for c in prange(bounds.size - 1):
        for k in range(bounds[c], bounds[c + 1]):
            out[place[k]] = values[k]


@kernel
def sum_lines(quads, bounds, x, out):  # type: ignore[no-untyped-def]
    """``out[i] = sum over p, b of x[p, i, b]``; x (P, lines, w)."""
    panels, lines, width = x.shape
    flat = x.reshape(-1)
    for c in prange(bounds.size - 1):
        for i in range(bounds[c], bounds[c + 1]):
            total = row_sum(quads, flat, i * width)
            for p in range(1, panels):
                total += row_sum(quads, flat, (p * lines + i) * width)
            out[i] = total


def even_chunks(size: int, flops_each: float = 8.0) -> np.ndarray:
    """Return the bounds of equal stretches of ``size`` items, as many as their work is worth."""
    return np.linspace(0, size, chunk_count(flops_each * size) + 1).astype(np.int64)


def in_tiles(values: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Return values of the pattern in the tiles' order."""
    if tiles.place is None:
        return values
    out = memory.empty(values.shape, values.dtype)
    if tiles.order is None:
        run(put, values, tiles.place, even_chunks(out.size), out)
    else:
        run(take, values, tiles.order, even_chunks(out.size), out)
    return out


def from_tiles(values: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Return values of the tiles in the pattern's order."""
    if tiles.place is None:
        return values
    out = memory.empty(values.shape, values.dtype)
    run(take, values, tiles.place, even_chunks(out.size), out)
    return out


def _gather_panels(lines: Lines, values: np.ndarray, x: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """Return the product of one orientation with panels (P, across, w): (P, lines, w)."""
    tiles = lines.tiles(x.shape[2] * x.itemsize)
    if offset is None:
        offset = np.zeros(lines.count, x.dtype)
    out = memory.empty((x.shape[0], lines.count, x.shape[2]), x.dtype)
    chunks = lines.chunks(chunk_count(2.0 * values.size * x.shape[0] * x.shape[2]))
    run(gather, quads(x.shape[2]), in_tiles(values, tiles), tiles.index, tiles.starts, chunks, x, offset, out)
    return out


def matmul_panels(w: SparseMatrix, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``W X + b`` on panels (P, C, w)."""
    return _gather_panels(plan(w.support).rows, w.values, x, bias)


def matmul_t_panels(w: SparseMatrix, dy: np.ndarray) -> np.ndarray:
    """Return ``W^T dY`` on panels (P, R, w)."""
    return _gather_panels(plan(w.support).columns, w.values, dy, None)


def sddmm_panels(support: Pattern, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``dY X^T`` on the support, of panels (P, R, w) and (P, C, w)."""
    rows = plan(support).rows
    tiles = rows.tiles(x.shape[2] * x.itemsize)
    out = memory.empty((rows.nnz,), x.dtype)
    chunks = rows.chunks(chunk_count(2.0 * out.size * x.shape[0] * x.shape[2]))
    run(dot, quads(x.shape[2]), tiles.index, tiles.starts, chunks, dy, x, out)
    return from_tiles(out, tiles)


def backward_panels(w: SparseMatrix, dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``W^T dY`` on panels and ``dY X^T`` on the support."""
    lines = plan(w.support).columns
    tiles = lines.tiles(x.shape[2] * x.itemsize)
    dx = memory.empty(x.shape, x.dtype)
    grad = memory.empty(w.values.shape, x.dtype)
    chunks = lines.chunks(chunk_count(4.0 * grad.size * x.shape[0] * x.shape[2]))
    run(
        gather_dot, quads(x.shape[2]), in_tiles(w.values, tiles), tiles.index, tiles.starts, chunks, dy, x, dx, grad
    )  # fmt: skip
    return dx, from_tiles(grad, tiles)


def matmul(w: SparseMatrix, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``W X + b``; see :func:`refimpl.kernels.spec.matmul`."""
    return unpack(matmul_panels(w, pack(x), bias), (*x.shape[:-2], w.support.matrix_shape[0], x.shape[-1]))


def matmul_t(w: SparseMatrix, dy: np.ndarray) -> np.ndarray:
    """Return ``W^T dY``; see :func:`refimpl.kernels.spec.matmul_t`."""
    return unpack(matmul_t_panels(w, pack(dy)), (*dy.shape[:-2], w.support.matrix_shape[1], dy.shape[-1]))


def sddmm(support: Pattern, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``dY X^T`` on the support; see :func:`refimpl.kernels.spec.sddmm`."""
    return sddmm_panels(support, pack(dy), pack(x))


def matmul_t_sddmm(w: SparseMatrix, dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both backward products; see :func:`refimpl.kernels.spec.matmul_t_sddmm`."""
    dx, grad = backward_panels(w, pack(dy), pack(x))
    return unpack(dx, x.shape), grad


def sum_rows(dy: np.ndarray) -> np.ndarray:
    """Return the sum of each feature over all columns; see :func:`refimpl.kernels.spec.sum_rows`."""
    if not are_panels(dy):
        return dense.columns(dy).sum(axis=1)
    panels = dy
    out = np.empty(panels.shape[1], dy.dtype)
    run(sum_lines, quads(panels.shape[2]), even_chunks(out.size, float(panels.shape[0] * panels.shape[2])), panels, out)
    return out
