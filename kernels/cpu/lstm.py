"""An LSTM layer over a window as one composition, in a layout of its own.

The products that do not recur (``W_ih x``, and both backward products of ``W_ih``) run over panels of several time
steps. What recurs is one product for each step, ``W_hh h``, on rows of one batch; the gates follow it in registers, on
the thread that computed their four rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from refimpl.kernels import memory, threads
from refimpl.kernels.cpu import panels
from refimpl.kernels.cpu.plan import plan
from refimpl.kernels.cpu.products import backward_panels, in_tiles, matmul_panels, sum_rows
from refimpl.kernels.cpu.rows import Frame, gather_row
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import INT, Row, quads
from refimpl.kernels.spec import LSTMBackward
from refimpl.kernels.types import SparseMatrix

_RECURRENT_ROW_NONZEROS = 100  # rows of one batch are short: a tile must give more work to each


@intrinsic
def cell_forward(typingctx, quads, gates, at, gate_stride, cells, before, after, hidden, to):  # type: ignore[no-untyped-def]
    """One hidden unit, one time step: gate rows become activations, and the new cell and output are written.

    ``gates[at + k * gate_stride : + width]`` for k = 0..3 (i, f, g, o) hold the pre-activations.
    """
    n = types.intp
    signature = types.void(quads, gates, n, n, cells, n, n, hidden, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows = f.rows
        gate = [b.gep(f.pointer(1, 2), [b.mul(arguments[3], INT(k))]) for k in range(4)]
        a = [rows.load(g) for g in gate]
        i, forget, g, o = rows.sigmoid(a[0]), rows.sigmoid(a[1]), rows.tanh(a[2]), rows.sigmoid(a[3])
        for row, pointer in zip((i, forget, g, o), gate, strict=True):
            rows.store(row, pointer)
        cell = rows.fma(forget, rows.load(f.pointer(4, 5)), rows.mul(i, g))
        rows.store(cell, f.pointer(4, 6))
        rows.store(rows.mul(o, rows.tanh(cell)), f.pointer(7, 8))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def cell_backward(  # type: ignore[no-untyped-def]
    typingctx, quads, gates, at, gate_stride, d_gates, step, to, step_stride,
    cells, before, after, dy, dy_at, dh, dc, state_at,
):  # fmt: skip
    """One hidden unit, one time step, backward: from ``dh + dy`` and ``dc`` to the gradients of the four
    pre-activations.

    They are written to ``d_gates`` (where ``gates`` has them) for the weight gradients, and to ``step`` for the next
    recurrent product.
    """
    n = types.intp
    signature = types.void(quads, gates, n, n, d_gates, step, n, n, cells, n, n, dy, n, dh, dc, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows = f.rows
        one = rows.constant(1.0)

        def times_complement(x: Row) -> Row:  # x (1 - x)
            return rows.mul(x, rows.sub(one, x))

        def offsets(base: ir.Value, stride: ir.Value) -> list[ir.Value]:
            return [b.gep(base, [b.mul(stride, INT(k))]) for k in range(4)]

        i, forget, g, o = (rows.load(p) for p in offsets(f.pointer(1, 2), arguments[3]))
        d_hidden = rows.add(rows.load(f.pointer(13, 15)), rows.load(f.pointer(11, 12)))
        tanh_cell = rows.tanh(rows.load(f.pointer(8, 10)))
        through_tanh = rows.mul(rows.mul(d_hidden, o), rows.sub(one, rows.mul(tanh_cell, tanh_cell)))
        d_cell = rows.add(rows.load(f.pointer(14, 15)), through_tanh)
        d_pre = (
            rows.mul(rows.mul(d_cell, g), times_complement(i)),
            rows.mul(rows.mul(d_cell, rows.load(f.pointer(8, 9))), times_complement(forget)),
            rows.mul(rows.mul(d_cell, i), rows.sub(one, rows.mul(g, g))),
            rows.mul(rows.mul(d_hidden, tanh_cell), times_complement(o)),
        )
        for row, p, q in zip(
            d_pre, offsets(f.pointer(4, 2), arguments[3]), offsets(f.pointer(5, 6), arguments[7]), strict=True
        ):
            rows.store(row, p)
            rows.store(row, q)
        rows.store(rows.mul(d_cell, forget), f.pointer(14, 15))
        return context.get_dummy_value()

    return signature, generate


@kernel
def recur_forward(quads, values, index, starts, bounds, gates, cells, hidden):  # type: ignore[no-untyped-def]
    """Run the recurrence of one layer.

    gates (P, 4H, w) hold ``W_ih x + b`` on entry and activations on return, ``w // b`` steps a panel; cells and hidden
    (T + 1, H, b) hold the first state at 0. Lines are the rows of W_hh; ``bounds`` cut the hidden units, whose four
    gate rows stay together.
    """
    steps, size, batch = hidden.shape[0] - 1, hidden.shape[1], hidden.shape[2]
    width = gates.shape[2]
    together = width // batch
    flat_gates, flat_cells, flat_hidden = gates.reshape(-1), cells.reshape(-1), hidden.reshape(-1)
    for t in range(steps):
        first = t // together * 4 * size * width + t % together * batch
        state = t * size * batch
        for c in prange(bounds.size - 1):
            for tile in range(starts.shape[0]):
                for gate in range(4):
                    for u in range(bounds[c], bounds[c + 1]):
                        i = gate * size + u
                        gather_row(
                            quads, flat_hidden, state, batch, values, index, starts[tile, i], starts[tile, i + 1],
                            flat_gates, first + i * width, True, values.dtype.type(0),
                        )  # fmt: skip
            for u in range(bounds[c], bounds[c + 1]):
                now = state + u * batch
                cell_forward(
                    quads, flat_gates, first + u * width, size * width, flat_cells,
                    now, now + size * batch, flat_hidden, now + size * batch,
                )  # fmt: skip


@kernel
def recur_backward(quads, values, index, starts, bounds, gates, cells, dy, dh, dc, d_gates, d_step):  # type: ignore[no-untyped-def]
    """Run the recurrence backward.

    Lines are the columns of W_hh. ``dh`` and ``dc`` (H, b) hold the gradient of the last state on entry and of the
    first on return; ``d_step`` (2, 4H, b) is scratch: the pre-activation gradients of this step and of the one after
    it.
    """
    steps, size, batch = dy.shape
    width = gates.shape[2]
    together = width // batch
    flat_gates, flat_d_gates, flat_cells = gates.reshape(-1), d_gates.reshape(-1), cells.reshape(-1)
    flat_dy, flat_dh, flat_dc, flat_step = dy.reshape(-1), dh.reshape(-1), dc.reshape(-1), d_step.reshape(-1)
    half = 4 * size * batch
    for back in range(steps + 1):
        t = steps - 1 - back
        first = t // together * 4 * size * width + t % together * batch
        for c in prange(bounds.size - 1):
            if back > 0:
                for tile in range(starts.shape[0]):
                    for u in range(bounds[c], bounds[c + 1]):
                        gather_row(
                            quads, flat_step, (back - 1) % 2 * half, batch, values, index,
                            starts[tile, u], starts[tile, u + 1], flat_dh, u * batch, tile > 0, values.dtype.type(0),
                        )  # fmt: skip
            if t >= 0:
                for u in range(bounds[c], bounds[c + 1]):
                    now = (t * size + u) * batch
                    cell_backward(
                        quads, flat_gates, first + u * width, size * width, flat_d_gates,
                        flat_step, back % 2 * half + u * batch, size * batch,
                        flat_cells, now, now + size * batch, flat_dy, now, flat_dh, flat_dc, u * batch,
                    )  # fmt: skip


class Trace(NamedTuple):
    """What backward needs of the forward pass; a large batch is run in parts of ``b`` columns."""

    x: np.ndarray  # (parts · P, I, w)
    gates: np.ndarray  # (parts · P, 4H, w)
    cells: np.ndarray  # (parts, T + 1, H, b)
    hidden: np.ndarray  # (parts, T + 1, H, b)
    batch: int


def _split(x: np.ndarray, parts: int, width: int) -> np.ndarray:
    """Cut the batch of (..., F, B) into parts: (parts, ..., F, width), zeros in the columns too many."""
    if parts == 1 and x.shape[-1] == width and x.flags.c_contiguous:
        return x[None]
    out = memory.empty((parts, *x.shape[:-1], width), x.dtype)
    if parts * width != x.shape[-1]:
        out[-1] = 0
    for q in range(parts):
        part = x[..., q * width : (q + 1) * width]
        out[q, ..., : part.shape[-1]] = part
    return out


def _join(parts: np.ndarray, batch: int) -> np.ndarray:
    """Undo :func:`_split`."""
    if len(parts) == 1:
        return parts[0] if parts.shape[-1] == batch else np.ascontiguousarray(parts[0, ..., :batch])
    return np.ascontiguousarray(np.concatenate(list(parts), axis=-1)[..., :batch])


def _batch_parts(batch: int, itemsize: int) -> tuple[int, int]:
    lay = panels.layout(1, batch, itemsize)
    return lay.pieces, lay.part if lay.pieces > 1 else -(-batch // 4) * 4


def _pack(parts: np.ndarray) -> np.ndarray:
    """Return (parts, T, F, b) as panels, each part's time steps on their own."""
    packed = [panels.pack(part) for part in parts]
    return packed[0] if len(packed) == 1 else np.concatenate(packed)


