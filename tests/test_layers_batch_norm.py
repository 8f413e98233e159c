"""Batch norm: the laws of every layer in both modes, torch with its running statistics, what is exact."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import BUFFERS, OF, SIZES, check_against_torch, drawn, make

from refimpl import kernels
from refimpl.layers import batch_norm
from refimpl.testing.layers import check_layer
from refimpl.weights import Grads, Params


@pytest.fixture(params=kernels.TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on each tier."""
    with kernels.use(request.param):
        yield request.param


@pytest.mark.parametrize("add", [False, True])
def test_batch_norm(tier: str, add: bool) -> None:
    check_layer(make, {**SIZES, "add": [add]}, max_examples=30)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1), channels=st.integers(1, 4), positions=st.sampled_from([(), (1, 1), (3, 2)]),
    batch=st.integers(5, 9), momentum=st.sampled_from([0.1, 0.9, 1.0, 0.0, None]), eps=st.sampled_from([1e-5, 1e-2]),
    add=st.booleans(), rectify=st.booleans(), margin=st.integers(0, 2), tier=st.sampled_from(kernels.TIERS),
)  # fmt: skip
def test_batch_norm_of_torch(seed: int, tier: str, **sizes: Any) -> None:
    with kernels.use(tier):
        check_against_torch(seed, **sizes)


def test_batch_norm_by_definition(tier: str) -> None:
    """Numbers whose mean, variance and root are exact."""
    x = np.array([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 10.0]])  # means 4 and 4, variances 5 and 12
    params: Params = {OF.weight: np.array([2.0, 3.0]), OF.bias: np.array([10.0, -1.0])}
    params |= batch_norm.new_buffers("bn", 2, float)
    for eps, channel, root in ((11.0, 0, 4.0), (4.0, 1, 4.0)):
        y, _, after = batch_norm.forward(params, "bn", x, train=True, momentum=0.5, eps=eps)
        gamma, beta = (np.asarray(params[name])[channel] for name in (OF.weight, OF.bias))
        np.testing.assert_array_equal(y[channel], (x[channel] - 4) * gamma / root + beta)
    assert after[OF.running_mean].tolist() == [2, 2]
    assert after[OF.running_var].tolist() == [0.5 + 0.5 * (4 / 3) * 5, 0.5 + 0.5 * (4 / 3) * 12]
    assert int(after[OF.num_batches_tracked]) == 1
    seen, _, same = batch_norm.forward({**params, OF.running_var: np.array([4.0, 16.0])}, "bn", x, train=False, eps=0.0)
    np.testing.assert_array_equal(seen, np.array([x[0] + 10, x[1] * (3 / 4) - 1]))
    assert same == {}


def test_what_follows_by_definition(tier: str) -> None:
    x = np.array([[0.0, 2.0, 0.0, 2.0]])  # mean 1, variance 1: y = -2, 2, -2, 2
    params: Params = {OF.weight: np.array([2.0]), OF.bias: np.array([0.0])} | batch_norm.new_buffers("bn", 1, float)
    more = np.array([[3.0, 3.0, 1.0, -5.0]])
    y, cache, _ = batch_norm.forward(params, "bn", x, train=True, eps=0.0, add=more)
    assert y.tolist() == [[1, 5, -1, -3]]
    dy = np.array([[1.0, 2.0, 3.0, 4.0]])
    dx, added = batch_norm.backward(dy, cache, {})
    assert added is dy
    y, cache, _ = batch_norm.forward(params, "bn", x, train=True, eps=0.0, add=more, rectify=True)
    assert y.tolist() == [[1, 5, 0, 0]]
    grads: Grads = {}
    dx, added = batch_norm.backward(dy, cache, grads)
    assert added.tolist() == [[1, 2, 0, 0]]
    assert (grads[OF.weight], grads[OF.bias]) == (1.0, 3.0)  # -1 + 2 with x hat = -1, 1, -1, 1
    np.testing.assert_array_equal(dx, 2 * (np.array([[1, 2, 0, 0]]) - 3 / 4 - np.array([[-1, 1, -1, 1]]) / 4))


@given(st.integers(0, 2**32 - 1), st.sampled_from([(), (3, 2)]))
def test_what_training_normalises(seed: int, positions: tuple[int, ...]) -> None:
    """Channels have mean beta and variance gamma^2 v / (v + eps); shift and scale of the input do not matter."""
    rng = np.random.default_rng(seed)
    params = drawn(rng, 3)
    x = rng.standard_normal((3, *positions, 7))
    y, cache, _ = batch_norm.forward(params, "bn", x, train=True, eps=1e-30)
    flat = y.reshape(3, -1)
    np.testing.assert_allclose(flat.mean(1), np.asarray(params[OF.bias]), rtol=0, atol=1e-13)
    np.testing.assert_allclose(flat.var(1), np.square(np.asarray(params[OF.weight])), rtol=1e-13)
    other, _, _ = batch_norm.forward(params, "bn", 8 * x, train=True, eps=64e-30)
    np.testing.assert_array_equal(other, y)  # powers of two do not round
    # So no gradient goes along the input, nor along a shift: dx is orthogonal to x hat and to ones.
    dy = rng.standard_normal(x.shape)
    dx = batch_norm.backward(dy, cache, {}).dx.reshape(3, -1)
    normalised = (x.reshape(3, -1) - cache.mean[:, None]) * cache.scale[:, None]
    assert np.abs(dx.sum(1)).max() < 1e-11
    assert np.abs((dx * normalised).sum(1)).max() < 1e-11


