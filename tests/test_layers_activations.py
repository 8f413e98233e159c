"""GELU in both forms and SiLU: the laws of every layer, torch and high precision, corners, planted mistakes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refimpl.layers import activations
from refimpl.testing.layers import Layer, check_layer

Pair = tuple[Callable[..., Any], Callable[..., Any]]
FUNCTIONS: dict[str, Pair] = {
    "gelu": (activations.gelu_forward, activations.gelu_backward),
    "gelu tanh": (lambda x: activations.gelu_forward(x, "tanh"), activations.gelu_backward),
    "silu": (activations.silu_forward, activations.silu_backward),
}
NAMES = pytest.mark.parametrize("name", list(FUNCTIONS))
SIZES: dict[str, Any] = {"shape": [(1,), (3, 2), (2, 2, 1, 3)]}


def maker(pair: Pair) -> Callable[..., Layer]:
    def make(rng: np.random.Generator, *, shape: tuple[int, ...]) -> Layer:
        return Layer(
            lambda p, x: pair[0](x),
            lambda dy, cache, grads, dx: pair[1](dy, cache),
            {},
            (rng.standard_normal(shape) * 1.5,),
            optional_dx=False,
        )

    return make


@NAMES
def test_activation(name: str) -> None:
    check_layer(maker(FUNCTIONS[name]), SIZES)


@NAMES
@given(x=arrays(np.float64, st.integers(1, 20), elements=st.floats(-60, 60)))
def test_activation_of_torch(name: str, x: np.ndarray) -> None:
    check_against_torch(name, FUNCTIONS[name], x)


def check_against_torch(name: str, pair: Pair, x: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    functional: dict[str, Any] = {
        "gelu": torch.nn.functional.gelu,
        "gelu tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    x_torch = torch.tensor(x, requires_grad=True)
    out = functional[name](x_torch)
    out.backward(torch.full_like(out, 3.0))
    y, cache = pair[0](x)
    # A few elementary functions, each within a few units in the last place of numbers up to |x|, once more times |x|
    # in the derivative of tanh's form, where u' grows with x^2 but 1 - t^2 is what is left of 1.
    bound = 1e-12 * (1 + np.abs(x).max())
    np.testing.assert_allclose(y, out.detach().numpy(), rtol=0, atol=bound)
    np.testing.assert_allclose(pair[1](np.full_like(x, 3.0), cache), x_torch.grad.numpy(), rtol=0, atol=3 * bound)


@given(st.floats(-30, 30))
def test_gelu_is_x_times_the_normal_distribution(value: float) -> None:
    """By the complementary error function of the standard library, which keeps the digits of the left tail."""
    x = np.array([value])
    y, cache = activations.gelu_forward(x)
    phi = 0.5 * math.erfc(-value / math.sqrt(2))
    # Rounding the argument t = x / sqrt(2) changes erfc by a factor of about e^{2 t^2 eps}, in both programs.
    relative = 16 * np.finfo(float).eps * (1 + value * value)
    np.testing.assert_allclose(y, value * phi, rtol=relative, atol=1e-300)
    slope = phi + value * math.exp(-value * value / 2) / math.sqrt(2 * math.pi)
    size = phi + abs(value) * math.exp(-value * value / 2)
    np.testing.assert_allclose(activations.gelu_backward(np.ones(1), cache), slope, rtol=0, atol=relative * size)


@given(st.floats(-700, 700))
def test_silu_keeps_the_digits_of_its_tail(value: float) -> None:
    x = np.array([value])
    y, cache = activations.silu_forward(x)
    sigma = 1 / (1 + math.exp(-value))
    # The exponential's argument is exact; x sigma(x) is then right to a few units in the last place.
    np.testing.assert_allclose(y, value * sigma, rtol=16 * np.finfo(float).eps, atol=1e-300)
    slope = sigma * (1 + value / (1 + math.exp(value)))
    bound = 16 * np.finfo(float).eps * sigma * (1 + abs(value))
    np.testing.assert_allclose(activations.silu_backward(np.ones(1), cache), slope, rtol=0, atol=bound + 1e-300)


def test_the_two_forms_of_gelu_are_near_but_not_the_same() -> None:
    x = np.linspace(-5, 5, 1001)
    exact, tanh = activations.gelu_forward(x)[0], activations.gelu_forward(x, "tanh")[0]
    assert 1e-4 < np.abs(exact - tanh).max() < 1e-3


@NAMES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_from_zero_it_is_the_rectifier(name: str, dtype: Any) -> None:
    x: np.ndarray = np.array([-1e6, -300, 0, 300, 1e6], dtype)
    with np.errstate(over="raise", invalid="raise"):
        y, cache = FUNCTIONS[name][0](x)
        dx = FUNCTIONS[name][1](np.ones_like(x), cache)
    np.testing.assert_allclose(y, np.maximum(x, 0), rtol=0, atol=1e-30)
    np.testing.assert_allclose(dx, [0, 0, 0.5, 1, 1], rtol=0, atol=1e-30)
    assert y.dtype == dx.dtype == dtype


def test_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="approximate is 'fast'; GELU takes 'none' or 'tanh'"):
        activations.gelu_forward(np.ones(2), "fast")  # type: ignore[arg-type]


# --- planted mistakes -----------------------------------------------------------------------------------------


def density_forgotten(dy: np.ndarray, cache: Any) -> np.ndarray:
    return dy * activations._normal(cache.x)


def density_not_times_x(dy: np.ndarray, cache: Any) -> np.ndarray:
    return dy * (activations._normal(cache.x) + np.exp(-0.5 * cache.x**2) / math.sqrt(2 * math.pi))


def derivative_of_the_other_form(dy: np.ndarray, cache: Any) -> np.ndarray:
    other = "none" if cache.approximate == "tanh" else "tanh"
    return activations.gelu_backward(dy, cache._replace(approximate=other))


def sigmoid_alone(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    s = activations._sigmoid(x)
    return dy * s * (1 - s)


def of_the_output(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    return activations.silu_backward(dy, activations.silu_forward(x)[0])


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("gelu", density_forgotten), ("gelu", density_not_times_x), ("gelu", derivative_of_the_other_form),
        ("gelu tanh", derivative_of_the_other_form), ("silu", sigmoid_alone), ("silu", of_the_output),
    ],
)  # fmt: skip
def test_mistakes_in_backward(name: str, mistake: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"gradient of input 0 is .* along a random direction"):
        check_layer(maker((FUNCTIONS[name][0], mistake)), SIZES, max_examples=5, shrink=False)


@pytest.mark.parametrize(("name", "other"), [("gelu", "gelu tanh"), ("gelu tanh", "gelu"), ("silu", "gelu")])
def test_another_function_is_told_from_it(name: str, other: str) -> None:
    with pytest.raises(AssertionError):
        check_against_torch(name, FUNCTIONS[other], np.linspace(-3, 3, 11))
