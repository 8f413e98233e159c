"""Batch norm: the laws of every layer in both modes, torch with its running statistics, planted mistakes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.layers import batch_norm
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, add_to

OF = batch_norm.names("bn")
SIZES: dict[str, Any] = {
    "channels": range(1, 4), "positions": [(), (2, 2), (1, 3)], "batch": [4, 5], "train": [True, False],
}  # fmt: skip


def make(
    rng: np.random.Generator, *, channels: int, positions: tuple[int, ...], batch: int, train: bool,
    forward: Callable[..., Any] = batch_norm.forward, backward: Callable[..., Any] = batch_norm.backward,
) -> Layer:  # fmt: skip
    """Make a layer whose numbers are well apart: little variance would amplify rounding."""
    shape = (channels, *positions, batch)
    x = rng.permuted(np.arange(np.prod(shape)).reshape(channels, -1), axis=1).reshape(shape) / 4
    params: Params = {OF.weight: rng.uniform(0.5, 2, channels), OF.bias: rng.standard_normal(channels)}
    buffers = {
        OF.running_mean: rng.standard_normal(channels),
        OF.running_var: rng.uniform(0.5, 2, channels),
        OF.num_batches_tracked: np.array(3),
    }

    def run(p: Params, x: np.ndarray) -> tuple[np.ndarray, Any]:
        kind = np.float32 if x.dtype == np.float32 else np.float64
        own = {name: b.astype(kind) for name, b in buffers.items()}
        y, cache, _ = forward(p, own, "bn", x, train=train)
        return y, cache

    return Layer(
        run,
        lambda dy, cache, grads, dx: backward(dy, cache, grads, input_gradient=dx),
        params,
        (x,),
        complex_step=True,
    )


def test_batch_norm() -> None:
    check_layer(make, SIZES, max_examples=40)


def drawn(rng: np.random.Generator, channels: int, dtype: Any = np.float64) -> tuple[Params, batch_norm.Buffers]:
    params: Params = {name: rng.uniform(0.5, 2, channels).astype(dtype) for name in (OF.weight, OF.bias)}
    return params, batch_norm.new_buffers("bn", channels, dtype)


def check_against_torch(
    seed: int, channels: int, positions: tuple[int, ...], batch: int, momentum: float | None, eps: float,
    forward: Callable[..., Any] = batch_norm.forward, backward: Callable[..., Any] = batch_norm.backward,
) -> None:  # fmt: skip
    """Three training steps and one in evaluation: outputs, gradients and statistics."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    params, buffers = drawn(rng, channels)
    kind = torch.nn.BatchNorm2d if positions else torch.nn.BatchNorm1d
    theirs = kind(channels, eps=eps, momentum=momentum).double()
    theirs.load_state_dict({k.removeprefix("bn."): torch.tensor(v) for k, v in (params | buffers).items()})
    for train in (True, True, True, False):
        x, dy = rng.standard_normal((2, channels, *positions, batch)) * 3 + 1
        y, cache, buffers = forward(params, buffers, "bn", x, train=train, momentum=momentum, eps=eps)
        grads: Grads = {}
        dx = backward(dy, cache, grads)
        theirs.train(train)
        theirs.zero_grad()
        x_torch = torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 0)), requires_grad=True)
        out = theirs(x_torch)
        out.backward(torch.tensor(np.ascontiguousarray(np.moveaxis(dy, -1, 0))))
        pairs = [
            (np.moveaxis(y, -1, 0), out.detach()),
            (np.moveaxis(dx, -1, 0), x_torch.grad),
            (grads[OF.weight], theirs.weight.grad),
            (grads[OF.bias], theirs.bias.grad),
            (buffers[OF.running_mean], theirs.running_mean),
            (buffers[OF.running_var], theirs.running_var),
        ]
        for ours, expected in pairs:
            scale = max(1.0, float(expected.abs().max()))
            np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-12 * scale)
        assert int(buffers[OF.num_batches_tracked]) == int(theirs.num_batches_tracked)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1), channels=st.integers(1, 4), positions=st.sampled_from([(), (1, 1), (3, 2)]),
    batch=st.integers(5, 9), momentum=st.sampled_from([0.1, 0.9, 1.0, 0.0, None]), eps=st.sampled_from([1e-5, 1e-2]),
)  # fmt: skip
def test_batch_norm_of_torch(seed: int, **sizes: Any) -> None:
    check_against_torch(seed, **sizes)


