"""The checker is checked: the bounds of `Rounded` hold against exact arithmetic, and mean something."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.testing import rounding
from refimpl.testing.rounding import Rounded, U

numbers = st.floats(-8, 8, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-100)
errors = st.sampled_from([0.0, 0.0, 1e-17, 1e-13, 1e-3])
turns = st.sampled_from([-1.0, 0.0, 1.0])


@st.composite
def uncertain(draw: st.DrawFn, numbers: st.SearchStrategy[float] = numbers) -> tuple[Rounded, Fraction]:
    """Draw a number with an error bound, and an exact one within it."""
    value, error, turn = draw(numbers), draw(errors), draw(turns)
    return Rounded(value, error), Fraction(value) + Fraction(error) * Fraction(turn)


def holds(computed: Rounded, exact: Fraction) -> bool:
    """Tell whether the exact result is within the bound, which is itself computed to 13 digits or better."""
    distance = abs(Fraction(float(computed.value)) - exact)
    return distance <= Fraction(float(computed.error)) * (1 + Fraction(1, 10**13))


@given(uncertain(), uncertain())
def test_arithmetic(a: tuple[Rounded, Fraction], b: tuple[Rounded, Fraction]) -> None:
    (x, p), (y, q) = a, b
    assert holds(x + y, p + q)
    assert holds(x - y, p - q)
    assert holds(1 - x, 1 - p)
    assert holds(x * y, p * q)
    assert holds((x * y + x) * y, (p * q + p) * q)
    if abs(y.value) > 1e-2:
        assert holds(x / y, p / q)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-16, 1e-3]))
def test_products_and_sums(n: int, seed: int, error: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(1, n)), rng.normal(size=(n, 1)) * (rng.random((n, 1)) < 0.7)
    near = [a + error * rng.choice([-1, 0, 1], a.shape), b]
    p, q = ([Fraction(float(x)) for x in array.reshape(-1)] for array in near)
    exact = sum((x * y for x, y in zip(p, q)), start=Fraction(0))
    spread = Rounded(a, error + U * abs(a))  # the sums above were rounded once
    assert holds((spread @ Rounded(b)).reshape(), exact)
    assert holds((spread.reshape(n) * b.reshape(n)).sum(), exact)
    assert holds(spread.sum(), sum(p, start=Fraction(0)))


def _tanh(x: Decimal) -> Decimal:
    e = (2 * x).exp()
    return (e - 1) / (e + 1)


FUNCTIONS: dict[str, tuple[Callable[[Rounded], Rounded], Callable[[Decimal], Decimal], bool]] = {
    "exp": (rounding.exp, lambda x: x.exp(), False),
    "tanh": (rounding.tanh, _tanh, False),
    "sigmoid": (rounding.sigmoid, lambda x: 1 / (1 + (-x).exp()), False),
    "log": (rounding.log, lambda x: x.ln(), True),
    "sqrt": (rounding.sqrt, lambda x: x.sqrt(), True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(x=uncertain())
def test_functions(name: str, x: tuple[Rounded, Fraction]) -> None:
    ours, theirs, positive = FUNCTIONS[name]
    number, exact = x
    if positive:
        number, exact = (number, exact) if number.value > 0 else (-number, -exact)
        if number.value < 1e-2:
            return
    with localcontext() as context:
        context.prec = 200
        value = theirs(Decimal(exact.numerator) / Decimal(exact.denominator))
    assert holds(ours(number), Fraction(value))


def test_the_bound_means_something() -> None:
    """Exact numbers have an error of 0, zeros stay exact, and one wrong digit in twelve is outside."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 30)), rng.normal(size=(30, 20))
    product = Rounded(a) @ Rounded(b)
    assert not Rounded(a).error.any()
    assert not (Rounded(a) @ np.zeros((30, 2))).error.any()
    assert (product.error < 1e-12 * (abs(a) @ abs(b))).all()
    missing = a[:, :-1] @ b[:-1]
    assert (abs(missing - product.value) > product.error).mean() > 0.99


def test_a_divisor_that_may_be_0() -> None:
    with pytest.raises(ZeroDivisionError, match="tell it from 0"):
        Rounded(1.0) / Rounded(1e-3, 2e-3)
