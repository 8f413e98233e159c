"""An LSTM layer over a window as one composition, in a layout of its own.

The products that do not recur (``W_ih x``, and both backward products of ``W_ih``) run over panels of several time
steps. What recurs is one product for each step, ``W_hh h``, on split rows of one batch; the gates follow it in
registers, on the thread that computed their four rows.
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
from refimpl.kernels.cpu.products import Backward, Product, in_tiles, sum_rows
from refimpl.kernels.cpu.rows import Frame, fetch_row, gather_row
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import INT, Row, quads, whole_registers
from refimpl.kernels.spec import LSTMBackward
from refimpl.kernels.types import SparseMatrix

_PASS_BYTES = 4 << 20
_AHEAD = 16  # units: the backward pass reads and writes eleven arrays at once, more streams than the processor follows


@intrinsic
def cell_forward(  # type: ignore[no-untyped-def]
    typingctx, quads, gates, at, gate_stride, recurrent, unit, size,
    cells, before, after, hidden, state, following, previous, previous_at,
):  # fmt: skip
    """One hidden unit, one time step: pre-activations become activations, and the new cell and output are written.

    ``gates[at + k * gate_stride : + width]`` for k = 0..3 (i, f, g, o) hold the input's share of the pre-activations,
    the rows ``k * size + unit`` of ``recurrent`` the hidden state's. The output goes to row ``after`` of ``hidden``,
    to row ``following`` of ``state`` for the next product, and to ``previous[previous_at : + width]`` for the weight
    gradient.
    """
    n = types.intp
    signature = types.void(quads, gates, n, n, recurrent, n, n, cells, n, n, hidden, state, n, previous, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, (unit, size) = f.rows, arguments[5:7]
        gate = [b.gep(f.pointer(1, 2), [b.mul(arguments[3], INT(k))]) for k in range(4)]
        shares = [f.row(4, b.add(unit, b.mul(size, INT(k)))) for k in range(4)]
        a = [rows.add(rows.load(g), rows.load(r)) for g, r in zip(gate, shares, strict=True)]
        i, forget, g, o = rows.sigmoid(a[0]), rows.sigmoid(a[1]), rows.tanh(a[2]), rows.sigmoid(a[3])
        for row, pointer in zip((i, forget, g, o), gate, strict=True):
            rows.store(row, pointer)
        cell = rows.fma(forget, rows.load(f.row(7, arguments[8])), rows.mul(i, g))
        rows.store(cell, f.row(7, arguments[9]))
        output = rows.mul(o, rows.tanh(cell))
        for place in (f.row(10, arguments[9]), f.row(11, arguments[12]), f.pointer(13, 14)):
            rows.store(output, place)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def cell_backward(  # type: ignore[no-untyped-def]
    typingctx, quads, gates, at, gate_stride, d_gates, step, unit, size,
    cells, before, after, dy, dh, dc, row,
):  # fmt: skip
    """One hidden unit, one time step, backward: from ``dh + dy`` and ``dc`` to the gradients of the four
    pre-activations.

    They are written to ``d_gates`` (where ``gates`` has them) for the weight gradients, and to the rows
    ``k * size + unit`` of ``step`` for the next recurrent product. ``dy`` is read at row ``before``.
    """
    n = types.intp
    signature = types.void(quads, gates, n, n, d_gates, step, n, n, cells, n, n, dy, dh, dc, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, (unit, size), (before, after), row = f.rows, arguments[6:8], arguments[9:11], arguments[14]
        one = rows.constant(1.0)

        def times_complement(x: Row) -> Row:  # x (1 - x)
            return rows.mul(x, rows.sub(one, x))

        def offsets(base: ir.Value) -> list[ir.Value]:
            return [b.gep(base, [b.mul(arguments[3], INT(k))]) for k in range(4)]

        i, forget, g, o = (rows.load(p) for p in offsets(f.pointer(1, 2)))
        d_hidden = rows.add(rows.load(f.row(12, row)), rows.load(f.row(11, before)))
        tanh_cell = rows.tanh(rows.load(f.row(8, after)))
        through_tanh = rows.mul(rows.mul(d_hidden, o), rows.sub(one, rows.mul(tanh_cell, tanh_cell)))
        d_cell = rows.add(rows.load(f.row(13, row)), through_tanh)
        d_pre = (
            rows.mul(rows.mul(d_cell, g), times_complement(i)),
            rows.mul(rows.mul(d_cell, rows.load(f.row(8, before))), times_complement(forget)),
            rows.mul(rows.mul(d_cell, i), rows.sub(one, rows.mul(g, g))),
            rows.mul(rows.mul(d_hidden, tanh_cell), times_complement(o)),
        )
        for k, (gradient, p) in enumerate(zip(d_pre, offsets(f.pointer(4, 2)), strict=True)):
            rows.store(gradient, p)
            rows.store(gradient, f.row(5, b.add(unit, b.mul(size, INT(k)))))
        rows.store(rows.mul(d_cell, forget), f.row(13, row))
        return context.get_dummy_value()

    return signature, generate


@kernel
def recur_forward(  # type: ignore[no-untyped-def]
    quads, values, index, starts, ends, lines, bounds, first, last, gates, recurrent, state, cells, hidden, previous
):  # fmt: skip
    """Run the recurrence of one layer, steps ``first <= t < last``.

    gates (P, 4H, w) hold ``W_ih x + b`` on entry and activations on return, ``w // b`` steps a panel; cells and hidden
    (T + 1, H, b) hold the first state at 0, and ``state`` holds it as split rows, of which there are 2 H: the state of
    this step and of the next. ``recurrent``, 4H split rows, is scratch. ``previous`` (panels, H, w) gets the outputs
    from step 0 on, in the gates' layout. Lines are the rows of W_hh; ``bounds`` cut the hidden units, whose four gate
    rows stay together.
    """
    size, batch = hidden.shape[1:]
    width = gates.shape[2]
    together = width // batch
    flat_gates, flat_cells, flat_hidden = gates.reshape(-1), cells.reshape(-1), hidden.reshape(-1)
    flat_previous = previous.reshape(-1)
    for t in range(first, last):
        here = t // together * 4 * size * width + t % together * batch
        after = (t + 1) // together * size * width + (t + 1) % together * batch
        for c in prange(bounds.size - 1):
            for tile in range(starts.shape[0]):
                for j in range(4 * bounds[c], 4 * bounds[c + 1]):
                    gather_row(
                        quads, state, t % 2 * size, values, index, starts[tile, j], ends[tile, j],
                        recurrent, lines[tile, j], tile > 0, values.dtype.type(0),
                    )  # fmt: skip
            for u in range(bounds[c], bounds[c + 1]):
                cell_forward(
                    quads, flat_gates, here + u * width, size * width, recurrent, u, size, flat_cells,
                    t * size + u, (t + 1) * size + u, flat_hidden, state, (t + 1) % 2 * size + u,
                    flat_previous, after + u * width,
                )  # fmt: skip


@kernel
def recur_backward(  # type: ignore[no-untyped-def]
    quads, values, index, starts, ends, lines, bounds, first, last, gates, cells, dy, dh, dc, d_gates, d_step
):  # fmt: skip
    """Run the recurrence backward, steps ``last > t >= first``; "step" −1 is the product that is left at the end.

    Lines are the columns of W_hh. ``dh``, H split rows, and ``dc`` (H, b) hold the gradient of the last state on entry
    and of the first on return; ``d_step``, 8H split rows, is scratch: the pre-activation gradients of this step and of
    the one after it.
    """
    steps, size, batch = dy.shape
    width = gates.shape[2]
    together = width // batch
    flat_gates, flat_d_gates, flat_cells = gates.reshape(-1), d_gates.reshape(-1), cells.reshape(-1)
    flat_dy, flat_dc = dy.reshape(-1), dc.reshape(-1)
    for t in range(last - 1, first - 1, -1):
        here = t // together * 4 * size * width + t % together * batch
        for c in prange(bounds.size - 1):
            if t < steps - 1:
                for tile in range(starts.shape[0]):
                    for j in range(bounds[c], bounds[c + 1]):
                        gather_row(
                            quads, d_step, (t + 1) % 2 * 4 * size, values, index,
                            starts[tile, j], ends[tile, j], dh, lines[tile, j], tile > 0, values.dtype.type(0),
                        )  # fmt: skip
            if t >= 0:
                for u in range(bounds[c], bounds[c + 1]):
                    soon = u + _AHEAD
                    for k in range(4):
                        fetch_row(quads, flat_gates, here + (k * size + soon) * width)
                        fetch_row(quads, flat_d_gates, here + (k * size + soon) * width)
                    fetch_row(quads, flat_cells, (t * size + soon) * batch)
                    fetch_row(quads, flat_cells, ((t + 1) * size + soon) * batch)
                    fetch_row(quads, flat_dy, (t * size + soon) * batch)
                    cell_backward(
                        quads, flat_gates, here + u * width, size * width, flat_d_gates,
                        d_step, t % 2 * 4 * size + u, size,
                        flat_cells, t * size + u, (t + 1) * size + u, flat_dy, dh, flat_dc, u,
                    )  # fmt: skip


class Trace(NamedTuple):
    """What backward needs of the forward pass; a large batch is run in parts of ``b`` columns."""

    x: np.ndarray  # (parts · P, I, w)
    gates: np.ndarray  # (parts · P, 4H, w)
    cells: np.ndarray  # (parts, T + 1, H, b)
    hidden: np.ndarray  # (parts, T + 1, H, b)
    previous: np.ndarray  # (parts · P, H, w)  h_{-1}, ..., h_{T-2} as the gates are laid out
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


def _split_rows(count: int, width: int, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Return room for split rows: an array of their whole registers, and one of the rest if there is any."""
    whole = whole_registers(width, dtype.itemsize)
    return tuple(memory.empty((count, part), dtype) for part in ((whole, width - whole) if whole < width else (whole,)))


