"""The row kernels that every sparse product is made of.

Each reads one line of a sparse matrix, the entries ``start <= k < end`` with columns ``index[k]``, and one row of a
panel for each of them; the row that accumulates stays in registers. For each non-zero and each vector of 16 numbers
that is one vector load, one fused multiply–add, and a share of the load of the value and the index: with the panel in
the level-1 cache the load port is the limit, at two vectors a cycle.

Panels are flat arrays: row ``j`` starts at ``base + j * stride``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.kernels.cpu.vector import INT, QUAD, Row, Rows, for_range

_ACCUMULATORS = 24  # registers that may hold partial sums, of the 32 that there are


class Frame:
    """The arguments of one row kernel, as LLVM values, with the width that the quads' type tells."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple) -> None:
        self.b = builder
        self.args = arguments
        self.types = signature.args
        self.context = context
        element = ir.FloatType() if self.types[1].dtype == types.float32 else ir.DoubleType()
        self.rows = Rows(builder, element, QUAD * len(self.types[0]))

    def pointer(self, position: int, offset: int | None = None) -> ir.Value:
        """Return the address of an array argument's first element, moved on by another argument."""
        array = self.context.make_array(self.types[position])(self.context, self.b, self.args[position])
        return array.data if offset is None else self.b.gep(array.data, [self.args[offset]])

    def initial(self, out: ir.Value, add: ir.Value, otherwise: Row) -> Row:
        """Return what a sum starts from: the row that ``out`` holds if ``add``, else another."""
        return [self.b.select(add, held, other) for held, other in zip(self.rows.load(out), otherwise, strict=True)]

    def index(self, pointer: ir.Value, k: ir.Value) -> ir.Value:
        """Read an index of any width."""
        return self.b.zext(self.b.load(self.b.gep(pointer, [k])), INT)


@intrinsic
def gather_row(typingctx, quads, x, base, stride, values, index, start, end, out, to, add, offset):  # type: ignore[no-untyped-def]
    """``out[to : to + width] = offset + sum over k of values[k] * x[base + index[k] * stride : + width]``.

    Where ``add`` is true, what ``out`` holds stands for the offset. Four non-zeros are added up independently, where
    there are registers for it, so that each multiply–add need not wait for the one before.
    """
    size = types.intp
    signature = types.void(quads, x, size, size, values, index, size, size, out, size, types.boolean, values.dtype)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, stride, start, end = f.rows, arguments[3], arguments[6], arguments[7]
        x, values, index = f.pointer(1, 2), f.pointer(4), f.pointer(5)
        out = f.pointer(8, 9)
        n = len(rows.cuts)
        unroll = next(u for u in (4, 2, 1) if u * n <= _ACCUMULATORS or u == 1)

        def one(k: ir.Value, row: Row) -> Row:
            at = b.gep(x, [b.mul(f.index(index, k), stride)])
            return rows.fma(rows.splat(b.load(b.gep(values, [k]))), rows.load(at), row)

        def several(k: ir.Value, state: Row) -> Row:
            return [v for u in range(unroll) for v in one(b.add(k, INT(u)), state[u * n : (u + 1) * n])]

        first = f.initial(out, arguments[10], rows.splat(arguments[11]))
        k, state = for_range(b, start, end, unroll, first + rows.zero() * (unroll - 1), several)
        partial = [state[u * n : (u + 1) * n] for u in range(unroll)]
        while len(partial) > 1:
            partial = [rows.add(partial[u], partial[u + 1]) for u in range(0, len(partial), 2)]
        if unroll > 1:
            _, total = for_range(b, k, end, 1, partial[0], one)
        else:
            total = partial[0]
        rows.store(total, out)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def dot_row(typingctx, quads, x, base, stride, y, at, index, start, end, out, add):  # type: ignore[no-untyped-def]
    """``out[k] (+)= <y[at : at + width], x[base + index[k] * stride : + width]>`` for each ``k``, four at a time."""
    size = types.intp
    signature = types.void(quads, x, size, size, y, size, index, size, size, out, types.boolean)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, stride, start, end = f.rows, arguments[3], arguments[7], arguments[8]
        x, index, out = f.pointer(1, 2), f.pointer(6), f.pointer(9)
        fixed = rows.load(f.pointer(4, 5))

        def product(k: ir.Value) -> ir.Value:
            return rows.dot(fixed, rows.load(b.gep(x, [b.mul(f.index(index, k), stride)])))

        k, _ = for_range(
            b,
            start,
            end,
            4,
            [],
            lambda k, state: _store4(f, [product(b.add(k, INT(u))) for u in range(4)], out, k, arguments[10]),
        )
        for_range(b, k, end, 1, [], lambda k, state: _store1(f, product(k), out, k, arguments[10]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def gather_dot_row(typingctx, quads, y, base, stride, x, at, values, index, start, end, grad, add_grad, out, to, add):  # type: ignore[no-untyped-def]
    """Both backward products of one column: each row of ``y`` is loaded once and used twice.

    ``out[to : + width] (+)= sum over k of values[k] * y[base + index[k] * stride : + width]`` and
    ``grad[k] (+)= <x[at : + width], y[base + index[k] * stride : + width]>``.
    """
    size = types.intp
    signature = types.void(
        quads, y, size, size, x, size, values, index, size, size, grad, types.boolean, out, size, types.boolean
    )

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, stride, start, end = f.rows, arguments[3], arguments[8], arguments[9]
        y, values, index, grad = f.pointer(1, 2), f.pointer(6), f.pointer(7), f.pointer(10)
        out = f.pointer(12, 13)
        fixed = rows.load(f.pointer(4, 5))

        def one(k: ir.Value, row: Row) -> tuple[Row, ir.Value]:
            loaded = rows.load(b.gep(y, [b.mul(f.index(index, k), stride)]))
            return rows.fma(rows.splat(b.load(b.gep(values, [k]))), loaded, row), rows.dot(fixed, loaded)

        def four(k: ir.Value, row: Row) -> Row:
            products = []
            for u in range(4):
                row, product = one(b.add(k, INT(u)), row)
                products.append(product)
            _store4(f, products, grad, k, arguments[11])
            return row

        def single(k: ir.Value, row: Row) -> Row:
            row, product = one(k, row)
            _store1(f, product, grad, k, arguments[11])
            return row

        first = f.initial(out, arguments[14], rows.zero())
        k, row = for_range(b, start, end, 4, first, four)
        _, row = for_range(b, k, end, 1, row, single)
        rows.store(row, out)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def row_sum(typingctx, quads, x, at):  # type: ignore[no-untyped-def]
    """Return the sum of ``x[at : at + width]``."""
    signature = x.dtype(quads, x, types.intp)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        row = f.rows.load(f.pointer(1, 2))
        return f.rows.sum(f.rows.dot(row, f.rows.constant(1.0)))

    return signature, generate


def _store4(f: Frame, products: list[ir.Value], out: ir.Value, k: ir.Value, add: ir.Value) -> Row:
    sums = f.rows.sum4(*products)
    at = f.b.bitcast(f.b.gep(out, [k]), sums.type.as_pointer())
    held = f.b.load(at)
    held.align = f.rows.bytes
    f.b.store(f.b.select(add, f.b.fadd(held, sums), sums), at).align = f.rows.bytes
    return []


def _store1(f: Frame, product: ir.Value, out: ir.Value, k: ir.Value, add: ir.Value) -> Row:
    total = f.rows.sum(product)
    at = f.b.gep(out, [k])
    f.b.store(f.b.select(add, f.b.fadd(f.b.load(at), total), total), at)
    return []
