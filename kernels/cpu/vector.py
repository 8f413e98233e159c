"""Building blocks of the row kernels: panel rows held in vector registers, written as LLVM vector code.

Plain loops leave a factor of two to five on the table here: the compiler stores and reloads the accumulated row at
every non-zero, because it cannot rule out that the arrays overlap, and it does not vectorise a loop over many arrays.
Numba lets a function emit its own LLVM code (``@intrinsic``), so a row of a panel becomes a list of vectors that stay
in registers. LLVM cuts them down for machines with narrower registers.

A *row* below is a list of LLVM vectors that together hold ``width`` numbers. In memory it is one stretch, or two: a
*split* row keeps the numbers that fill whole registers in one array, where each row starts on a cache line, and the few
that are left in another. A vector that crosses a cache line costs two loads; rows of 20 numbers side by side would
cross one three times in four.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

INT = ir.IntType(64)
INT32 = ir.IntType(32)
QUAD = 4  # panel widths are multiples of four numbers; a width is known to the compiler as a tuple of that many quads
REGISTER_BYTES = 64  # one AVX-512 register

Row = list[ir.Value]
Cut = tuple[int, int]
"""A vector's offset in its row, and its lanes."""
Place = tuple[ir.Value, ...]
"""Where a row lies: its address, or the addresses of its two parts."""


