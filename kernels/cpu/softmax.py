"""Softmax cross-entropy over the rows of panels, for large vocabularies.

Three passes over each panel, which is small enough to stay in a near cache between them: the greatest logit of each
column, the exponentials and their sum, the scaling to the gradient. A row of the panel is a handful of registers, so
the columns' maxima and sums never leave them.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from refimpl.kernels.cpu.panels import MAX_BYTES, pack, unpack
from refimpl.kernels.cpu.rows import Frame
from refimpl.kernels.cpu.runtime import kernel, run
from refimpl.kernels.cpu.vector import INT, QUAD, Row, for_range, quads

_SUMMED_TOGETHER = (
    64  # exponentials added up before they join the column's sum: keeps the rounding error of a long sum small
)


@intrinsic
def columns_max(typingctx, quads, z, at, stride, count, out, to):  # type: ignore[no-untyped-def]
    """``out[to : + width] = max over i < count of z[at + i * stride : + width]``."""
    n = types.intp
    signature = types.void(quads, z, n, n, n, out, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, z, stride, count = f.rows, f.pointer(1, 2), arguments[3], arguments[4]

        def one(i: ir.Value, top: Row) -> Row:
            return rows.maximum(top, rows.load(b.gep(z, [b.mul(i, stride)])))

        _, top = for_range(b, INT(1), count, 1, rows.load(z), one)
        rows.store(top, f.pointer(5, 6))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def exponentials(typingctx, quads, z, at, stride, count, top, mass, state):  # type: ignore[no-untyped-def]
    """``z = exp(z - top)`` on ``count`` rows, whose sum is added to ``mass``; top and mass are at ``state``."""
    n = types.intp
    signature = types.void(quads, z, n, n, n, top, mass, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, z, stride, count = f.rows, f.pointer(1, 2), arguments[3], arguments[4]
        top = rows.load(f.pointer(5, 7))

        def one(i: ir.Value, total: Row) -> Row:
            at = b.gep(z, [b.mul(i, stride)])
            e = rows.exp(rows.sub(rows.load(at), top))
            rows.store(e, at)
            return rows.add(total, e)

        _, total = for_range(b, INT(0), count, 1, rows.zero(), one)
        mass = f.pointer(6, 7)
        rows.store(rows.add(rows.load(mass), total), mass)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def scale_rows(typingctx, quads, z, at, stride, count, factor, state):  # type: ignore[no-untyped-def]
    """``z = z * factor`` on ``count`` rows."""
    n = types.intp
    signature = types.void(quads, z, n, n, n, factor, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, z, stride, count = f.rows, f.pointer(1, 2), arguments[3], arguments[4]
        factor = rows.load(f.pointer(5, 6))

        def one(i: ir.Value, _: Row) -> Row:
            at = b.gep(z, [b.mul(i, stride)])
            rows.store(rows.mul(rows.load(at), factor), at)
            return []

        for_range(b, INT(0), count, 1, [], one)
        return context.get_dummy_value()

    return signature, generate


@kernel
def softmax(quads, z, panel_stride, row_stride, size, targets, state, losses, scale):  # type: ignore[no-untyped-def]
    """Turn logits into gradients: row ``i`` of panel ``p`` is ``z[p * panel_stride + i * row_stride : + w]``.

    targets (P, w); losses (P,) get each panel's sum; state (3, P, w) is scratch: greatest logit, sum of exponentials
    and factor of each column.
    """
    panels, width = targets.shape
    top, mass, factor = state[0], state[1], state[2]
    flat_top, flat_mass, flat_factor = top.reshape(-1), mass.reshape(-1), factor.reshape(-1)
    for p in prange(panels):
        start, at = p * panel_stride, p * width
        total = 0.0
        columns_max(quads, z, start, row_stride, size, flat_top, at)
        for b in range(width):
            target = targets[p, b]
            mass[p, b] = 0
            if target >= 0:
                total -= np.float64(z[start + target * row_stride + b] - top[p, b])
        for i in range(0, size, _SUMMED_TOGETHER):
            count = min(_SUMMED_TOGETHER, size - i)
            exponentials(quads, z, start + i * row_stride, row_stride, count, flat_top, flat_mass, at)
        for b in range(width):
            factor[p, b] = 0
            if targets[p, b] >= 0:
                factor[p, b] = scale / mass[p, b]
                total += np.log(np.float64(mass[p, b]))
        losses[p] = total
        scale_rows(quads, z, start, row_stride, size, flat_factor, at)
        for b in range(width):
            if targets[p, b] >= 0:
                z[start + targets[p, b] * row_stride + b] -= scale


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray, scale: float) -> float:
    """Return the summed loss, and the gradient in place; see :func:`refimpl.kernels.spec.softmax_cross_entropy`."""
    z, columns = logits, targets
    if not (z.strides[2] == z.itemsize and z.shape[2] % QUAD == 0 and z.shape[2] * z.itemsize <= MAX_BYTES):
        z = pack(logits)
        columns = pack(targets[:, None, :], fill=-1, itemsize=z.itemsize)[:, 0, :]
    panels, size, width = z.shape
    panel_stride, row_stride = z.strides[0] // z.itemsize, z.strides[1] // z.itemsize
    if z.flags.c_contiguous:
        flat = z.reshape(-1)
    else:  # panels of a dense decoder lie side by side
        extent = sum((n - 1) * stride for n, stride in zip(z.shape, z.strides, strict=True)) // z.itemsize + 1
        flat = np.lib.stride_tricks.as_strided(z, (extent,), (z.itemsize,))
    losses = np.empty(panels)
    run(
        softmax, quads(width), flat, panel_stride, row_stride, size, columns, np.empty((3, panels, width), z.dtype),
        losses, z.dtype.type(scale), alone=panels == 1,
    )  # fmt: skip
    if z is not logits:
        logits[...] = unpack(z, logits.shape)
    return float(losses.sum())