def lstm_forward(
    w_ih: SparseMatrix, w_hh: SparseMatrix, bias: np.ndarray, x: np.ndarray, h0: np.ndarray, c0: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Trace]:
    """Run an LSTM layer over a window; see :func:`refimpl.kernels.spec.lstm_forward`."""
    steps, size, batch = len(x), h0.shape[0], x.shape[2]
    parts, width = _batch_parts(batch, x.itemsize)
    packed = _pack(_split(x, parts, width))
    gates = matmul_panels(w_ih, packed, bias)
    cells = memory.empty((parts, steps + 1, size, width), x.dtype)
    hidden = memory.empty((parts, steps + 1, size, width), x.dtype)
    cells[:, 0], hidden[:, 0] = _split(c0, parts, width), _split(h0, parts, width)
    rows = plan(w_hh.support).rows
    bounds = rows.chunks(_recurrent_chunks(w_hh, width), groups=4)
    tiles = rows.tiles(width * x.itemsize, _RECURRENT_ROW_NONZEROS)
    values = in_tiles(w_hh.values, tiles)
    count = len(packed) // parts
    for q in range(parts):
        own = gates[q * count : (q + 1) * count]
        run(recur_forward, quads(width), values, tiles.index, tiles.starts, bounds, own, cells[q], hidden[q])
    y = _join(hidden[:, 1:], batch)
    return y, y[-1], _join(cells[:, -1], batch), Trace(packed, gates, cells, hidden, batch)


