"""The LSTM layer: the laws of every layer, carried state, weight drop."""

from typing import Any

import numpy as np
import pytest

from refimpl.layers import lstm
from refimpl.rng import generator
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import Params, SparseWeight, Support, values_of

EPS = float(np.finfo(float).eps)
# Few different panel widths, because the compiled tier makes one kernel for each.
COLUMNS = [(1, 1), (1, 4), (2, 2), (3, 1), (2, 3), (4, 2)]
IH, HH, B_IH, B_HH = lstm.names(0)


pytestmark = pytest.mark.usefixtures("tier")


def draw_params(rng: np.random.Generator, inputs: int, hidden: int) -> Params:
    shapes = {IH: (4 * hidden, inputs), HH: (4 * hidden, hidden), B_IH: (4 * hidden,), B_HH: (4 * hidden,)}
    return {name: rng.uniform(-1, 1, shape) for name, shape in shapes.items()}


def draw_state(rng: np.random.Generator, hidden: int, batch: int) -> lstm.State:
    return lstm.State(rng.uniform(-1, 1, (hidden, batch)), rng.uniform(-1, 1, (hidden, batch)))


def sparsened(params: Params, rng: np.random.Generator, density: float = 0.5) -> Params:
    return {
        name: SparseWeight.from_dense(w, Support.from_mask(rng.random(w.shape) < density))
        if isinstance(w, np.ndarray) and name in (IH, HH) else w
        for name, w in params.items()
    }  # fmt: skip


def make_lstm(
    rng: np.random.Generator,
    *,
    inputs: int,
    hidden: int,
    columns: tuple[int, int],
    weight_drop: float = 0.0,
    sparse: tuple[str, ...] = (IH, HH),
) -> Layer:
    steps, batch = columns
    state = draw_state(rng, hidden, batch)

    def forward(params: Params, x: np.ndarray) -> tuple[np.ndarray, Any]:
        draws = generator(2, "weight-drop")
        y, _, cache = lstm.forward(params, 0, x, state, weight_drop=weight_drop, rng=draws)
        return y, cache

    return Layer(
        forward,
        lambda dy, cache, grads, dx: lstm.backward(dy, cache, grads, input_gradient=dx),
        draw_params(rng, inputs, hidden),
        (rng.standard_normal((steps, inputs, batch)),),
        sparse=sparse,
        same_draws=not weight_drop,
        complex_step=True,
    )


def test_lstm() -> None:
    check_layer(make_lstm, {"inputs": range(1, 5), "hidden": range(1, 5), "columns": COLUMNS})


def test_lstm_with_one_sparse_weight() -> None:
    sizes: dict[str, Any] = {"inputs": [3], "hidden": [2], "columns": COLUMNS, "sparse": [(IH,), (HH,)]}
    check_layer(make_lstm, sizes, max_examples=6)


def test_lstm_with_weight_drop() -> None:
    sizes: dict[str, Any] = {"inputs": [2], "hidden": range(1, 5), "columns": COLUMNS, "weight_drop": [0.3, 0.8]}
    check_layer(make_lstm, sizes, max_examples=10)


def test_lstm_over_several_panels() -> None:
    """Steps that share panels, the last of which is not full, and a batch that is cut."""
    check_layer(make_lstm, {"inputs": [3], "hidden": [2], "columns": [(20, 4), (2, 125)]}, max_examples=4)


def by_loops(params: Params, x: np.ndarray, state: lstm.State) -> np.ndarray:
    """Run the equations of the docstring, one number at a time."""
    w_ih, w_hh = (w.dense() if isinstance(w, SparseWeight) else w for w in (params[IH], params[HH]))
    bias = values_of(params[B_IH]) + values_of(params[B_HH])
    size = len(state.h)
    out = np.empty((len(x), size, x.shape[2]))
    for b in range(x.shape[2]):
        h, c = state.h[:, b], state.c[:, b].copy()
        for t in range(len(x)):
            a = [w_ih[r] @ x[t, :, b] + w_hh[r] @ h + bias[r] for r in range(4 * size)]
            for u in range(size):
                i, f, o = (1 / (1 + np.exp(-a[gate * size + u])) for gate in (0, 1, 3))
                c[u] = f * c[u] + i * np.tanh(a[2 * size + u])
                out[t, u, b] = o * np.tanh(c[u])
            h = out[t, :, b]
    return out


def test_lstm_by_loops() -> None:
    rng = np.random.default_rng(0)
    params, state, x = draw_params(rng, 3, 2), draw_state(rng, 2, 2), rng.standard_normal((4, 3, 2))
    for some in (params, sparsened(params, rng)):
        y, _, _ = lstm.forward(some, 0, x, state)
        # Some 20 roundings a step, and numbers of order one with gains below one from step to step.
        np.testing.assert_allclose(y, by_loops(some, x, state), rtol=0, atol=4 * 20 * EPS)