def _write_rows(rows: tuple[np.ndarray, ...], source: np.ndarray) -> None:
    """Write an array (n, width) to the first n split rows."""
    at = 0
    for part in rows:
        part[: len(source)] = source[:, at : at + part.shape[1]]
        at += part.shape[1]


def _clear_unused(panels: np.ndarray, count: int, steps: int, width: int) -> None:
    """Zero the columns that no time step fills: at the end of each panel, and of the last of each part's ``count``."""
    together = panels.shape[2] // width
    panels[:, :, together * width :] = 0
    panels[count - 1 :: count, :, (steps - (count - 1) * together) * width :] = 0


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
    product = Product(plan(w_ih.support).rows, w_ih.values, packed, bias)
    gates = product.y
    count, together = len(packed) // parts, gates.shape[2] // width
    cells = memory.empty((parts, steps + 1, size, width), x.dtype)
    hidden = memory.empty((parts, steps + 1, size, width), x.dtype)
    cells[:, 0], hidden[:, 0] = _split(c0, parts, width), _split(h0, parts, width)
    room = steps // together + 1  # the output of the last step is written too
    previous = memory.empty((parts, room, size, gates.shape[2]), x.dtype)
    _clear_unused(previous.reshape(-1, size, gates.shape[2]), room, steps + 1, width)
    previous[:, 0, :, :width] = hidden[:, 0]
    state, recurrent = _split_rows(2 * size, width, x.dtype), _split_rows(4 * size, width, x.dtype)
    rows = plan(w_hh.support).rows
    chunks = _recurrent_chunks(w_hh, width)
    tiles = rows.sorted_tiles(width * x.itemsize, chunks, groups=4)
    values = in_tiles(w_hh.values, tiles)
    bounds = rows.chunks(chunks, groups=4)
    for q in range(parts):
        _write_rows(state, hidden[q, 0])
        for some in _passes(count, gates[0].nbytes):
            product.add(slice(q * count + some.start, q * count + some.stop))
            run(
                recur_forward, quads(width), values, tiles.index, tiles.starts, tiles.ends, tiles.lines, bounds,
                some.start * together, min(some.stop * together, steps), gates[q * count : (q + 1) * count],
                recurrent, state, cells[q], hidden[q], previous[q], alone=chunks == 1,
            )  # fmt: skip
    y = _join(hidden[:, 1:], batch)
    last = _join(hidden[:, -1], batch), _join(cells[:, -1], batch)
    used = previous[:, :count].reshape(-1, size, gates.shape[2])
    return y, *last, Trace(packed, gates, cells, hidden, used, batch)


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
    _clear_unused(d_gates, count, steps, width)
    split_dy, split_dh = _split(dy, parts, width), _split(dh, parts, width)
    split_dc = np.array(_split(dc, parts, width))
    dh0 = memory.empty((parts, size, width), dy.dtype)
    d_state, d_step = _split_rows(size, width, dy.dtype), _split_rows(8 * size, width, dy.dtype)
    columns = plan(w_hh.support).columns
    chunks = _recurrent_chunks(w_hh, width)
    tiles = columns.sorted_tiles(width * dy.itemsize, chunks)
    values = in_tiles(w_hh.values, tiles)
    bounds, together = columns.chunks(chunks), d_gates.shape[2] // width
    product = Backward(w_ih, trace.x) if input_gradient else None
    for q in range(parts):
        own = slice(q * count, (q + 1) * count)
        _write_rows(d_state, split_dh[q])
        for some in reversed(_passes(count, d_gates[0].nbytes)):
            run(
                recur_backward, quads(width), values, tiles.index, tiles.starts, tiles.ends, tiles.lines, bounds,
                some.start * together or -1, min(some.stop * together, steps), trace.gates[own], trace.cells[q],
                split_dy[q], d_state, split_dc[q], d_gates[own], d_step, alone=chunks == 1,
            )  # fmt: skip
            if product is not None:
                product.add(d_gates, slice(q * count + some.start, q * count + some.stop))
        np.concatenate(d_state, axis=1, out=dh0[q])
    dx, dw_ih = None, None
    if product is not None:
        dw_ih = product.gradient()
        shape = (steps, trace.x.shape[1], width)
        unpacked = [panels.unpack(product.dx[q * count : (q + 1) * count], shape) for q in range(parts)]
        dx = _join(unpacked[0][None] if parts == 1 else np.stack(unpacked), trace.batch)
    return LSTMBackward(
        dx,
        _join(dh0, trace.batch),
        _join(split_dc, trace.batch),
        d_gates,
        trace.x,
        trace.previous,
        sum_rows(d_gates),
        dw_ih,
    )


def _passes(count: int, panel_bytes: int) -> list[slice]:
    """Cut a window's panels into passes: what one kernel wrote is still in a near cache when the next reads it."""
    together = max(1, _PASS_BYTES // panel_bytes)
    return [slice(start, min(start + together, count)) for start in range(0, count, together)]


def _recurrent_chunks(w_hh: SparseMatrix, width: int) -> int:
    """One chunk for each thread: they meet after every step, so more of them would only wait more often."""
    flops = 2.0 * w_hh.values.size * width
    return threads.get() if flops > 1e6 else 1