def lstm_backward(
    w_ih: SparseMatrix,
    w_hh: SparseMatrix,
    trace: Trace,
    dy: np.ndarray,
    dh: np.ndarray,
    dc: np.ndarray,
    input_gradient: bool,
) -> LSTMBackward:
    """Run its backward pass; see :func:`refimpl.kernels.spec.lstm_backward`."""
    parts, steps, size, width = trace.hidden.shape
    steps -= 1
    d_gates = memory.empty(trace.gates.shape, dy.dtype)
    count = len(d_gates) // parts
    if count * (d_gates.shape[2] // width) != steps or d_gates.shape[2] % width:
        d_gates[count - 1 :: count] = 0  # the last panel of each part has columns that no time step fills
    split_dy, split_dh, split_dc = (np.array(_split(a, parts, width)) for a in (dy, dh, dc))
    d_step = memory.empty((2, 4 * size, width), dy.dtype)
    lines = plan(w_hh.support).columns
    bounds = lines.chunks(_recurrent_chunks(w_hh, width))
    tiles = lines.tiles(width * dy.itemsize, _RECURRENT_ROW_NONZEROS)
    values = in_tiles(w_hh.values, tiles)
    for q in range(parts):
        own = slice(q * count, (q + 1) * count)
        run(
            recur_backward, quads(width), values, tiles.index, tiles.starts, bounds, trace.gates[own], trace.cells[q],
            split_dy[q], split_dh[q], split_dc[q], d_gates[own], d_step,
        )  # fmt: skip
    dx, dw_ih = None, None
    if input_gradient:
        packed_dx, dw_ih = backward_panels(w_ih, d_gates, trace.x)
        shape = (steps, trace.x.shape[1], width)
        dx = _join(
            np.stack([panels.unpack(packed_dx[q * count : (q + 1) * count], shape) for q in range(parts)]), trace.batch
        )
    return LSTMBackward(
        dx,
        _join(split_dh, trace.batch),
        _join(split_dc, trace.batch),
        d_gates,
        trace.x,
        _pack(trace.hidden[:, :-1]),
        sum_rows(d_gates),
        dw_ih,
    )


def _recurrent_chunks(w_hh: SparseMatrix, width: int) -> int:
    """One chunk for each thread: they meet after every step, so more of them would only wait more often."""
    flops = 2.0 * w_hh.values.size * width
    return threads.get() if flops > 1e6 else 1
