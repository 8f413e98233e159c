"""Vector code on stretches of memory of any length, where a row of :mod:`refimpl.kernels.cpu.vector` has one width.

The rows of an image (width times batch numbers that follow each other) are such stretches, and so is a whole channel of
images without a margin. Arrays are addresses here: one form of a kernel serves images with and without a margin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from refimpl.kernels.cpu.vector import INT, INT32, REGISTER_BYTES, for_range, shuffle, splat

Values = list[ir.Value]

_DOUBLE = ir.DoubleType()
_BLOCK = 8  # vectors that are added up in the arrays' own type
_UNROLLED = 2  # vectors at a time where nothing is summed


class Stretch:
    """Some neighbouring numbers at one place of several arrays.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
    element : llvmlite.ir.FloatType or DoubleType
    lanes : int
        How many numbers.
    rows : list of llvmlite.ir.Value
        Where each array's row starts.
    at : llvmlite.ir.Value
        The first number's place in the row.
    """

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, lanes: int, rows: Values, at: ir.Value) -> None:
        self.b = builder
        self.kind = ir.VectorType(element, lanes)
        self.rows = rows
        self.at = at
        self.bytes = 4 if isinstance(element, ir.FloatType) else 8

    def load(self, array: int) -> ir.Value:
        """Read the numbers of one array."""
        value = self.b.load(self._place(array))
        value.align = self.bytes
        return value

    def store(self, value: ir.Value, array: int) -> None:
        """Write the numbers of one array."""
        self.b.store(value, self._place(array)).align = self.bytes

    def _place(self, array: int) -> ir.Value:
        return self.b.bitcast(self.b.gep(self.rows[array], [self.at]), self.kind.as_pointer())

    def splat(self, scalar: ir.Value) -> ir.Value:
        """Return a vector of one scalar."""
        return splat(self.b, scalar, self.kind.count)

    def rectified(self, of: ir.Value, vector: ir.Value) -> ir.Value:
        """Return 0 where ``of`` is 0 or below, and the vector elsewhere."""
        zero = ir.Constant(self.kind, [0.0] * self.kind.count)
        return self.b.select(self.b.fcmp_ordered("<=", of, zero), zero, vector)


Body = Callable[[Stretch, Values], Values]
"""``body(stretch, sums) -> sums``: what is done at each place. The sums are vectors as long as the stretch."""


class Walk:
    """All places of one channel of some arrays: vectors of whole registers, then what is left of each row.

    Sums over the channel are formed in float64, of partial sums of a few vectors in the arrays' own type: their error
    is that of `_BLOCK` additions however long the channel is. The order of all additions depends on the lengths alone.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
    element : llvmlite.ir.FloatType or DoubleType
    starts, steps : llvmlite.ir.Value
        Tuples with each array's address and the bytes between two rows of it.
    arrays : int
        How many there are.
    rows, run : llvmlite.ir.Value
        How many rows, and the numbers in each.
    """

    def __init__(
        self, builder: ir.IRBuilder, element: ir.Type, starts: ir.Value, steps: ir.Value, arrays: int,
        rows: ir.Value, run: ir.Value,
    ) -> None:  # fmt: skip
        self.b = builder
        self.element = element
        self.places = [(builder.extract_value(starts, k), builder.extract_value(steps, k)) for k in range(arrays)]
        self.rows = rows
        self.run = run

    def __call__(self, body: Body, sums: int = 0) -> Values:
        """Emit the code that does something everywhere, and return the sums as scalars."""
        b = self.b
        lanes = lanes_of(self.element)

        def one_row(row: ir.Value, state: Values) -> Values:
            pointers = [
                b.inttoptr(b.add(start, b.mul(row, step)), self.element.as_pointer()) for start, step in self.places
            ]

            def part(count: int, lanes: int) -> Callable[[ir.Value, Values], Values]:
                """Return the code for some vectors from a place on, which are summed in two chains."""

                def code(at: ir.Value, held: Values) -> Values:
                    chains = [_zeros(self.element, lanes, sums) for _ in range(min(count, 2))]
                    for u in range(count):
                        stretch = Stretch(b, self.element, lanes, pointers, b.add(at, INT(u * lanes)))
                        chains[u % 2] = body(stretch, chains[u % 2])
                    for other in chains[1:]:
                        chains[0] = [b.fadd(*both) for both in zip(chains[0], other, strict=True)]
                    return [b.fadd(*both) for both in zip(held, map(self._wide, chains[0]), strict=True)]

                return code

            block = _BLOCK if sums else _UNROLLED
            at, held = for_range(b, INT(0), self.run, block * lanes, state[:sums], part(block, lanes))
            at, held = for_range(b, at, self.run, lanes, held, part(1, lanes))
            _, rest = for_range(b, at, self.run, 1, state[sums:], part(1, 1))
            return held + rest

        none = _zeros(_DOUBLE, lanes, sums) + _zeros(_DOUBLE, 1, sums)
        _, state = for_range(b, INT(0), self.rows, 1, none, one_row)
        return [self._total(state[k], state[sums + k]) for k in range(sums)]

    def _wide(self, vector: ir.Value) -> ir.Value:
        return vector if vector.type.element == _DOUBLE else self.b.fpext(vector, _vector(_DOUBLE, vector.type.count))

    def _total(self, total: ir.Value, rest: ir.Value) -> ir.Value:
        """Add up the lanes of a vector, and one of one lane."""
        b = self.b
        while (half := total.type.count // 2) > 0:
            parts = (shuffle(b, total, total, range(k, k + half)) for k in (0, half))
            total = b.fadd(*parts)
        return b.extract_element(b.fadd(total, rest), INT32(0))


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _zeros(element: ir.Type, lanes: int, count: int) -> Values:
    return [ir.Constant(_vector(element, lanes), [0.0] * lanes)] * count


def lanes_of(element: ir.Type) -> int:
    """Return how many numbers fill a register."""
    return REGISTER_BYTES // (4 if isinstance(element, ir.FloatType) else 8)


def element_of(kind: Any) -> ir.Type:
    """Return LLVM's name of a scalar's Numba type."""
    return ir.FloatType() if kind == types.float32 else _DOUBLE


@intrinsic
def number_at(typingctx, like, address):  # type: ignore[no-untyped-def]
    """Return the number at an address, of the type of ``like``."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        return b.load(b.inttoptr(arguments[1], element_of(signature.args[0]).as_pointer()))

    return like(like, types.intp), generate