def test_batch_norm_by_definition() -> None:
    """Numbers whose mean and variance are exact."""
    x = np.array([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 10.0]])  # means 4 and 4, variances 5 and 12
    params: Params = {OF.weight: np.array([2.0, 3.0]), OF.bias: np.array([10.0, -1.0])}
    buffers = batch_norm.new_buffers("bn", 2, float)
    y, _, after = batch_norm.forward(params, buffers, "bn", x, train=True, momentum=0.5, eps=4.0)
    root = np.sqrt([9.0, 16.0])[:, None]
    np.testing.assert_array_equal(y, np.array([[2.0], [3.0]]) * ((x - 4) * (1 / root)) + np.array([[10.0], [-1.0]]))
    assert after[OF.running_mean].tolist() == [2, 2]
    assert after[OF.running_var].tolist() == [0.5 + 0.5 * (4 / 3) * 5, 0.5 + 0.5 * (4 / 3) * 12]
    assert int(after[OF.num_batches_tracked]) == 1
    seen, _, same = batch_norm.forward(params, after, "bn", x, train=False, eps=0.0)
    expected = (x - 2) * (1 / np.sqrt(after[OF.running_var]))[:, None]
    np.testing.assert_array_equal(seen, expected * np.array([[2.0], [3.0]]) + np.array([[10.0], [-1.0]]))
    assert all(same[name] is after[name] for name in after)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(), (3, 2)]))
def test_what_training_normalises(seed: int, positions: tuple[int, ...]) -> None:
    """Channels have mean beta and variance gamma^2 v / (v + eps); shift and scale of the input do not matter."""
    rng = np.random.default_rng(seed)
    params, buffers = drawn(rng, 3)
    x = rng.standard_normal((3, *positions, 7))
    y, cache, _ = batch_norm.forward(params, buffers, "bn", x, train=True, eps=1e-30)
    flat = y.reshape(3, -1)
    np.testing.assert_allclose(flat.mean(1), np.asarray(params[OF.bias]), rtol=0, atol=1e-13)
    np.testing.assert_allclose(flat.var(1), np.square(np.asarray(params[OF.weight])), rtol=1e-13)
    other, _, _ = batch_norm.forward(params, buffers, "bn", 8 * x, train=True, eps=64e-30)
    np.testing.assert_array_equal(other, y)  # powers of two do not round
    # So no gradient goes along the input, nor along a shift: dx is orthogonal to x hat and to ones.
    dy = rng.standard_normal(x.shape)
    dx = batch_norm.backward(dy, cache, {})
    assert dx is not None
    assert np.abs(dx.reshape(3, -1).sum(1)).max() < 1e-11
    assert np.abs((dx.reshape(3, -1) * cache.normalised).sum(1)).max() < 1e-11


def test_nothing_is_changed_in_place() -> None:
    rng = np.random.default_rng(0)
    params, buffers = drawn(rng, 2)
    x = rng.standard_normal((2, 6))
    before = {name: b.copy() for name, b in buffers.items()}
    kept = x.copy()
    _, _, after = batch_norm.forward(params, buffers | {"other": np.ones(1)}, "bn", x, train=True)
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(buffers[name], array)
        assert not np.array_equal(after[name], array)
        assert after[name].dtype == array.dtype
        assert after[name].shape == array.shape
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("train", [True, False])
def test_float32_stays_float32(train: bool) -> None:
    rng = np.random.default_rng(0)
    params, buffers = drawn(rng, 2, np.float32)
    x = rng.standard_normal((2, 3, 3, 6), dtype=np.float32)
    y, cache, after = batch_norm.forward(params, buffers, "bn", x, train=train)
    grads: Grads = {}
    dx = batch_norm.backward(y, cache, grads)
    assert dx is not None
    arrays = [y, dx, grads[OF.weight], grads[OF.bias], after[OF.running_mean], after[OF.running_var]]
    assert {array.dtype for array in arrays if isinstance(array, np.ndarray)} == {np.dtype(np.float32)}


def test_a_channel_that_does_not_vary_is_its_bias() -> None:
    params, buffers = drawn(np.random.default_rng(0), 2)
    y, cache, _ = batch_norm.forward(params, buffers, "bn", np.full((2, 5), 3.0), train=True)
    np.testing.assert_array_equal(y, np.broadcast_to(np.asarray(params[OF.bias])[:, None], (2, 5)))
    dx = batch_norm.backward(np.ones((2, 5)), cache, {})
    np.testing.assert_array_equal(dx, np.zeros((2, 5)))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 1), r"bn has 1 number for each channel of an array of shape \(2, 1\); to train"),
        ((2, 1, 1, 1), "larger batch or larger images"),
        ((3, 4), r"shape \(3, 4\), bn.weight of shape \(2,\) and bn.bias of shape \(2,\); batch norm takes"),
        ((2,), "batch norm takes"),
    ],
)
def test_what_does_not_fit(shape: tuple[int, ...], match: str) -> None:
    params, buffers = drawn(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match=match):
        batch_norm.forward(params, buffers, "bn", np.ones(shape), train=True)