def quads(width: int) -> tuple[int, ...]:
    """Return a tuple whose type tells the compiler a panel's width: one kernel is compiled for each width in use."""
    return (0,) * (width // QUAD)


def whole_registers(width: int, itemsize: int) -> int:
    """Return how many numbers of a row fill whole registers: the first part of a split row."""
    return width - width % (REGISTER_BYTES // itemsize)


class Rows:
    """Vector code on rows of ``width`` numbers.

    Parameters
    ----------
    builder : llvmlite.ir.IRBuilder
    element : llvmlite.ir.FloatType or DoubleType
    width : int
        Numbers in a row: cut into full registers, then into halves of them, down to four numbers or fewer.
    hide : bool
        Whether the machine has AVX-512, whose registers hold what :meth:`load_scalars` hides.
    """

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, width: int, hide: bool = False) -> None:
        self.b = builder
        self.element = element
        self.bytes = 4 if isinstance(element, ir.FloatType) else 8
        self.cuts: list[Cut] = []
        lanes, offset = REGISTER_BYTES // self.bytes, 0
        while offset < width:
            while lanes > width - offset:
                lanes //= 2
            self.cuts.append((offset, lanes))
            offset += lanes
        self.width = width
        self.hide = hide
        self.whole = whole_registers(width, self.bytes)

    # --- whole rows

    def load(self, place: Place | ir.Value) -> Row:
        """Read the row that lies at ``place``."""
        return [self._load(place, cut) for cut in self.cuts]

    def store(self, row: Row, place: Place | ir.Value) -> None:
        """Write the row to ``place``."""
        for cut, value in zip(self.cuts, row, strict=True):
            self._store(value, place, cut)

    def _load(self, place: Place | ir.Value, cut: Cut) -> ir.Value:
        value = self.b.load(self._vector_at(place, cut))
        value.align = self.bytes
        return value

    def _store(self, value: ir.Value, place: Place | ir.Value, cut: Cut) -> None:
        self.b.store(value, self._vector_at(place, cut)).align = self.bytes

    def _vector_at(self, place: Place | ir.Value, cut: Cut) -> ir.Value:
        first, *rest = place if isinstance(place, tuple) else (place,)
        offset, lanes = cut
        if rest and offset >= self.whole:
            first, offset = rest[0], offset - self.whole
        return self.b.bitcast(self.at(first, INT(offset)), ir.VectorType(self.element, lanes).as_pointer())

    def constant(self, number: float) -> Row:
        """Return a row of one number."""
        return [self._vector(number, lanes) for _, lanes in self.cuts]

    def zero(self) -> Row:
        """Return a row of zeros."""
        return self.constant(0.0)

    def splat(self, scalar: ir.Value) -> Row:
        """Return a row of one scalar."""
        return [splat(self.b, scalar, lanes) for _, lanes in self.cuts]

    def fma(self, x: Row, y: Row, z: Row) -> Row:
        """Return ``x * y + z``, fused where the machine can."""
        return [fma(self.b, *abc) for abc in zip(x, y, z, strict=True)]

    def add(self, x: Row, y: Row) -> Row:
        """Return ``x + y``."""
        return [self.b.fadd(*ab) for ab in zip(x, y, strict=True)]

    def sub(self, x: Row, y: Row) -> Row:
        """Return ``x - y``."""
        return [self.b.fsub(*ab) for ab in zip(x, y, strict=True)]

    def mul(self, x: Row, y: Row) -> Row:
        """Return ``x * y``."""
        return [self.b.fmul(*ab) for ab in zip(x, y, strict=True)]

    def sigmoid(self, x: Row) -> Row:
        """Return ``1 / (1 + exp(-x))``."""
        return [sigmoid(self.b, v) for v in x]

    def tanh(self, x: Row) -> Row:
        """Return the hyperbolic tangent."""
        return [tanh(self.b, v) for v in x]

    def exp(self, x: Row) -> Row:
        """Return the exponential."""
        return [exp(self.b, v) for v in x]

    def maximum(self, x: Row, y: Row) -> Row:
        """Return the greater of each pair."""
        return [_call(self.b, "llvm.maxnum", *ab) for ab in zip(x, y, strict=True)]

    # --- sums over a row

    def dot(self, x: Row, y: Row) -> ir.Value:
        """Multiply two rows and add the vectors of products into one, in a fixed order; :meth:`sum` does the rest."""
        total = self.b.fmul(x[0], y[0])
        for u, v in zip(x[1:], y[1:], strict=True):
            short, lanes = u.type.count, total.type.count
            if short == lanes:
                total = fma(self.b, u, v, total)
            else:  # the narrower vectors at a row's end go to the first lanes
                widen = [*range(short), *[short] * (lanes - short)]
                total = self.b.fadd(total, shuffle(self.b, self.b.fmul(u, v), self._vector(0.0, short), widen))
        return total

    def sum(self, v: ir.Value) -> ir.Value:
        """Return the sum of a vector's lanes as a scalar."""
        while v.type.count > 1:
            v = self._halve(v)
        return self.b.extract_element(v, INT32(0))

    def sum4(self, a: ir.Value, b: ir.Value, c: ir.Value, d: ir.Value) -> ir.Value:
        """Return the sums of four vectors (of four lanes or more) as one vector of four."""
        v = self._add_neighbours(self._add_neighbours(a, b), self._add_neighbours(c, d))
        while v.type.count > 4:
            v = self._halve(v)
        return v

    def _halve(self, v: ir.Value) -> ir.Value:
        half = v.type.count // 2
        return self.b.fadd(shuffle(self.b, v, v, range(half)), shuffle(self.b, v, v, range(half, 2 * half)))

    def _add_neighbours(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """In each block of four lanes: ``[x0 + x1, x2 + x3, y0 + y1, y2 + y3]``."""
        n = x.type.count
        even = [lane for block in range(0, n, 4) for lane in (block, block + 2, n + block, n + block + 2)]
        return self.b.fadd(shuffle(self.b, x, y, even), shuffle(self.b, x, y, [lane + 1 for lane in even]))

    # --- scalars and addresses

    def load_scalars(self, pointer: ir.Value, count: int) -> ir.Value:
        """Read ``count`` neighbouring numbers as one vector, for :meth:`splat_lane`.

        Loads are what the row kernels wait for. LLVM knows better and would load each lane anew, which costs a tenth
        of the time; so an empty piece of assembly hides from it where the vector comes from.
        """
        value = self.b.load(self.b.bitcast(pointer, ir.VectorType(self.element, count).as_pointer()))
        value.align = self.bytes
        if self.hide and count * self.bytes >= 16:  # what a register can hold
            value = self.b.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], False)
        return value

    def splat_lane(self, vector: ir.Value, lane: int) -> Row:
        """Return a row of one lane of a vector."""
        return [shuffle(self.b, vector, vector, [lane] * lanes) for _, lanes in self.cuts]

    def at(self, pointer: ir.Value, offset: ir.Value) -> ir.Value:
        """Return the address ``offset`` elements on."""
        return self.b.gep(pointer, [offset])

    def _vector(self, number: float, lanes: int) -> ir.Constant:
        return ir.Constant(ir.VectorType(self.element, lanes), [number] * lanes)