@intrinsic
def clear(typingctx, like, address, count):  # type: ignore[no-untyped-def]
    """Write ``count`` zeros of the type of ``like``, from an address on."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        element = element_of(signature.args[0])
        row = b.inttoptr(arguments[1], element.as_pointer())
        at = INT(0)
        for lanes in (lanes_of(element), 1):

            def code(at: ir.Value, _: Values, lanes: int = lanes) -> Values:
                Stretch(b, element, lanes, [row], at).store(_zeros(element, lanes, 1)[0], 0)
                return []

            at, _ = for_range(b, at, arguments[2], lanes, [], code)
        return context.get_dummy_value()

    return types.void(like, types.intp, types.intp), generate


@njit(nogil=True, error_model="numpy")
def first_pixel(whole, margin):  # type: ignore[no-untyped-def]
    """Return the address of the first pixel of images inside a margin."""
    return whole.ctypes.data + margin * (whole.strides[1] + whole.strides[2])


@njit(nogil=True, error_model="numpy")
def clear_margin(like, whole, margin, channel):  # type: ignore[no-untyped-def]
    """Write zeros around the images of one channel; ``like`` is a number of their type."""
    if margin == 0:
        return
    _, height, width, batch = whole.shape
    size = whole.itemsize
    start = whole.ctypes.data + channel * whole.strides[0]
    edge, between = margin * (width + 1) * batch, 2 * margin * batch
    clear(like, start, edge)
    for row in range(1, height - 2 * margin):
        clear(like, start + ((margin + row) * width - margin) * batch * size, between)
    clear(like, start + (height * width * batch - edge) * size, edge)
