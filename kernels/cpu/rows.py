"""The row kernels that every sparse product is made of.

Each reads one line of a sparse matrix, the entries ``start <= k < end`` with columns ``index[k]``, and one row of a
panel for each of them; the row that accumulates stays in registers. What it costs: for each non-zero, one vector load
and one fused multiply–add for every 16 numbers of the row, and a share of the loads of the value and the index. The
bound is the load port, at two vectors a cycle from the level-1 cache (a row of 80 float32: 5 loads and a quarter, 2.6
cycles, 61 operations a cycle), one vector in about 1.3 cycles from the level-2 cache (6.5 cycles, 25 operations a
cycle); tiles (see :mod:`refimpl.kernels.cpu.plan`) are there to stay on the near side. The fused backward kernel uses
each load twice.

Rows are numbered: row ``i`` of a flat array starts at ``i * width``, and of a pair of arrays (a split row, see
:mod:`refimpl.kernels.cpu.vector`) in both. Of images (``*_pixels``), where a row may begin at any pixel, it is told by
its first number, and the index counts pixels of ``unit`` numbers. A flag given as a literal is settled when the kernel
is compiled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from refimpl.kernels.cpu.vector import INT, INT32, QUAD, REGISTER_BYTES, Place, Row, Rows, for_range

_SPLIT: Any = types.BaseTuple  # the type of a pair of arrays
_REGISTERS = {True: 32, False: 16}  # with and without AVX-512
_IN_FLIGHT = 8  # multiply–adds: two begin in a cycle, and take four


class Frame:
    """The arguments of one row kernel, as LLVM values, with the width that the quads' type tells.

    Rows are numbered; or, if the last argument is to be a unit, told by their first number.
    """

    def __init__(
        self, context: Any, builder: ir.IRBuilder, signature: Any, arguments: tuple, *, pixels: bool = False
    ) -> None:
        self.b = builder
        self.args = arguments
        self.types = signature.args
        self.context = context
        first = self.types[1]
        dtype = (first[0] if isinstance(first, _SPLIT) else first).dtype
        element = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
        self.wide = "+avx512f" in context.codegen()._tm_features
        self.rows = Rows(builder, element, QUAD * len(self.types[0]), hide=self.wide)
        self.unit = arguments[-1] if pixels else None

    def pointer(self, position: int, offset: int | None = None) -> ir.Value:
        """Return the address of an array argument's first element, moved on by another argument."""
        pointer = self._data(self.types[position], self.args[position])
        return pointer if offset is None else self.b.gep(pointer, [self.args[offset]])

    def row(self, position: int, number: ir.Value) -> Place:
        """Return the place of a numbered row of an array argument, or of a pair of arrays."""
        kind, value, rows = self.types[position], self.args[position], self.rows
        if self.unit is not None:
            return (self.b.gep(self._data(kind, value), [number]),)
        if not isinstance(kind, _SPLIT):
            return (self.b.gep(self._data(kind, value), [self.b.mul(number, INT(rows.width))]),)
        parts = [(0, rows.whole)] if len(kind) == 1 else [(0, rows.whole), (1, rows.width - rows.whole)]
        return tuple(
            self.b.gep(self._data(kind[k], self.b.extract_value(value, k)), [self.b.mul(number, INT(width))])
            for k, width in parts
        )

    def gathered(self, position: int, base: ir.Value, index: ir.Value, k: ir.Value) -> Place:
        """Return the place of the row that entry ``k`` of an index names, counted from ``base``."""
        place = self.index(index, k)
        return self.row(position, self.b.add(base, place if self.unit is None else self.b.mul(place, self.unit)))

    def _data(self, kind: Any, value: ir.Value) -> ir.Value:
        return self.context.make_array(kind)(self.context, self.b, value).data

    def either(self, flag: int, yes: Row, no: Row) -> Row:
        """Return one of two rows, as a flag among the arguments says."""
        if isinstance(self.types[flag], types.Literal):
            return yes if self.types[flag].literal_value else no
        return [self.b.select(self.args[flag], one, other) for one, other in zip(yes, no, strict=True)]

    def index(self, pointer: ir.Value, k: ir.Value) -> ir.Value:
        """Read an index of any width."""
        return self.b.zext(self.b.load(self.b.gep(pointer, [k])), INT)

    def unrolled(self) -> tuple[int, int]:
        """Return how many non-zeros to read in one turn of a loop, and into how many sums to add them: as many as keep
        both adders busy until a sum is there, where there are registers for it.
        """
        held = len(self.rows.cuts) * (1 if self.wide else 2)
        sums = next(u for u in (8, 4, 2, 1) if u * held <= _REGISTERS[self.wide] * 5 // 8 or u == 1)
        return max(sums, 4), next(u for u in (1, 2, 4, 8) if u == sums or u * held >= _IN_FLIGHT)


@intrinsic(prefer_literal=True)
def gather_row(typingctx, quads, x, base, values, index, start, end, out, to, add, offset):  # type: ignore[no-untyped-def]
    """``out[to] = offset + sum over k of values[k] * x[base + index[k]]``, all of them rows.

    If ``add``, what ``out`` holds stands for the offset. Several non-zeros are added up independently, where there are
    registers for it, so that each multiply–add need not wait for the one before; their values are one load.
    """
    size = types.intp
    signature = types.void(quads, x, size, values, index, size, size, out, size, _flag(add), values.dtype)
    return signature, _gather(pixels=False)


@intrinsic(prefer_literal=True)
def gather_pixels(typingctx, quads, x, base, values, index, start, end, out, to, add, offset, unit):  # type: ignore[no-untyped-def]
    """``out[to] = offset + sum over k of values[k] * x[base + unit * index[k]]``, of rows that begin there."""
    size = types.intp
    signature = types.void(quads, x, size, values, index, size, size, out, size, _flag(add), values.dtype, size)
    return signature, _gather(pixels=True)


def _gather(pixels: bool) -> Any:
    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments, pixels=pixels)
        rows, base, start, end = f.rows, arguments[2], arguments[5], arguments[6]
        values, index = f.pointer(3), f.pointer(4)
        out = f.row(7, arguments[8])
        n, (unroll, sums) = len(rows.cuts), f.unrolled()

        def product(k: ir.Value, value: Row, row: Row) -> Row:
            return rows.fma(value, rows.load(f.gathered(1, base, index, k)), row)

        def one(k: ir.Value, row: Row) -> Row:
            return product(k, rows.splat(b.load(b.gep(values, [k]))), row)

        def several(k: ir.Value, state: Row) -> Row:
            held = rows.load_scalars(b.gep(values, [k]), unroll)
            partial = [state[s * n : (s + 1) * n] for s in range(sums)]
            for u in range(unroll):
                partial[u % sums] = product(b.add(k, INT(u)), rows.splat_lane(held, u), partial[u % sums])
            return [v for row in partial for v in row]

        first = f.either(9, rows.load(out), rows.splat(arguments[10]))
        k, state = for_range(b, start, end, unroll, first + rows.zero() * (sums - 1), several)
        partial = [state[s * n : (s + 1) * n] for s in range(sums)]
        while len(partial) > 1:
            partial = [rows.add(partial[u], partial[u + 1]) for u in range(0, len(partial), 2)]
        _, total = for_range(b, k, end, 1, partial[0], one)
        rows.store(total, out)
        return context.get_dummy_value()

    return generate