def for_range(
    b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, state: Row, body: Callable[[ir.Value, Row], Row]
) -> tuple[ir.Value, Row]:
    """Emit ``while i + step <= stop: state = body(i, state); i += step`` and return the last ``i`` and state."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(INT)
    i.add_incoming(start, before)
    held = []
    for value in state:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        held.append(phi)
    following = b.add(i, INT(step))
    b.cbranch(b.icmp_signed("<=", following, stop), inside, after)
    b.position_at_end(inside)
    for phi, value in zip(held, body(i, held), strict=True):
        phi.add_incoming(value, b.block)
    i.add_incoming(following, b.block)
    b.branch(head)
    b.position_at_end(after)
    return i, held


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: range | list[int]) -> ir.Value:
    """Return the chosen lanes of ``x`` followed by ``y``."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes)))


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """Return a vector of one scalar."""
    nothing = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    return shuffle(b, b.insert_element(nothing, scalar, INT32(0)), nothing, [0] * lanes)


def _call(b: ir.IRBuilder, name: str, *vectors: ir.Value) -> ir.Value:
    kind = vectors[0].type
    letter = "f32" if isinstance(kind.element, ir.FloatType) else "f64"
    name = f"{name}.v{kind.count}{letter}"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(kind, [kind] * len(vectors)), name)
    return b.call(function, vectors)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """Return ``x * y + z``: ``fmuladd``, for ``fma`` is a slow library call on machines without the instruction."""
    return _call(b, "llvm.fmuladd", x, y, z)


def _expm1_parts(b: ir.IRBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    r"""Return :math:`2^n` and :math:`2^n (e^r - 1)` where :math:`x = n \ln 2 + r` and :math:`|r| \le \ln 2 / 2`.

    Cody and Waite's reduction; :math:`e^r - 1` is its Taylor polynomial, cut off where the next term is below half a
    unit in the last place. Arguments are clamped to where the result is a normal number; NaN stays NaN.
    """
    single = isinstance(x.type.element, ir.FloatType)
    lanes = x.type.count
    terms, mantissa, bias, limit = (7, 23, 127, 87.0) if single else (13, 52, 1023, 708.0)
    # ln 2 in two parts, the first with enough trailing zeros that n * high is exact
    high = 0.693359375 if single else 6.93147180369123816490e-1
    low = -2.12194440e-4 if single else 1.90821492927058770002e-10

    def c(number: float) -> ir.Constant:
        return ir.Constant(x.type, [number] * lanes)

    integer = ir.VectorType(INT32 if single else INT, lanes)
    x = clamp(b, x, limit)
    # Adding 1.5 * 2**mantissa rounds to an integer and leaves it in the sum's low bits; unlike a conversion it is
    # defined for NaN
    shift = c(1.5 * 2.0**mantissa)
    shifted = b.fadd(b.fmul(x, c(1 / math.log(2))), shift)
    n = b.fsub(shifted, shift)
    r = fma(b, n, c(-low), fma(b, n, c(-high), x))
    polynomial = c(1 / math.factorial(terms))
    for k in range(terms - 1, 0, -1):
        polynomial = fma(b, polynomial, r, c(1 / math.factorial(k)))
    exponent = b.add(b.bitcast(shifted, integer), ir.Constant(integer, [bias] * lanes))
    power = b.bitcast(b.shl(exponent, ir.Constant(integer, [mantissa] * lanes)), x.type)
    return power, b.fmul(power, b.fmul(polynomial, r))


def constant(v: ir.Value, number: float) -> ir.Constant:
    """Return a vector of one number, as long as another vector."""
    return ir.Constant(v.type, [number] * v.type.count)


def clamp(b: ir.IRBuilder, x: ir.Value, limit: float) -> ir.Value:
    """Return ``x`` within ±limit. NaN stays NaN: a comparison with it is false, where ``llvm.minnum`` would hide it."""
    for order, bound in ((">", limit), ("<", -limit)):
        x = b.select(b.fcmp_ordered(order, x, constant(x, bound)), constant(x, bound), x)
    return x


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return the exponential, to about two units in the last place."""
    power, rest = _expm1_parts(b, x)
    return b.fadd(power, rest)


def sigmoid(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return ``1 / (1 + exp(-x))``."""
    power, rest = _expm1_parts(b, b.fsub(constant(x, 0.0), x))
    return b.fdiv(constant(x, 1.0), b.fadd(constant(x, 1.0), b.fadd(power, rest)))


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return ``expm1(2x) / (expm1(2x) + 2)``, which loses nothing for small ``x``; clamped where it rounds to ±1."""
    x = clamp(b, x, 20.0)
    power, rest = _expm1_parts(b, b.fadd(x, x))
    expm1 = b.fadd(b.fsub(power, constant(x, 1.0)), rest)
    return b.fdiv(expm1, b.fadd(expm1, constant(x, 2.0)))
