"""Softmax cross-entropy over the rows of panels, for large vocabularies.

Three passes over each panel, which is small enough to stay in a near cache between them: the greatest logit of each column, the exponentials and
their sum, the scaling to the gradient. A row of the panel is a handful of registers, so the columns' maxima and sums never leave them.
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

_SUMMED_TOGETHER = 64  # exponentials added up before they join the column's sum: keeps the rounding error of a long sum small


@intrinsic
def columns_max(typingctx, quads, z, at, count, out, to):  # type: ignore[no-untyped-def]
    """``out[to : + width] = max over i < count of z[at + i * width : + width]``."""
    n = types.intp
    signature = types.void(quads, z, n, n, out, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, z = f.rows, f.pointer(1, 2)
        _, top = for_range(b, INT(1), arguments[3], 1, rows.load(z), lambda i, top: rows.maximum(top, rows.load(_row(f, z, i))))
        rows.store(top, f.pointer(4, 5))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def exponentials(typingctx, quads, z, at, count, top, mass, state):  # type: ignore[no-untyped-def]
    """``z = exp(z - top)`` on ``count`` rows, whose sum is added to ``mass``; top and mass are at ``state``."""
    n = types.intp
    signature = types.void(quads, z, n, n, top, mass, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, z, top = f.rows, f.pointer(1, 2), f.rows.load(f.pointer(4, 6))

        def one(i: ir.Value, total: Row) -> Row:
            at = _row(f, z, i)
            e = rows.exp(rows.sub(rows.load(at), top))
            rows.store(e, at)
            return rows.add(total, e)

        _, total = for_range(b, INT(0), arguments[3], 1, rows.zero(), one)
        mass = f.pointer(5, 6)
        rows.store(rows.add(rows.load(mass), total), mass)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def scale_rows(typingctx, quads, z, at, count, factor, state):  # type: ignore[no-untyped-def]
    """``z = z * factor`` on ``count`` rows."""
    n = types.intp
    signature = types.void(quads, z, n, n, factor, n)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, z, factor = f.rows, f.pointer(1, 2), f.rows.load(f.pointer(4, 5))

        def one(i: ir.Value, _: Row) -> Row:
            at = _row(f, z, i)
            rows.store(rows.mul(rows.load(at), factor), at)
            return []

        for_range(b, INT(0), arguments[3], 1, [], one)
        return context.get_dummy_value()

    return signature, generate


def _row(f: Frame, base: ir.Value, i: ir.Value) -> ir.Value:
    offset, lanes = f.rows.cuts[-1]
    return f.b.gep(base, [f.b.mul(i, INT(offset + lanes))])


@kernel
def softmax(quads, z, targets, top, mass, chosen, factor, scale):  # type: ignore[no-untyped-def]
    """Turn logits z (P, V, w) into gradients; targets, top, mass, chosen, factor (P, w)."""
    panels, size, width = z.shape
    flat, flat_top, flat_mass, flat_factor = z.reshape(-1), top.reshape(-1), mass.reshape(-1), factor.reshape(-1)
    for p in prange(panels):
        start, state = p * size * width, p * width
        columns_max(quads, flat, start, size, flat_top, state)
        for b in range(width):
            mass[p, b] = 0
            chosen[p, b] = z[p, targets[p, b], b] - top[p, b] if targets[p, b] >= 0 else 0
        for i in range(0, size, _SUMMED_TOGETHER):
            exponentials(quads, flat, start + i * width, min(_SUMMED_TOGETHER, size - i), flat_top, flat_mass, state)
        for b in range(width):
            factor[p, b] = scale / mass[p, b] if targets[p, b] >= 0 else 0
        scale_rows(quads, flat, start, size, flat_factor, state)
        for b in range(width):
            if targets[p, b] >= 0:
                z[p, targets[p, b], b] -= scale


def softmax_cross_entropy(logits: np.ndarray, targets: np.ndarray, scale: float) -> float:
    """Return the summed loss, and the gradient in place; see :func:`refimpl.kernels.spec.softmax_cross_entropy`."""
    z, columns = logits, targets
    if not (z.flags.c_contiguous and z.shape[2] % QUAD == 0 and z.shape[2] * z.itemsize <= MAX_BYTES):
        z = pack(logits)
        columns = pack(targets[:, None, :], fill=-1, itemsize=z.itemsize)[:, 0, :]
    top, mass, chosen, factor = (np.empty(columns.shape, z.dtype) for _ in range(4))
    run(softmax, quads(z.shape[2]), z, columns, top, mass, chosen, factor, z.dtype.type(scale))
    if z is not logits:
        logits[...] = unpack(z, logits.shape)
    counts = columns >= 0
    return float((np.log(mass[counts].astype(np.float64)) - chosen[counts].astype(np.float64)).sum())
