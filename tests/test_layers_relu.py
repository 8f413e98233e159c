"""The rectifier: the laws of every layer, its corners, and the tiers to the bit."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.kernels import cpu, memory, spec, threads
from refimpl.layers import relu
from refimpl.testing.bounds import gamma
from refimpl.testing.kernels import poison_pool
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, add_to

CORNERS = [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324, 1.0, -1.0]


@pytest.fixture(params=kernels.TIERS, scope="module")
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on each tier."""
    with kernels.use(request.param):
        yield request.param


def make_relu(rng: np.random.Generator, *, features: int, panels: tuple[int, ...], columns: int, place: bool) -> Layer:
    """Make a rectifier over a bias, so that the sums are a gradient too; numbers keep away from the kink at 0."""
    shape = (*panels, features, columns)
    x = rng.choice([-1.0, 1.0], shape) * rng.uniform(1, 2, shape)
    params: Params = {"b": rng.uniform(-0.5, 0.5, features)}

    def forward(p: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        y, cache = relu.forward(x + np.asarray(p["b"])[:, None], in_place=place)
        return y.copy(), cache

    def backward(dy: np.ndarray, cache: np.ndarray, grads: Grads, input_gradient: bool) -> np.ndarray:
        own = memory.empty(dy.shape, dy.dtype)
        own[...] = dy
        dx, sums = relu.backward(own, cache, in_place=place)
        assert (dx is own) == place
        add_to(grads, "b", sums)
        return dx

    return Layer(forward, backward, params, (x,), optional_dx=False)


def test_relu(tier: str) -> None:
    sizes: dict[str, Any] = {
        "features": range(1, 5), "panels": [(), (1,), (2,), (2, 1)], "columns": [1, 3, 4, 8], "place": [True, False],
    }  # fmt: skip
    check_layer(make_relu, sizes, max_examples=25)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", [True, False])
def test_corners(tier: str, dtype: type, place: bool) -> None:
    """Zeros have no sign and no slope; NaN passes both ways, as in torch."""
    x: np.ndarray = np.array([CORNERS] * 4, dtype)
    tiny = dtype(5e-324)  # 0 in float32
    expected: np.ndarray = np.array([[0, 0, np.inf, 0, np.nan, tiny, 0, 1, 0]] * 4, dtype)
    y, cache = relu.forward(x.copy(), in_place=place)
    np.testing.assert_array_equal(y, expected)
    assert not np.signbit(y[~np.isnan(y)]).any()
    dx, sums = relu.backward(np.full(x.shape, 3, dtype), cache, in_place=place)
    slopes: np.ndarray = np.array([[0, 0, 1, 0, 1, tiny > 0, 0, 1, 0]] * 4, dtype)
    np.testing.assert_array_equal(dx, 3 * slopes)
    np.testing.assert_array_equal(sums, dx.sum(1))
    broken: np.ndarray = np.full(x.shape, np.nan, dtype)
    dx, _ = relu.backward(broken, cache, in_place=place)
    np.testing.assert_array_equal(np.isnan(dx), slopes > 0)  # a gradient that does not pass is 0, not 0 * NaN


@given(
    panels=st.integers(1, 3),
    features=st.sampled_from([1, 2, 5, 40]),
    width=st.sampled_from([4, 8, 52, 64]),
    dtype=st.sampled_from([np.float32, np.float64]),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_compiled_is_the_definition(panels: int, features: int, width: int, dtype: type, count: int, seed: int) -> None:
    """To the bit but for the order of the sums, which is bounded."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, panels, features, width)).astype(dtype)
    x.reshape(-1)[rng.random(x.size) < 0.1] = rng.choice(CORNERS)
    before = threads.get()
    threads.set_count(count)
    poison_pool()
    try:
        y = cpu.relu(x.copy(), None)
        in_place = x.copy()
        assert cpu.relu(in_place, in_place) is in_place
        dx, sums = cpu.relu_backward(out := dy.copy(), y, out)
    finally:
        threads.set_count(before)
    expected = spec.relu(x)
    assert y.tobytes() == in_place.tobytes() == expected.tobytes()
    expected_dx, _ = spec.relu_backward(dy, expected)
    assert dx is out
    assert dx.tobytes() == expected_dx.tobytes()
    exact = expected_dx.astype(np.longdouble).sum((0, 2))
    assert (np.abs(sums - exact) <= gamma(panels * width, dtype) * np.abs(expected_dx).sum((0, 2))).all()
    assert sums.dtype == dtype


def test_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.plan, "WORTH_SHARING", 1e5)
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 500, 80)).astype(np.float32)
    assert x.size * 16 > 1e6
    before, results = threads.get(), []
    try:
        for count in (1, 2, 3):
            threads.set_count(count)
            y = cpu.relu(out := x.copy(), out)
            dx, sums = cpu.relu_backward(out := dy.copy(), y, out)
            results.append((y.tobytes(), dx.tobytes(), sums.tobytes()))
    finally:
        threads.set_count(before)
    assert len(set(results)) == 1


def test_operands_that_do_not_fit(tier: str) -> None:
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"dY is float64 of shape \(2, 2\); it must be float64 of shape \(2, 3\)"):
        kernels.relu_backward(x[:, :2], x)
    with pytest.raises(ValueError, match="dY is float32"):
        kernels.relu_backward(x.astype(np.float32), x)
    with pytest.raises(ValueError, match="out is float64 of shape"):
        kernels.relu(x, x[:1])
    with pytest.raises(ValueError, match=r"takes \(\.\.\., features, columns\)"):
        kernels.relu_backward(x[0], x[0])
