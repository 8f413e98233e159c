"""The checker first: exact data have ratio 0, rounding stays within 1, planted mistakes are far outside."""

from math import fsum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.rng import generator
from refimpl.testing.bounds import error_ratio, gamma, product_bound, unit_roundoff, wider

SEEDS = st.integers(0, 2**32)
DTYPES = st.sampled_from([np.float32, np.float64])
MISTAKES = ["a term missing", "a term twice", "two rows swapped", "an index off by one", "a sign"]


def factors(seed: int, dtype: type, integers: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(seed, "factors")
    m, k, n = rng.integers(2, 12, 3)
    if integers:  # small enough that every partial sum is exact in float32
        return rng.integers(-50, 50, (m, k)).astype(dtype), rng.integers(-50, 50, (k, n)).astype(dtype)
    return rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)


def plant(mistake: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a product with one mistake in its first row."""
    y = a @ b
    term = a[0, 0] * b[0]
    match mistake:
        case "a term missing":
            y[0] -= term
        case "a term twice":
            y[0] += term
        case "two rows swapped":
            y[[0, 1]] = y[[1, 0]]
        case "an index off by one":
            y[0] += a[0, 0] * b[1] - term
        case "a sign":
            y[0] -= 2 * term
    return y


@given(SEEDS, DTYPES)
def test_exact_data_have_no_error(seed, dtype):
    a, b = factors(seed, dtype, integers=True)
    reference = a.astype(np.int64) @ b.astype(np.int64)
    assert error_ratio(a @ b, reference.astype(wider(dtype)), np.zeros(reference.shape)) == 0
    assert error_ratio(a @ b, reference.astype(wider(dtype)), product_bound(a, b)) == 0


@given(SEEDS, DTYPES)
def test_rounding_is_within_the_bound(seed, dtype):
    a, b = factors(seed, dtype)
    wide = wider(dtype)
    assert error_ratio(a @ b, a.astype(wide) @ b.astype(wide), product_bound(a, b)) <= 1


@given(SEEDS)
def test_the_wider_reference_agrees_with_a_correctly_rounded_sum(seed):
    a, b = factors(seed, np.float32)  # products of float32 are exact in float64, so fsum rounds once
    exact = np.array([[fsum(p * q for p, q in zip(r, c, strict=True)) for c in b.T.tolist()] for r in a.tolist()])
    assert error_ratio(a.astype(np.float64) @ b.astype(np.float64), exact, product_bound(a, b, dtype=np.float64)) <= 1


@pytest.mark.parametrize("mistake", MISTAKES)
@given(seed=SEEDS, dtype=DTYPES)
def test_planted_mistakes_are_far_outside(mistake, seed, dtype):
    a, b = factors(seed, dtype)
    wide = wider(dtype)
    a[0, 0], b[0], b[1] = 1, 1, -1  # so that each mistake moves the result by 1 at least
    a[1] = -a[0]
    reference = a.astype(wide) @ b.astype(wide)
    reference_moved = np.abs(plant(mistake, a.astype(wide), b.astype(wide)) - reference).max()
    ratio = error_ratio(plant(mistake, a, b), reference, product_bound(a, b))
    assert ratio > 1000 or reference_moved < 1e-2  # a row may happen to be as good as its neighbour


def test_a_mistake_in_a_single_entry_of_a_large_product_is_seen():
    rng = generator(0, "large")
    a, b = rng.standard_normal((50, 400)), rng.standard_normal((400, 60))
    wide = wider(a.dtype)
    y, reference = a @ b, a.astype(wide) @ b.astype(wide)
    assert error_ratio(y, reference, product_bound(a, b)) <= 1
    y[49, 59] -= a[49, 399] * b[399, 59]
    assert error_ratio(y, reference, product_bound(a, b)) > 1e6


def test_what_is_not_finite_is_never_within_a_bound():
    one, nan, inf = np.ones(1), np.full(1, np.nan), np.full(1, np.inf)
    assert error_ratio(nan, one, one) == np.inf
    assert error_ratio(one, nan, one) == np.inf
    assert error_ratio(inf, one, one) == np.inf
    assert error_ratio(inf, -inf, one) == np.inf
    assert error_ratio(nan, nan, one) == error_ratio(inf, inf, one) == 0


def test_a_bound_of_zero_takes_the_exact_result_only():
    one = np.ones(1)
    assert error_ratio(one, one, np.zeros(1)) == 0
    assert error_ratio(np.nextafter(one, 2), one, np.zeros(1)) == np.inf


def test_an_empty_result_has_no_error():
    assert error_ratio(np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 3))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: error_ratio(np.ones(2), np.ones(3), np.ones(3)), "must be the same"),
        (lambda: error_ratio(np.ones(2), np.ones(2), -np.ones(2)), "negative or NaN"),
        (lambda: error_ratio(np.ones(2), np.ones(2), np.full(2, np.nan)), "negative or NaN"),
        (lambda: gamma(2**24, np.float32), "leave no digit"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unit_roundoff_is_half_the_distance_from_one(dtype):
    u = dtype(unit_roundoff(dtype))
    assert dtype(1) + u == 1  # to even
    assert dtype(1) + 2 * u > 1
    assert gamma(0, dtype) == 0
    assert gamma(1, dtype) > u
    assert (gamma(np.array([1, 2, 3]), dtype) >= np.array([1, 2, 3]) * float(u)).all()