@intrinsic(prefer_literal=True)
def dot_row(typingctx, quads, x, base, y, at, index, start, end, out, add):  # type: ignore[no-untyped-def]
    """``out[k] (+)= <y[at], x[base + index[k]]>`` for each ``k``, four at a time; ``at`` and ``base + index[k]`` are
    rows.
    """
    size = types.intp
    return types.void(quads, x, size, y, size, index, size, size, out, _flag(add)), _dot(pixels=False)


@intrinsic(prefer_literal=True)
def dot_pixels(typingctx, quads, x, base, y, at, index, start, end, out, add, unit):  # type: ignore[no-untyped-def]
    """``out[k] (+)= <y[at], x[base + unit * index[k]]>`` for each ``k``, of rows that begin there."""
    size = types.intp
    return types.void(quads, x, size, y, size, index, size, size, out, _flag(add), size), _dot(pixels=True)


def _dot(pixels: bool) -> Any:
    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments, pixels=pixels)
        rows, base, start, end = f.rows, arguments[2], arguments[6], arguments[7]
        index, out = f.pointer(5), f.pointer(8)
        fixed = rows.load(f.row(3, arguments[4]))

        def product(k: ir.Value) -> ir.Value:
            return rows.dot(fixed, rows.load(f.gathered(1, base, index, k)))

        def four(k: ir.Value, state: Row) -> Row:
            return _store(f, rows.sum4(*(product(b.add(k, INT(u))) for u in range(4))), out, k, 9)

        k, _ = for_range(b, start, end, 4, [], four)
        for_range(b, k, end, 1, [], lambda k, state: _store(f, rows.sum(product(k)), out, k, 9))
        return context.get_dummy_value()

    return generate