def test_one_number_per_channel_can_be_evaluated() -> None:
    params, buffers = drawn(np.random.default_rng(0), 2)
    y, _, _ = batch_norm.forward(params, buffers, "bn", np.zeros((2, 1)), train=False)
    np.testing.assert_array_equal(y[:, 0], params[OF.bias])


# --- planted mistakes -----------------------------------------------------------------------------------------


def statistics_as_constants(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    """Backward of evaluation where the statistics were those of the batch."""
    return batch_norm.backward(dy, cache._replace(train=False), grads, **options)


def statistics_that_move(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    """Backward of training where the statistics were the running ones."""
    return batch_norm.backward(dy, cache._replace(train=True), grads, **options)


def variance_is_constant(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    batch_norm.backward(dy, cache, grads, **options)
    flat = dy.reshape(len(dy), -1)
    return (cache.slope * (flat - flat.mean(1, keepdims=True))).reshape(dy.shape) if options["input_gradient"] else None


def slope_without_gamma(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    return batch_norm.backward(dy, cache._replace(slope=np.ones_like(cache.slope)), grads, **options)


def gamma_of_the_output(dy: np.ndarray, cache: Any, grads: Grads, **options: bool) -> Any:
    own: Grads = {}
    dx = batch_norm.backward(dy, cache, own, **options)
    add_to(grads, OF.bias, own[OF.bias])
    add_to(grads, OF.weight, own[OF.bias])
    return dx


@pytest.mark.parametrize(
    ("mistake", "train", "match"),
    [
        (statistics_as_constants, True, "gradient of input 0"),
        (statistics_that_move, False, "gradient of input 0"),
        (variance_is_constant, True, "gradient of input 0"),
        (slope_without_gamma, True, "gradient of input 0"),
        (slope_without_gamma, False, "gradient of input 0"),
        (gamma_of_the_output, True, "gradient of bn.weight"),
    ],
)
def test_mistakes_in_backward(mistake: Callable[..., Any], train: bool, match: str) -> None:
    def mistaken(rng: np.random.Generator, **sizes: Any) -> Layer:
        return make(rng, backward=mistake, **sizes)

    with pytest.raises(AssertionError, match=f"{match} is .* along a random direction"):
        check_layer(mistaken, {**SIZES, "train": [train]}, max_examples=5, shrink=False)


def biased_running_variance(*arguments: Any, **options: Any) -> Any:
    _, buffers, _, x = arguments
    y, cache, after = batch_norm.forward(*arguments, **options)
    if options["train"]:
        m, n = options["momentum"], x[0].size
        old = buffers[OF.running_var]
        after[OF.running_var] = (1 - m) * old + (after[OF.running_var] - (1 - m) * old) * (n - 1) / n
    return y, cache, after


def unbiased_in_the_output(*arguments: Any, **options: Any) -> Any:
    params, buffers, name, x = arguments
    if not options["train"]:
        return batch_norm.forward(*arguments, **options)
    n = x[0].size
    wider = {**options, "eps": options["eps"] + x.reshape(len(x), -1).var(1) / (n - 1)}
    return batch_norm.forward(params, buffers, name, x, **wider)


def momentum_the_other_way(*arguments: Any, **options: Any) -> Any:
    return batch_norm.forward(*arguments, **{**options, "momentum": 1 - options["momentum"]})


def batch_statistics_in_evaluation(*arguments: Any, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(*arguments, **{**options, "train": True})
    return y, cache, after if options["train"] else arguments[1]


def eps_outside_the_root(*arguments: Any, **options: Any) -> Any:
    eps = options["eps"]
    return batch_norm.forward(*arguments, **{**options, "eps": eps**2})


def not_counted(*arguments: Any, **options: Any) -> Any:
    y, cache, after = batch_norm.forward(*arguments, **options)
    return y, cache, after | {OF.num_batches_tracked: arguments[1][OF.num_batches_tracked]}


def test_the_layer_itself_agrees_with_torch() -> None:
    check_against_torch(0, 3, (2, 2), 4, 0.1, 1e-2)


@pytest.mark.parametrize(
    "mistake",
    [
        biased_running_variance, unbiased_in_the_output, momentum_the_other_way, batch_statistics_in_evaluation,
        eps_outside_the_root, not_counted,
    ],
)  # fmt: skip
def test_mistakes_that_torch_shows(mistake: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_against_torch(0, 3, (2, 2), 4, 0.1, 1e-2, forward=mistake)
