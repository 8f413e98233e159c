"""First test the checker: every planted mistake must be caught, by the law that it breaks.

Here on a linear map; recurrent layers, dropout and compositions are in test_layers_mistakes.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from refimpl import kernels
from refimpl.layers import linear
from refimpl.testing.derivatives import complex_slope, extrapolated_slope
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, LinearGrad, Params, SparseWeight, add_to


@pytest.fixture(autouse=True, scope="module")
def _definition() -> Iterator[None]:
    """Run on the definition: mistakes are planted in its parts."""
    with kernels.use("spec"):
        yield


def caught(make: Callable[..., Layer], sizes: dict[str, Any], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        check_layer(make, sizes, max_examples=5, shrink=False)


# --- linear ---------------------------------------------------------------------------------------------------


def linear_with(
    forward: Callable[..., Any] = linear.forward, backward: Callable[..., Any] = linear.backward
) -> Callable[..., Layer]:
    def make(rng: np.random.Generator, *, outputs: int, inputs: int) -> Layer:
        return Layer(
            lambda p, x: forward(p, "w", "b", x),
            lambda dy, cache, grads, dx: backward(dy, cache, grads, input_gradient=dx),
            {"w": rng.standard_normal((outputs, inputs)), "b": rng.standard_normal(outputs)},
            (rng.standard_normal((2, inputs, 3)),),
            sparse=("w",),
            complex_step=True,
        )

    return make


LINEAR_SIZES: dict[str, Any] = {"outputs": [2, 3], "inputs": [2, 4]}


def mean_instead_of_sum(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    own: Grads = {}
    dx = linear.backward(dy, cache, own, **options)
    add_to(grads, "b", own["b"])
    add_to(grads, "w", LinearGrad(cache.w.shape, dy / dy.shape[-1], cache.x))
    return dx


def no_bias_in_forward(params: Params, weight: str, bias: str, x: np.ndarray) -> Any:
    y, _ = linear.forward(params, weight, None, x)
    return y, linear.forward(params, weight, bias, x)[1]


def no_bias_in_backward(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    return linear.backward(dy, cache._replace(bias=None), grads, **options)


def first_panel_only(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    dx = linear.backward(dy, cache, grads, **options)
    grads["w"] = LinearGrad(cache.w.shape, dy[:1], cache.x[:1])
    return dx


def overwrites_gradient(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    grads.clear()
    return linear.backward(dy, cache, grads, **options)


def overwrites_dy(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    dx = linear.backward(dy.copy(), cache, grads, **options)
    dy *= 2
    return dx


def overwrites_input(params: Params, weight: str, bias: str, x: np.ndarray) -> Any:
    y, cache = linear.forward(params, weight, bias, x.copy())
    x += 1
    return y, cache


def always_input_gradient(dy: np.ndarray, cache: Any, grads: Grads, input_gradient: bool) -> Any:
    return linear.backward(dy, cache, grads)


def nothing_without_input_gradient(dy: np.ndarray, cache: Any, grads: Grads, input_gradient: bool) -> Any:
    dx = linear.backward(dy, cache, grads, input_gradient=input_gradient)
    if not input_gradient:
        grads["w"] = LinearGrad(cache.w.shape, 0 * dy, cache.x)
    return dx


def transposed_input_gradient(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    dx = linear.backward(dy, cache, grads, **options)
    return None if dx is None else -dx


def denser_than_its_support(params: Params, weight: str, bias: str, x: np.ndarray) -> Any:
    """Compute with 0.01 where a sparse weight has no entry: its own derivatives stay right."""
    y, cache = linear.forward(params, weight, bias, x)
    w = params[weight]
    return (y + 0.01 * ~w.support.mask() @ x, cache) if isinstance(w, SparseWeight) else (y, cache)


def doubles_when_sparse(params: Params, weight: str, bias: str, x: np.ndarray) -> Any:
    y, cache = linear.forward(params, weight, bias, x)
    return (2 * y, cache) if isinstance(params[weight], SparseWeight) else (y, cache)


def float64_bias_gradient(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    dx = linear.backward(dy, cache, grads, **options)
    grads["b"] = np.asarray(grads["b"], np.float64)
    return dx


class ShortBlocks(LinearGrad):
    """A promise whose blocks are half of what they should be."""

    def blocks(self) -> Any:
        return ((rows, block / 2) for rows, block in super().blocks())


def wrong_blocks(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    dx = linear.backward(dy, cache, grads, **options)
    grads["w"] = ShortBlocks(cache.w.shape, dy, cache.x)
    return dx


_buffer = np.empty(1000)


def shared_buffer(params: Params, weight: str, bias: str, x: np.ndarray) -> Any:
    """Keep the input in one buffer for all calls."""
    y, cache = linear.forward(params, weight, bias, x)
    if x.dtype != float:
        return y, cache
    kept = _buffer[: x.size].reshape(x.shape)
    kept[...] = x
    return y, cache._replace(x=kept)


def test_the_layer_itself_passes() -> None:
    check_layer(linear_with(), LINEAR_SIZES, max_examples=5)


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        (mean_instead_of_sum, "gradient of w is .* along a random direction"),
        (no_bias_in_backward, "no gradient of b"),
        (first_panel_only, "gradient of w is .* along a random direction"),
        (overwrites_gradient, "after a second pass"),
        (overwrites_dy, "changed dy"),
        (always_input_gradient, "although input_gradient=False"),
        (nothing_without_input_gradient, "w with and without an input gradient differ"),
        (transposed_input_gradient, "gradient of input 0 is .* along a random direction"),
        (float64_bias_gradient, "in float32, the gradient of b is float64"),
        (wrong_blocks, "w in blocks and in full differ"),
    ],
)
def test_mistakes_in_a_linear_backward(mistake: Callable[..., Any], match: str) -> None:
    caught(linear_with(backward=mistake), LINEAR_SIZES, match)


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        (no_bias_in_forward, "gradient of b is .* where the output changes by 0 "),
        (overwrites_input, "changed a parameter or an input"),
        (denser_than_its_support, "sparse: the gradient of input 0|sparse and masked dense"),
        (doubles_when_sparse, "at density 1"),
        (shared_buffer, "another forward pass in between"),
    ],
)
def test_mistakes_in_a_linear_forward(mistake: Callable[..., Any], match: str) -> None:
    caught(linear_with(forward=mistake), LINEAR_SIZES, match)


def test_a_kink_is_reported_and_not_passed() -> None:
    def make(rng: np.random.Generator, *, n: int) -> Layer:
        return Layer(
            lambda p, x: (np.abs(x), x),
            lambda dy, cache, grads, dx: dy * np.sign(cache) if dx else None,
            {},
            (1e-2 * rng.standard_normal((n, 1)),),
        )

    caught(make, {"n": [4]}, "cannot be checked: differences settle only")


# --- derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phi", "slope"),
    [
        (lambda t: t, 1.0),
        (lambda t: 3 + 0 * t, 0.0),
        (lambda t: np.exp(2 * t), 2.0),
        (lambda t: np.tanh(t + 0.5), 1 / np.cosh(0.5) ** 2),
        (lambda t: np.sin(5 * t) + 1e3, 5.0),
    ],
)
def test_slopes(phi: Callable[[Any], Any], slope: float) -> None:
    assert abs(complex_slope(phi) - slope) <= 4 * np.finfo(float).eps * max(1.0, slope)
    got, bound = extrapolated_slope(phi)
    assert abs(got - slope) <= bound <= 2e-6