@intrinsic(prefer_literal=True)
def gather_dot_row(typingctx, quads, y, base, x, at, values, index, start, end, grad, add_grad, out, add):  # type: ignore[no-untyped-def]
    """Both backward products of one column: each row of ``y`` is loaded once and used twice.

    ``out[at] (+)= sum over k of values[k] * y[base + index[k]]`` and ``grad[k] (+)= <x[at], y[base + index[k]]>``.
    """
    size, flags = types.intp, (_flag(add_grad), _flag(add))
    signature = types.void(quads, y, size, x, size, values, index, size, size, grad, flags[0], out, flags[1])
    return signature, _gather_dot(pixels=False)


@intrinsic(prefer_literal=True)
def gather_dot_moved_row(typingctx, quads, y, x, at, values, index, start, end, grad, out, add, source):  # type: ignore[no-untyped-def]
    """:func:`gather_dot_row` where the entry ``k`` has its value and gradient at ``source[k]``: the first is read and
    the second written there, while the multiply–adds of other entries go on.
    """
    size = types.intp
    signature = types.void(quads, y, x, size, values, index, size, size, grad, out, _flag(add), source)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, start, end = f.rows, arguments[6], arguments[7]
        values, index, grad, source = f.pointer(4), f.pointer(5), f.pointer(8), f.pointer(11)
        fixed, out = rows.load(f.row(2, arguments[3])), f.row(9, arguments[3])

        def one(k: ir.Value, row: Row) -> tuple[Row, ir.Value, ir.Value]:
            place = f.index(source, k)
            loaded = rows.load(f.row(1, f.index(index, k)))
            value = rows.splat(b.load(b.gep(values, [place])))
            return rows.fma(value, loaded, row), rows.dot(fixed, loaded), b.gep(grad, [place])

        def four(k: ir.Value, row: Row) -> Row:
            products, places = [], []
            for u in range(4):
                row, product, place = one(b.add(k, INT(u)), row)
                products.append(product)
                places.append(place)
            sums = rows.sum4(*products)
            for u, place in enumerate(places):
                b.store(b.extract_element(sums, INT32(u)), place)
            return row

        def single(k: ir.Value, row: Row) -> Row:
            row, product, place = one(k, row)
            b.store(rows.sum(product), place)
            return row

        first = f.either(10, rows.load(out), rows.zero())
        k, row = for_range(b, start, end, 4, first, four)
        _, row = for_range(b, k, end, 1, row, single)
        rows.store(row, out)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def gather_dot_pixels(typingctx, quads, y, base, x, at, values, index, start, end, grad, add_grad, out, add, to, unit):  # type: ignore[no-untyped-def]
    """``out[to] (+)= sum over k of values[k] * y[base + unit * index[k]]`` and
    ``grad[k] (+)= <x[at], y[base + unit * index[k]]>``, of rows that begin there.
    """
    size, flags = types.intp, (_flag(add_grad), _flag(add))
    signature = types.void(
        quads, y, size, x, size, values, index, size, size, grad, flags[0], out, flags[1], size, size
    )
    return signature, _gather_dot(pixels=True)


def _gather_dot(pixels: bool) -> Any:
    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments, pixels=pixels)
        rows, base, start, end = f.rows, arguments[2], arguments[7], arguments[8]
        values, index, grad = f.pointer(5), f.pointer(6), f.pointer(9)
        out = f.row(11, arguments[13 if pixels else 4])
        fixed = rows.load(f.row(3, arguments[4]))

        def one(k: ir.Value, value: Row, row: Row) -> tuple[Row, ir.Value]:
            loaded = rows.load(f.gathered(1, base, index, k))
            return rows.fma(value, loaded, row), rows.dot(fixed, loaded)

        def four(k: ir.Value, row: Row) -> Row:
            held = rows.load_scalars(b.gep(values, [k]), 4)
            products = []
            for u in range(4):
                row, product = one(b.add(k, INT(u)), rows.splat_lane(held, u), row)
                products.append(product)
            _store(f, rows.sum4(*products), grad, k, 10)
            return row

        def single(k: ir.Value, row: Row) -> Row:
            row, product = one(k, rows.splat(b.load(b.gep(values, [k]))), row)
            _store(f, rows.sum(product), grad, k, 10)
            return row

        first = f.either(12, rows.load(out), rows.zero())
        k, row = for_range(b, start, end, 4, first, four)
        _, row = for_range(b, k, end, 1, row, single)
        rows.store(row, out)
        return context.get_dummy_value()

    return generate


def _flag(given: Any) -> Any:
    """Return the type of a flag: settled at compile time if it is a literal."""
    return given if isinstance(given, types.Literal) else types.boolean


