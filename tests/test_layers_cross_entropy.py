"""Softmax cross-entropy and its decoder, tied and untied."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from refimpl import kernels
from refimpl.layers import cross_entropy, embedding
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Grads, Params, SparseWeight, Support

# Few different panel widths, because the compiled tier makes one kernel for each.
COLUMNS = [(1, 1), (1, 4), (2, 2), (3, 1), (2, 3), (4, 2)]


pytestmark = pytest.mark.usefixtures("tier")


def make_decoder(rng: np.random.Generator, *, words: int, hidden: int, columns: tuple[int, int], bias: bool) -> Layer:
    targets = rng.integers(0, words, columns)
    params: Params = {"w": rng.standard_normal((words, hidden))}
    if bias:
        params["b"] = rng.standard_normal(words)
    return Layer(
        lambda p, x: cross_entropy.forward(p, "w", "b" if bias else None, x, targets),
        lambda dy, cache, grads, dx: cross_entropy.backward(cache, grads),
        params,
        (rng.standard_normal((columns[0], hidden, columns[1])),),
        sparse=("w",),
        optional_dx=False,
    )


def test_decoder() -> None:
    sizes: dict[str, Any] = {"words": range(1, 8), "hidden": range(1, 5), "columns": COLUMNS, "bias": [True, False]}
    check_layer(make_decoder, sizes)


def test_decoder_over_several_panels() -> None:
    sizes: dict[str, Any] = {"words": [5], "hidden": [3], "columns": [(20, 4)], "bias": [True]}
    check_layer(make_decoder, sizes, max_examples=2)


def make_tied(rng: np.random.Generator, *, words: int, hidden: int, columns: tuple[int, int], bias: bool) -> Layer:
    """Make an embedding that is its own decoder, with a nonlinear function between: one key, two gradients."""
    tokens, targets = rng.integers(0, words, columns), rng.integers(0, words, columns)
    params: Params = {"w": rng.standard_normal((words, hidden))}
    if bias:
        params["b"] = rng.standard_normal(words)

    def forward(p: Params) -> tuple[float, Any]:
        x, looked_up = embedding.forward(p, "w", tokens)
        y = np.tanh(x)
        loss, decoded = cross_entropy.forward(p, "w", "b" if bias else None, y, targets)
        return loss, (looked_up, y, decoded)

    def backward(dy: float, cache: Any, grads: Grads, input_gradient: bool) -> None:
        looked_up, y, decoded = cache
        dx = cross_entropy.backward(decoded, grads)
        embedding.backward(dx * (1 - y**2), looked_up, grads)

    return Layer(forward, backward, params, sparse=("w",))


def test_tied_decoder() -> None:
    sizes: dict[str, Any] = {"words": range(1, 8), "hidden": range(1, 5), "columns": COLUMNS, "bias": [True, False]}
    check_layer(make_tied, sizes)


def closed_form(z: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean loss of logits (V, N) and its gradient, from SciPy's softmax."""
    n = targets.size
    log_p = log_softmax(z, axis=0)
    gradient = np.exp(log_p)
    gradient[targets, np.arange(n)] -= 1
    return -log_p[targets, np.arange(n)].mean(), gradient / n


