"""The products of a sparse linear map: loops of row kernels over panels, tiles and chunks of lines.

Every output element is computed by one thread in an order that depends on the pattern and the panel's width alone, so
the number of threads does not change a bit of the result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import prange

from refimpl.kernels import dense, memory
from refimpl.kernels.cpu.panels import are_panels, pack, unpack
from refimpl.kernels.cpu.plan import SHORT_BYTES, Lines, Tiles, chunk_count, plan
from refimpl.kernels.cpu.rows import (
    dot_row,
    fetch,
    fetch_rows,
    gather_dot_moved_row,
    gather_dot_row,
    gather_row,
    row_sum,
    scatter_dot_row,
)
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import quads
from refimpl.kernels.types import Pattern, SparseMatrix

FEW_PANELS = 4  # for so few, rows are read where they lie; for more, it pays to lay each tile's rows end to end first
_AHEAD = 4  # lines
NARROW_BYTES = 64  # of a lone panel's rows, up to which reading and writing one costs less than finding its value


@kernel
def gather(quads, values, index, starts, ends, apart, bounds, x, offset, out):  # type: ignore[no-untyped-def]
    """``out[p, i] = offset[i] + sum over k in line i of values[k] * x[p, index[k]]``.

    x (P, across, w), offset (lines,), out (P, lines, w). Reads nnz · P rows of w numbers, of which a tile's stay in the
    level-1 cache. ``apart`` tells that the lines of a tile do not follow each other in memory.
    """
    panels, across, _ = x.shape
    lines = out.shape[1]
    chunks = bounds.size - 1
    flat_x, flat_out = x.reshape(-1), out.reshape(-1)
    for job in prange(panels * chunks):
        p, c = job // chunks, job % chunks
        for t in range(starts.shape[0]):
            for i in range(bounds[c], bounds[c + 1]):
                if apart:
                    fetch(values, index, starts[t, min(i + _AHEAD, lines - 1)])
                gather_row(
                    quads, flat_x, p * across, values, index, starts[t, i], ends[t, i],
                    flat_out, p * lines + i, t > 0, offset[i],
                )  # fmt: skip


@kernel
def dot(quads, index, starts, ends, apart, bounds, y, x, out):  # type: ignore[no-untyped-def]
    """``out[k] = sum over p of <y[p, i], x[p, index[k]]>`` for the entries ``k`` of each line ``i``.

    y (P, lines, w), x (P, across, w), out (nnz,).
    """
    panels, across, _ = x.shape
    lines = y.shape[1]
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    for c in prange(bounds.size - 1):
        for p in range(panels):
            for t in range(starts.shape[0]):
                for i in range(bounds[c], bounds[c + 1]):
                    if apart:
                        fetch(out, index, starts[t, min(i + _AHEAD, lines - 1)])
                    dot_row(
                        quads, flat_x, p * across, flat_y, p * lines + i, index, starts[t, i], ends[t, i],
                        out, p > 0,
                    )  # fmt: skip


@kernel
def gather_dot(quads, values, index, starts, ends, bounds, y, x, out, grad, add):  # type: ignore[no-untyped-def]
    """Both backward products over columns: ``out = W^T y`` and ``grad[k] (+)= <x[j], y[index[k]]>``.

    y (P, across, w), x and out (P, lines, w), grad (nnz,) in the columns' order. With each line a share of the rows of
    ``y`` that the next tile gathers are asked for: each is gathered a few times only, in no order.
    """
    panels, across, _ = y.shape
    lines, tiles = x.shape[1], starts.shape[0]
    span = -(-across // tiles)
    flat_x, flat_y, flat_out = x.reshape(-1), y.reshape(-1), out.reshape(-1)
    for c in prange(bounds.size - 1):
        share = span / max(bounds[c + 1] - bounds[c], 1)
        for p in range(panels):
            for t in range(tiles):
                following = p * across + (t + 1) * span if t + 1 < tiles else (p + 1) * across
                told = 0
                for j in range(bounds[c], bounds[c + 1]):
                    tell = int((j + 1 - bounds[c]) * share)
                    fetch_rows(quads, flat_y, following + told, following + tell)
                    told = tell
                    if p == 0 and not add:
                        gather_dot_row(
                            quads, flat_y, 0, flat_x, j, values, index, starts[t, j], ends[t, j],
                            grad, False, flat_out, t > 0,
                        )  # fmt: skip
                    else:
                        gather_dot_row(
                            quads, flat_y, p * across, flat_x, p * lines + j, values, index,
                            starts[t, j], ends[t, j], grad, True, flat_out, t > 0,
                        )  # fmt: skip


@kernel
def gather_dot_moved(quads, values, index, source, starts, ends, bounds, y, x, out, grad):  # type: ignore[no-untyped-def]
    """:func:`gather_dot` on one panel, values and gradient being in the pattern's order: nothing is moved before and
    after.
    """
    flat_x, flat_y, flat_out = x.reshape(-1), y.reshape(-1), out.reshape(-1)
    for c in prange(bounds.size - 1):
        for t in range(starts.shape[0]):
            for j in range(bounds[c], bounds[c + 1]):
                gather_dot_moved_row(
                    quads, flat_y, flat_x, j, values, index, starts[t, j], ends[t, j], grad, flat_out, t > 0, source
                )


@kernel(parallel=False)
def scatter_dot(quads, values, index, pointer, y, x, out, grad):  # type: ignore[no-untyped-def]
    """Both backward products over rows, of one panel: ``out = W^T y`` and ``grad[k] = <y[i], x[index[k]]>``.

    y (1, rows, w), x and out (1, columns, w), grad (nnz,) in the pattern's order. Different rows add to one row of
    ``out``, so one thread does all; but no value is moved.
    """
    flat_x, flat_y, flat_out = x.reshape(-1), y.reshape(-1), out.reshape(-1)
    flat_out[:] = 0
    for i in range(pointer.size - 1):
        scatter_dot_row(
            quads, flat_y, i, values, index, pointer[i], pointer[i + 1], flat_x, flat_out, grad
        )  # fmt: skip


# Of a thread's own stretch, as an array of its own, the address is known to stay where it is; that of an array of all
# threads is read anew at each entry, which takes four times as long.


@kernel
def take(values, order, bounds, out):  # type: ignore[no-untyped-def]
    """``out[k] = values[order[k]]``."""
    for c in prange(bounds.size - 1):
        own, to = order[bounds[c] : bounds[c + 1]], out[bounds[c] : bounds[c + 1]]
        for k in range(own.size):
            to[k] = values[own[k]]


@kernel
def put(values, order, bounds, out):  # type: ignore[no-untyped-def]
    """``out[order[k]] = values[k]``."""
    for c in prange(bounds.size - 1):
        own, moved = order[bounds[c] : bounds[c + 1]], values[bounds[c] : bounds[c + 1]]
        for k in range(own.size):
            out[own[k]] = moved[k]


@kernel
def sum_lines(quads, bounds, x, out):  # type: ignore[no-untyped-def]
    """``out[i] = sum over p, b of x[p, i, b]``; x (P, lines, w)."""
    panels, lines, _ = x.shape
    flat = x.reshape(-1)
    for c in prange(bounds.size - 1):
        for i in range(bounds[c], bounds[c + 1]):
            total = row_sum(quads, flat, i)
            for p in range(1, panels):
                total += row_sum(quads, flat, p * lines + i)
            out[i] = total


@lru_cache(maxsize=1 << 10)
def _even(size: int, count: int) -> np.ndarray:
    return np.linspace(0, size, count + 1).astype(np.int64)


def even_chunks(size: int, flops_each: float = 8.0) -> np.ndarray:
    """Return the bounds of equal stretches of ``size`` items, as many as their work is worth."""
    return _even(size, chunk_count(flops_each * size))


def in_tiles(values: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Return values of the pattern in the tiles' order."""
    if tiles.place is not None:
        return _moved(put, values, tiles.place)
    return values if tiles.source is None else _moved(take, values, tiles.source)