@pytest.mark.parametrize("sparse", [False, True])
def test_two_windows_are_one_long_window(sparse: bool) -> None:
    rng = np.random.default_rng(1)
    params, state, x = draw_params(rng, 3, 2), draw_state(rng, 2, 2), rng.standard_normal((4, 3, 2))
    if sparse:
        params = sparsened(params, rng)
    whole, end, _ = lstm.forward(params, 0, x, state)
    first, middle, _ = lstm.forward(params, 0, x[:2], state)
    second, last, _ = lstm.forward(params, 0, x[2:], middle)
    # A product over other panels may add in another order: some 20 roundings a step again.
    np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=0, atol=4 * 20 * EPS)
    np.testing.assert_allclose(last.h, end.h, rtol=0, atol=4 * 20 * EPS)
    np.testing.assert_allclose(last.c, end.c, rtol=0, atol=4 * 20 * EPS)
    np.testing.assert_array_equal(last.h, second[-1])


@pytest.mark.parametrize("sparse", [False, True])
def test_the_state_is_a_constant(sparse: bool) -> None:
    """The second window's gradients do not depend on how the state came about, and none reach the first."""
    rng = np.random.default_rng(2)
    params, state, x = draw_params(rng, 3, 2), draw_state(rng, 2, 2), rng.standard_normal((4, 3, 2))
    if sparse:
        params = sparsened(params, rng)
    _, middle, _ = lstm.forward(params, 0, x[:2], state)
    dy = rng.standard_normal((2, 2, 2))
    results: list[dict[str, Any]] = []
    for begin in (middle, lstm.State(middle.h.copy(), middle.c.copy())):
        _, _, cache = lstm.forward(params, 0, x[2:], begin)
        grads: dict[str, Any] = {}
        dx = lstm.backward(dy, cache, grads)
        assert dx is not None
        assert dx.shape == (2, 3, 2)
        results.append(grads)
    # The whole window's gradient for the same dy holds the way through the state as well.
    _, _, cache = lstm.forward(params, 0, x, state)
    through: dict[str, Any] = {}
    lstm.backward(np.concatenate([np.zeros((2, 2, 2)), dy]), cache, through)
    for name in (IH, HH):
        np.testing.assert_array_equal(results[0][name].dense(), results[1][name].dense())
        difference = results[0][name].dense() - through[name].dense()
        assert np.abs(difference).max() > 1e-3
    np.testing.assert_array_equal(results[0][B_IH], results[1][B_HH])  # the two biases have one gradient


@pytest.mark.parametrize("sparse", [False, True])
def test_weight_drop(sparse: bool) -> None:
    rng = np.random.default_rng(3)
    params, state, x = draw_params(rng, 3, 4), draw_state(rng, 4, 2), rng.standard_normal((4, 3, 2))
    if sparse:
        params = sparsened(params, rng)
    before = values_of(params[HH]).copy()
    y, _, cache = lstm.forward(params, 0, x, state, weight_drop=0.4, rng=generator(0, "w", 1))
    again, _, _ = lstm.forward(params, 0, x, state, weight_drop=0.4, rng=generator(0, "w", 1))
    np.testing.assert_array_equal(y, again)  # same draws, same entries
    np.testing.assert_array_equal(values_of(params[HH]), before)
    assert cache.dropped is not None
    assert set(np.unique(cache.dropped)) == {0.0, 1 / (1 - 0.4)}
    # The layer with those entries scaled by hand is the same layer.
    w = params[HH]
    dropped = SparseWeight(w.support, before * cache.dropped) if isinstance(w, SparseWeight) else w * cache.dropped
    by_hand, _, plain = lstm.forward({**params, HH: dropped}, 0, x, state)
    np.testing.assert_array_equal(y, by_hand)
    dy = rng.standard_normal(y.shape)
    grads: dict[str, Any] = {}
    plain_grads: dict[str, Any] = {}
    lstm.backward(dy, cache, grads)
    lstm.backward(dy, plain, plain_grads)
    support = w.support if isinstance(w, SparseWeight) else Support.full(w.shape)
    on = plain_grads[HH].on(support) * cache.dropped.reshape(-1)
    np.testing.assert_array_equal(grads[HH].on(support), on)
    options: Any
    for options in ({"weight_drop": 0.0, "rng": generator(0, "w")}, {"weight_drop": 0.4}):
        y, _, cache = lstm.forward(params, 0, x, state, **options)
        assert cache.dropped is None
        np.testing.assert_array_equal(y, lstm.forward(params, 0, x, state)[0])


def test_large_activations_saturate() -> None:
    """Gates far out neither overflow nor lose their limits."""
    rng = np.random.default_rng(4)
    params: Params = {name: 1e4 * values_of(w) for name, w in draw_params(rng, 3, 2).items()}
    state, x = lstm.zero_state(2, 2, float), rng.standard_normal((4, 3, 2))
    for some in (params, sparsened(params, rng)):
        with np.errstate(over="raise", invalid="raise"):
            y, _, cache = lstm.forward(some, 0, x, state)
            grads: dict[str, Any] = {}
            dx = lstm.backward(np.ones_like(y), cache, grads)
        assert dx is not None
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()
        assert np.abs(y).max() <= 1