@given(st.integers(2, 7), st.sampled_from(COLUMNS), st.integers(0, 1000), st.sampled_from([1.0, 30.0, 1e4]))
def test_loss_is_the_mean_over_positions(words: int, columns: tuple[int, int], seed: int, size: float) -> None:
    """Logits are set by the features through a decoder of ones and zeros, so they carry no rounding."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, words, columns)
    x = size * rng.standard_normal((columns[0], words, columns[1]))
    params: Params = {"w": np.eye(words)}
    with np.errstate(over="raise", invalid="raise"):
        loss, cache = cross_entropy.forward(params, "w", None, x, targets)
        dx = cross_entropy.backward(cache, {})
    expected, gradient = closed_form(x.transpose(1, 0, 2).reshape(words, -1), targets.reshape(-1))
    # The logarithm of a sum of `words` exponentials: each term is right to a few units, relative to the
    # largest logit, which is subtracted first.
    eps = 8 * words * np.finfo(float).eps
    assert abs(loss - expected) <= eps * max(1.0, np.abs(x).max())
    picture = dx.transpose(1, 0, 2).reshape(words, -1)
    np.testing.assert_allclose(picture, gradient, rtol=0, atol=eps * max(1.0, np.abs(x).max()))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_do_not_overflow(dtype: Any, sparse: bool) -> None:
    x = np.zeros((1, 3, 2), dtype)
    x[0, :, 0], x[0, :, 1] = [3e4, -3e4, 0], [-3e4, -3e4, -2e4]
    identity = np.eye(3, dtype=dtype)
    params: Params = {"w": SparseWeight.from_dense(identity) if sparse else identity}
    for targets, expected in (([[0, 2]], 0.0), ([[1, 1]], (6e4 + 1e4) / 2)):
        loss, cache = cross_entropy.forward(params, "w", None, x, np.array(targets))
        assert loss == expected  # the numbers are small integers, and all probabilities 0 (or the least number) or 1
        dx = cross_entropy.backward(cache, {})
        rows = np.array([0, 2])
        wanted = np.zeros((3, 2), dtype)
        wanted[rows, [0, 1]] += 0.5
        wanted[targets[0], [0, 1]] -= 0.5
        np.testing.assert_allclose(dx[0], wanted, rtol=0, atol=2 * np.finfo(dtype).tiny)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("sparse", [False, True])
def test_columns_that_fill_a_panel_have_no_gradient(columns: tuple[int, int], sparse: bool) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 3))
    params: Params = {"w": SparseWeight.from_dense(w * (w > 0)) if sparse else w, "b": 100 * rng.standard_normal(5)}
    x, targets = rng.standard_normal((columns[0], 3, columns[1])), rng.integers(0, 5, columns)
    _, cache = cross_entropy.forward(params, "w", "b", x, targets)
    labels = kernels.to_panels(targets[:, None, :], fill=-1, itemsize=8)[:, 0, :]
    padding = labels < 0
    assert padding.sum() == labels.size - targets.size
    by_column = cache.d_logits.transpose(0, 2, 1)
    np.testing.assert_array_equal(by_column[padding], 0)
    # Where a column counts, softmax minus an indicator sums to zero: `words` roundings of numbers below 1.
    np.testing.assert_allclose(by_column[~padding].sum(1), 0, atol=5 * 4 * np.finfo(float).eps)


def test_logits_become_their_gradient_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = kernels.softmax_cross_entropy

    def spy(logits: np.ndarray, targets: np.ndarray, scale: float) -> float:
        seen.append(logits)
        return inner(logits, targets, scale)

    monkeypatch.setattr(kernels, "softmax_cross_entropy", spy)
    rng = np.random.default_rng(0)
    params: Params = {"w": rng.standard_normal((5, 3))}
    _, cache = cross_entropy.forward(params, "w", None, rng.standard_normal((2, 3, 4)), rng.integers(0, 5, (2, 4)))
    assert cache.d_logits is seen[0]


@pytest.mark.parametrize("sparse", [False, True])
def test_one_array_of_the_vocabulary(sparse: bool, tier: str) -> None:
    """Forward, backward and the gradient on the support: never two arrays of vocabulary × columns."""
    words, hidden, steps, batch = 4000, 2, 10, 20
    rng = np.random.default_rng(0)
    w = rng.standard_normal((words, hidden))
    support = Support.from_mask(rng.random(w.shape) < 0.5)
    params: Params = {"w": SparseWeight.from_dense(w, support) if sparse else w, "b": np.zeros(words)}
    x, targets = rng.standard_normal((steps, hidden, batch)), rng.integers(0, words, (steps, batch))

    def step() -> None:
        grads: Grads = {}
        _, cache = cross_entropy.forward(params, "w", "b", x, targets)
        cross_entropy.backward(cache, grads)
        gradient = grads["w"]
        assert not isinstance(gradient, np.ndarray)
        _ = gradient.on(support) if sparse else gradient.dense()  # as a training step evaluates it

    step()  # compile outside the measurement
    kernels.memory.trim()
    tracemalloc.start()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kernels.memory.trim()
    # Panels may be filled up, here from 200 columns to 240, and a panel at a time may be held twice.
    assert peak < 1.75 * words * steps * batch * 8