def from_tiles(values: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Return values of the tiles in the pattern's order."""
    if tiles.place is not None:
        return _moved(take, values, tiles.place)
    return values if tiles.source is None else _moved(put, values, tiles.source)


def _moved(how: Any, values: np.ndarray, order: np.ndarray) -> np.ndarray:
    out = memory.empty(values.shape, values.dtype)
    bounds = even_chunks(out.size)
    run(how, values, order, bounds, out, alone=bounds.size == 2)
    return out


class Product:
    """``W X + b`` or, over the columns, ``W^T dY``, a few panels at a time.

    Parameters
    ----------
    lines : Lines
    values : ndarray, shape (nnz,)
        In the pattern's order.
    x : ndarray, shape (P, across, w)
        All panels.
    offset : ndarray, shape (lines,), optional
    """

    def __init__(self, lines: Lines, values: np.ndarray, x: np.ndarray, offset: np.ndarray | None) -> None:
        self._lines = lines
        self._x = x
        self._copied = len(x) > FEW_PANELS
        self._values = in_tiles(values, lines.job(x.shape[2], x.itemsize, len(x), 2.0, self._copied).tiles)
        self._offset = np.zeros(lines.count, x.dtype) if offset is None else offset
        self.y = memory.empty((x.shape[0], lines.count, x.shape[2]), x.dtype)

    def add(self, panels: slice) -> None:
        """Compute some panels of ``y``."""
        x = self._x[panels]
        sizes, tiles, bounds, alone = self._lines.job(x.shape[2], x.itemsize, len(x), 2.0, self._copied)
        run(
            gather, sizes, self._values, tiles.index, tiles.starts, tiles.ends, tiles.apart, bounds, x, self._offset,
            self.y[panels], alone=alone,
        )  # fmt: skip


class Backward:
    """Both backward products, a few panels at a time: ``dx`` and the gradient on the support.

    Parameters
    ----------
    w : SparseMatrix
    x : ndarray, shape (P, C, w)
        All panels of the map's input.
    """

    def __init__(self, w: SparseMatrix, x: np.ndarray) -> None:
        self._lines = plan(w.support).columns
        self._tiles = self._lines.job(x.shape[2], x.itemsize, len(x), 4.0).tiles
        self._values = in_tiles(w.values, self._tiles)
        self._grad = memory.empty(w.values.shape, x.dtype)
        self._x = x
        self._begun = False
        self.dx = memory.empty(x.shape, x.dtype)

    def add(self, dy: np.ndarray, panels: slice) -> None:
        """Take in some panels of ``dY``, which has the shape (P, R, w)."""
        own = dy[panels]
        sizes, tiles, bounds, alone = self._lines.job(own.shape[2], own.itemsize, len(own), 4.0)
        run(
            gather_dot, sizes, self._values, tiles.index, tiles.starts, tiles.ends, bounds, own,
            self._x[panels], self.dx[panels], self._grad, self._begun, alone=alone,
        )  # fmt: skip
        self._begun = True

    def gradient(self) -> np.ndarray:
        """Return ``dY X^T`` on the support, in its order."""
        return from_tiles(self._grad, self._tiles)


_ALL = slice(None)


def matmul_panels(w: SparseMatrix, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``W X + b`` on panels (P, C, w)."""
    product = Product(plan(w.support).rows, w.values, x, bias)
    product.add(_ALL)
    return product.y


def matmul_t_panels(w: SparseMatrix, dy: np.ndarray) -> np.ndarray:
    """Return ``W^T dY`` on panels (P, R, w)."""
    product = Product(plan(w.support).columns, w.values, dy, None)
    product.add(_ALL)
    return product.y


def sddmm_panels(support: Pattern, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``dY X^T`` on the support, of panels (P, R, w) and (P, C, w)."""
    rows = plan(support).rows
    sizes, tiles, bounds, alone = rows.job(x.shape[2], x.itemsize, len(x), 2.0, len(x) > FEW_PANELS)
    out = memory.empty((rows.nnz,), x.dtype)
    run(dot, sizes, tiles.index, tiles.starts, tiles.ends, tiles.apart, bounds, dy, x, out, alone=alone)
    return from_tiles(out, tiles)


def backward_panels(w: SparseMatrix, dy: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``W^T dY`` on panels and ``dY X^T`` on the support."""
    if len(x) == 1:
        support, dx, grad = w.support, memory.empty(x.shape, x.dtype), memory.empty(w.values.shape, x.dtype)
        columns = plan(support).columns
        if _better_scattered(columns, x.shape[2] * x.itemsize):
            run(scatter_dot, quads(x.shape[2]), w.values, support.indices, support.indptr, dy, x, dx, grad)
            return dx, grad
        sizes, tiles, bounds, alone = columns.job(x.shape[2], x.itemsize, 1, 4.0)
        run(
            gather_dot_moved, sizes, w.values, tiles.index, tiles.source, tiles.starts, tiles.ends, bounds, dy, x, dx,
            grad, alone=alone,
        )  # fmt: skip
        return dx, grad
    step = Backward(w, x)
    step.add(dy, _ALL)
    return step.dx, step.gradient()


def _better_scattered(columns: Lines, row_bytes: int) -> bool:
    """Tell whether to go over the rows for the backward products of one panel, each of which reads and writes a row of
    x and of dX for each entry, costs less than to go over the columns, whose entries lie scattered in the pattern.
    """
    tall = columns.across > 2 * columns.count
    return row_bytes <= NARROW_BYTES or (row_bytes <= SHORT_BYTES and (tall or not columns.near))


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
    out = np.empty(dy.shape[1], dy.dtype)
    bounds = even_chunks(out.size, float(dy.shape[0] * dy.shape[2]))
    run(sum_lines, quads(dy.shape[2]), bounds, dy, out, alone=bounds.size == 2)
    return out