@intrinsic
def scatter_dot_row(typingctx, quads, dy, at, values, index, start, end, x, dx, grad):  # type: ignore[no-untyped-def]
    """Both backward products of a row: ``dx[index[k]] += values[k] * dy[at]``, ``grad[k] = <dy[at], x[index[k]]>``."""
    size = types.intp
    signature = types.void(quads, dy, size, values, index, size, size, x, dx, grad)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        rows, start, end = f.rows, arguments[5], arguments[6]
        values, index, grad = f.pointer(3), f.pointer(4), f.pointer(9)
        fixed = rows.load(f.row(1, arguments[2]))

        def one(k: ir.Value) -> ir.Value:
            j = f.index(index, k)
            place = f.row(8, j)
            rows.store(rows.fma(rows.splat(b.load(b.gep(values, [k]))), fixed, rows.load(place)), place)
            return rows.dot(fixed, rows.load(f.row(7, j)))

        def write(k: ir.Value, sums: ir.Value) -> Row:
            b.store(sums, b.bitcast(b.gep(grad, [k]), sums.type.as_pointer())).align = rows.bytes
            return []

        k, _ = for_range(
            b, start, end, 4, [], lambda k, _: write(k, rows.sum4(*(one(b.add(k, INT(u))) for u in range(4))))
        )
        for_range(b, k, end, 1, [], lambda k, _: write(k, rows.sum(one(k))))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fetch(typingctx, values, index, k):  # type: ignore[no-untyped-def]
    """Ask for the values and indices from entry ``k`` on, some fifty of them, to be brought into the level-1 cache.

    The lines of a tile that lie apart from each other are too short for the processor to see where the next begins.
    """
    signature = types.void(values, index, types.intp)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        for array, kind_of, lines in zip(arguments, signature.args, (3, 2), strict=False):
            start = context.make_array(kind_of)(context, b, array).data
            at = b.bitcast(b.gep(start, [arguments[2]]), ir.IntType(8).as_pointer())
            for line in range(lines):
                _prefetch(b, b.gep(at, [INT(line * REGISTER_BYTES)]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fetch_row(typingctx, quads, x, at):  # type: ignore[no-untyped-def]
    """Ask for the row of ``x`` that begins at number ``at`` to be brought near; beyond the end nothing happens."""
    signature = types.void(quads, x, types.intp)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        for offset in range(0, f.rows.width * f.rows.bytes, REGISTER_BYTES):
            _prefetch(b, b.gep(f.pointer(1, 2), [INT(offset // f.rows.bytes)]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def fetch_rows(typingctx, quads, x, first, last):  # type: ignore[no-untyped-def]
    """Ask for the rows ``first`` up to ``last`` of ``x`` to be brought into the level-2 cache; beyond the end nothing
    happens.
    """
    signature = types.void(quads, x, types.intp, types.intp)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)

        def one(r: ir.Value, state: Row) -> Row:
            (place,) = f.row(1, r)
            for offset in range(0, f.rows.width * f.rows.bytes, REGISTER_BYTES):
                _prefetch(b, b.gep(place, [INT(offset // f.rows.bytes)]), level=2)
            return []

        for_range(b, arguments[2], arguments[3], 1, [], one)
        return context.get_dummy_value()

    return signature, generate


def _prefetch(b: ir.IRBuilder, pointer: ir.Value, level: int = 1) -> None:
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
    name = "llvm.prefetch.p0"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [b.bitcast(pointer, byte), INT32(0), INT32(4 - level), INT32(1)])


@intrinsic
def copy_row(typingctx, quads, x, at, out, to):  # type: ignore[no-untyped-def]
    """``out[to : to + width] = x[at : at + width]``, single numbers being counted."""
    size = types.intp
    signature = types.void(quads, x, size, out, size)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        f.rows.store(f.rows.load(f.pointer(1, 2)), f.pointer(3, 4))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def row_sum(typingctx, quads, x, at):  # type: ignore[no-untyped-def]
    """Return the sum of row ``at`` of ``x``."""
    signature = x.dtype(quads, x, types.intp)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        f = Frame(context, b, signature, arguments)
        row = f.rows.load(f.row(1, arguments[2]))
        return f.rows.sum(f.rows.dot(row, f.rows.constant(1.0)))

    return signature, generate


def _store(f: Frame, sums: ir.Value, out: ir.Value, k: ir.Value, add: int) -> Row:
    """Write one sum, or a vector of sums, to ``out[k]``; or add to it, as a flag among the arguments says."""
    at = f.b.bitcast(f.b.gep(out, [k]), sums.type.as_pointer())
    held = f.b.load(at)
    held.align = f.rows.bytes
    (total,) = f.either(add, [f.b.fadd(held, sums)], [sums])
    f.b.store(total, at).align = f.rows.bytes
    return []
