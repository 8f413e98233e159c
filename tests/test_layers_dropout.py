"""Dropout, plain and locked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.layers import dropout
from refimpl.rng import generator
from refimpl.testing.layers import Layer, check_layer

pytestmark = pytest.mark.usefixtures("tier")


def make_dropout(
    rng: np.random.Generator, *, shape: tuple[int, int, int], p: float, locked: bool, train: bool
) -> Layer:
    return Layer(
        lambda params, x: dropout.forward(x, p, locked=locked, rng=generator(1, "drop") if train else None),
        lambda dy, cache, grads, dx: dropout.backward(dy, cache),
        {},
        (rng.standard_normal(shape),),
        optional_dx=False,
        complex_step=True,
    )


def test_laws() -> None:
    shapes = [(1, 1, 1), (2, 3, 1), (3, 1, 4), (2, 4, 3)]
    check_layer(
        make_dropout,
        {"shape": shapes, "p": [0.0, 0.2, 0.9], "locked": [False, True], "train": [False, True]},
        max_examples=25,
    )


shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
probabilities = st.floats(0.01, 0.95)


@given(shapes, probabilities, st.booleans(), st.integers(0, 1000))
def test_one_mask_both_ways(shape: tuple[int, int, int], p: float, locked: bool, step: int) -> None:
    ones = np.ones(shape)
    y, cache = dropout.forward(ones, p, locked=locked, rng=generator(0, "drop", step))
    again, _ = dropout.forward(ones, p, locked=locked, rng=generator(0, "drop", step))
    np.testing.assert_array_equal(y, again)  # same draws, same mask
    np.testing.assert_array_equal(dropout.backward(ones, cache), y)  # backward is the same product
    assert set(np.unique(y)) <= {0.0, 1 / (1 - p)}
    if locked:
        np.testing.assert_array_equal(y, np.broadcast_to(y[0], shape))  # one mask for all time steps


@given(shapes, probabilities, st.booleans())
def test_nothing_dropped(shape: tuple[int, int, int], p: float, locked: bool) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    for y, cache in (
        dropout.forward(x, p, locked=locked),
        dropout.forward(x, 0.0, locked=locked, rng=generator(0, "drop")),
    ):
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(dropout.backward(x, cache), x)


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_expectation(p: float, locked: bool) -> None:
    # The mean of n independent masks, 0 or 1/keep, has standard deviation sqrt(p / keep / n); five of them.
    x = np.ones((3, 100, 100))
    y, _ = dropout.forward(x, p, locked=locked, rng=generator(5, "drop"))
    independent = 10_000 if locked else 30_000
    assert abs(y.mean() - 1) < 5 * np.sqrt(p / (1 - p) / independent)


def test_locked_differs_between_sequences_and_plain_between_steps() -> None:
    x = np.ones((2, 40, 2))
    locked, _ = dropout.forward(x, 0.5, locked=True, rng=generator(0, "drop"))
    plain, _ = dropout.forward(x, 0.5, rng=generator(0, "drop"))
    assert not np.array_equal(locked[..., 0], locked[..., 1])
    assert not np.array_equal(plain[0], plain[1])