def test_nothing_is_changed_in_place(tier: str) -> None:
    rng = np.random.default_rng(0)
    params = drawn(rng, 2)
    x = rng.standard_normal((2, 6))
    before = {name: np.array(b) for name, b in params.items()}
    kept = x.copy()
    _, _, after = batch_norm.forward({**params, "other": np.ones(1)}, "bn", x, train=True)
    assert sorted(after) == sorted(BUFFERS)
    for name, array in before.items():
        np.testing.assert_array_equal(np.asarray(params[name]), array)
    for name in BUFFERS:
        assert not np.array_equal(after[name], before[name])
        assert after[name].dtype == before[name].dtype
        assert after[name].shape == before[name].shape
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("margin", [0, 1])
def test_float32_stays_float32(tier: str, train: bool, margin: int) -> None:
    rng = np.random.default_rng(0)
    params = drawn(rng, 2, np.float32)
    x = rng.standard_normal((2, 3, 3, 6), dtype=np.float32)
    y, cache, after = batch_norm.forward(params, "bn", x, train=train, add=x, rectify=True, margin=margin)
    grads: Grads = {}
    dx, added = batch_norm.backward(y, cache, grads, margin=margin)
    arrays = [y, dx, added, grads[OF.weight], grads[OF.bias], *(after[name] for name in BUFFERS[:2] if train)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


@pytest.mark.parametrize("size", [5, 37])
def test_a_channel_that_does_not_vary_is_its_bias(tier: str, size: int) -> None:
    params = drawn(np.random.default_rng(0), 2)
    y, cache, _ = batch_norm.forward(params, "bn", np.full((2, size), 3.0), train=True)
    np.testing.assert_array_equal(y, np.broadcast_to(np.asarray(params[OF.bias])[:, None], (2, size)))
    dx, _ = batch_norm.backward(np.ones((2, size)), cache, {})
    np.testing.assert_array_equal(dx, np.zeros((2, size)))


def test_not_a_number_passes_the_rectifier_both_ways(tier: str) -> None:
    params = drawn(np.random.default_rng(0), 2)
    x = np.ones((2, 20))
    x[1, 3] = np.nan
    for train in (True, False):
        y, cache, _ = batch_norm.forward(params, "bn", x, train=train, rectify=True, add=x)
        spread = np.array([[False], [True]]) if train else np.isnan(x)  # through the mean to all of a channel
        np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(spread, x.shape))
        dx, added = batch_norm.backward(x, cache, {})
        assert np.isnan(dx[1, 3])
        assert np.isnan(added[1, 3])
        assert not np.isnan(dx[0]).any()


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((2, 1), {}, r"bn has 1 number for each channel of an array of shape \(2, 1\); to train"),
        ((2, 1, 1, 1), {}, "larger batch or larger images"),
        ((3, 4), {}, r"shape \(3, 4\), bn.weight of shape \(2,\) and bn.bias of shape \(2,\); batch norm takes"),
        ((2,), {}, "batch norm takes"),
        ((2, 4), {"margin": 1}, r"shape \(2, 4\) and a margin of 1; only images"),
        ((2, 4), {"add": np.ones((2, 5))}, r"of shape \(2, 4\) and is to add float64 of shape \(2, 5\)"),
        ((2, 4), {"add": np.ones((2, 4), np.float32)}, "give both in one shape and type"),
    ],
)
def test_what_does_not_fit(shape: tuple[int, ...], options: dict[str, Any], match: str) -> None:
    params = drawn(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match=match):
        batch_norm.forward(params, "bn", np.ones(shape), train=True, **options)


def test_a_gradient_that_does_not_fit() -> None:
    params = drawn(np.random.default_rng(0), 2)
    _, cache, _ = batch_norm.forward(params, "bn", np.ones((2, 3, 3, 4)), train=True)
    with pytest.raises(
        ValueError, match=r"dy is float64 of shape \(2, 3, 4, 3\); it must be float64 of shape \(2, 3, 3"
    ):
        batch_norm.backward(np.ones((2, 3, 4, 3)), cache, {})


def test_one_number_per_channel_can_be_evaluated(tier: str) -> None:
    params = drawn(np.random.default_rng(0), 2)
    y, _, _ = batch_norm.forward(params, "bn", np.zeros((2, 1)), train=False)
    np.testing.assert_array_equal(y[:, 0], np.asarray(params[OF.bias]))
