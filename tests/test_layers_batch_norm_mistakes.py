"""Mistakes planted in batch norm, one at a time: the laws, or torch, must tell each."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from norm_cases import OF, SIZES, check_against_torch, make

from refimpl.layers import batch_norm
from refimpl.layers.padded import image_of
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, add_to


def statistics_as_constants(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    """Backward of evaluation where the statistics were those of the batch."""
    return batch_norm.backward(dy, cache._replace(train=False), grads, **options)


def statistics_that_move(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    """Backward of training where the statistics were the running ones."""
    return batch_norm.backward(dy, cache._replace(train=True), grads, **options)


def slope_without_gamma(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    return batch_norm.backward(dy, cache._replace(gamma=np.ones_like(cache.gamma)), grads, **options)


def gamma_of_the_output(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    own: Grads = {}
    dx = batch_norm.backward(dy, cache, own, **options)
    add_to(grads, OF.bias, own[OF.bias])
    add_to(grads, OF.weight, own[OF.bias])
    return dx


def rectifier_forgotten(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    return batch_norm.backward(dy, cache._replace(y=None, beta=None), grads, **options)


def rectifier_of_the_input(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    return batch_norm.backward(dy, cache._replace(y=cache.x, beta=None), grads, **options)


def sign_without_the_bias(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    return batch_norm.backward(dy, cache._replace(beta=cache.beta * 0), grads, **options)


def what_was_added_is_not_rectified(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    dx, added = batch_norm.backward(dy, cache, grads, **options)
    return dx, None if added is None else image_of(dy).copy()


def a_mean_that_is_off(dy: Any, cache: Any, grads: Grads, **options: Any) -> Any:
    return batch_norm.backward(dy, cache._replace(mean=cache.mean * (1 + 1e-9)), grads, **options)


@pytest.mark.parametrize(
    ("mistake", "options", "match"),
    [
        (statistics_as_constants, {}, "gradient of input 0"),
        (statistics_that_move, {"train": False}, "gradient of input 0"),
        (slope_without_gamma, {}, "gradient of input 0"),
        (slope_without_gamma, {"train": False}, "gradient of input 0"),
        (gamma_of_the_output, {}, "gradient of bn.weight"),
        (a_mean_that_is_off, {}, "gradient of bn.weight"),
        (rectifier_forgotten, {"rectify": True, "add": False}, "gradient of (input 0|bn.weight)"),
        (rectifier_of_the_input, {"rectify": True, "add": False}, "gradient of (input 0|bn.weight)"),
        (sign_without_the_bias, {"rectify": True, "add": False}, "gradient of (input 0|bn.weight)"),
        (rectifier_forgotten, {"rectify": True, "add": True}, "gradient of (input 0|bn.weight)"),
        (what_was_added_is_not_rectified, {"rectify": True, "add": True}, "gradient of input 1"),
    ],
)
def test_mistakes_in_backward(mistake: Callable[..., Any], options: dict[str, Any], match: str) -> None:
    def mistaken(rng: np.random.Generator, **sizes: Any) -> Layer:
        return make(rng, backward=mistake, **sizes)

    usual = {"train": True, "add": False, "rectify": False} | options
    with pytest.raises(AssertionError, match=f"{match} is .* along a random direction"):
        check_layer(mistaken, SIZES | {k: [v] for k, v in usual.items()}, max_examples=8, shrink=False)


def biased_running_variance(params: Params, name: str, x: np.ndarray, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(params, name, x, **options)
    if options["train"]:
        m, n = options["momentum"], x[0].size
        old = np.asarray(params[OF.running_var])
        after[OF.running_var] = (1 - m) * old + (after[OF.running_var] - (1 - m) * old) * (n - 1) / n
    return y, cache, after


def unbiased_in_the_output(params: Params, name: str, x: np.ndarray, **options: Any) -> Any:
    if not options["train"]:
        return batch_norm.forward(params, name, x, **options)
    n = x[0].size
    wider = {**options, "eps": options["eps"] + float(x[0].var()) / (n - 1)}
    return batch_norm.forward(params, name, x, **wider)


def momentum_the_other_way(*arguments: Any, **options: Any) -> Any:
    return batch_norm.forward(*arguments, **{**options, "momentum": 1 - options["momentum"]})


def batch_statistics_in_evaluation(*arguments: Any, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(*arguments, **{**options, "train": True})
    return y, cache, after if options["train"] else {}


def eps_outside_the_root(*arguments: Any, **options: Any) -> Any:
    eps = options["eps"]
    return batch_norm.forward(*arguments, **{**options, "eps": eps**2})


def not_counted(*arguments: Any, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(*arguments, **options)
    if after:
        after[OF.num_batches_tracked] = arguments[0][OF.num_batches_tracked]
    return y, cache, after


def rectified_before_adding(*arguments: Any, add: Any, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(*arguments, **options)
    return y + add, cache._replace(added=True), after


def written_beside_the_margin(*arguments: Any, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(*arguments, **options)
    y.whole[:, :-1] = y.whole[:, 1:].copy()
    return y, cache, after


USUAL: dict[str, Any] = {"channels": 3, "positions": (2, 2), "batch": 4, "momentum": 0.1, "eps": 1e-2}
FOLLOWED: dict[str, Any] = {"add": True, "rectify": True}


def test_the_layer_itself_agrees_with_torch() -> None:
    check_against_torch(0, **USUAL)
    check_against_torch(0, **USUAL, **FOLLOWED)
    check_against_torch(0, **USUAL, margin=1)


@pytest.mark.parametrize(
    ("mistake", "options"),
    [
        (biased_running_variance, {}), (unbiased_in_the_output, {}), (momentum_the_other_way, {}),
        (batch_statistics_in_evaluation, {}), (eps_outside_the_root, {}), (not_counted, {}),
        (rectified_before_adding, FOLLOWED), (written_beside_the_margin, {"margin": 1}),
    ],
)  # fmt: skip
def test_mistakes_that_torch_shows(mistake: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check_against_torch(0, **USUAL, **options, forward=mistake)
