"""A dense weight of few rows goes through the sparse products, and nobody above the layer sees it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.layers import linear
from refimpl.rng import generator
from refimpl.testing.bounds import error_ratio, product_bound, wider
from refimpl.weights import LinearGrad, SparseWeight, Support

BATCHES = st.sampled_from([1, 3, 20, 33, 100])
DTYPES = st.sampled_from([np.float32, np.float64])


def problem(seed, rows, columns, batch, dtype):
    rng = generator(seed, "few rows")
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    return {"w": draw(rows, columns), "b": draw(rows)}, draw(columns, batch), draw(rows, batch)


def errors(params, x, dy) -> dict[str, float]:
    """Return each product's error over its bound; at most 1 if it is right."""
    y, cache = linear.forward(params, "w", "b", x)
    grads = {}
    dx = linear.backward(dy, cache, grads)
    gradient = grads["w"]
    assert isinstance(gradient, LinearGrad)
    assert gradient.shape == params["w"].shape
    wide = wider(x.dtype)
    w, b = params["w"], params["b"]
    ones = np.ones((1, x.shape[1]), x.dtype)
    products = {
        "y": (y, np.hstack([w, b[:, None]]), np.vstack([x, ones])),
        "dx": (dx, w.T, dy),
        "dw": (gradient.dense(), dy, x.T),
        "dw in blocks": (np.concatenate([block.copy() for _, block in gradient.blocks()]), dy, x.T),
        "dw on a support": (gradient.on(Support.full(w.shape)).reshape(w.shape), dy, x.T),
        "db": (grads["b"][:, None], dy, ones.T),
    }
    return {
        name: error_ratio(got, left.astype(wide) @ right.astype(wide), product_bound(left, right))
        for name, (got, left, right) in products.items()
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2 * linear.FEW_ROWS), st.integers(1, 60), BATCHES, DTYPES)
def test_its_products_are_those_of_a_matrix(seed, rows, columns, batch, dtype):
    assert max(errors(*problem(seed, rows, columns, batch, dtype)).values()) <= 1


def test_the_trained_numbers_stay_the_array():
    params, x, _ = problem(0, 10, 30, 20, np.float32)
    before, cache = linear.forward(params, "w", "b", x)
    assert isinstance(cache.w, SparseWeight)
    assert np.shares_memory(cache.w.values, params["w"])
    params["w"] *= 2  # an optimizer's step, in place
    after, _ = linear.forward(params, "w", None, x)
    assert np.allclose(after, 2 * (before - params["b"][:, None]), atol=1e-4)


@pytest.mark.parametrize("what", ["many rows", "strided", "of another type than x"])
def test_other_weights_stay_dense(what):
    params, x, _ = problem(0, 10 if what != "many rows" else linear.FEW_ROWS + 1, 30, 20, np.float64)
    if what == "strided":
        params["w"] = np.asfortranarray(params["w"])
    if what == "of another type than x":
        params["w"] = params["w"].astype(np.float32)
    y, cache = linear.forward(params, "w", "b", x)
    assert cache.w is params["w"]
    assert np.allclose(y, params["w"] @ x + params["b"][:, None])


def test_planted_mistakes_are_caught(monkeypatch):
    params, x, dy = problem(1, 10, 30, 20, np.float64)

    def wrong(values):
        return SparseWeight(Support.full(values.shape), np.ascontiguousarray(values.T).reshape(-1))

    for name, mistake in (
        ("values by columns", lambda w, x: wrong(w)),
        ("a copy with the first entry lost", lambda w, x: SparseWeight(Support.full(w.shape), np.r_[0, w.flat[1:]])),
    ):
        with monkeypatch.context() as planted:
            planted.setattr(linear, "_with_support", mistake)
            assert max(errors(params, x, dy).values()) > 1, name


@pytest.mark.parametrize("mistake", ["values in the tiles' order", "gradients in the tiles' order"])
def test_one_panel_finds_values_and_gradients_where_they_lie(monkeypatch, mistake):
    """The backward products of one wide panel read each value, and write each gradient, in the pattern's order."""
    if kernels.tier().__name__.endswith("spec"):
        pytest.skip("the compiled kernels alone have tiles")
    from refimpl.kernels.cpu import products
    from refimpl.testing.kernels import Case, check_matmul_t_sddmm

    case = Case(rows=520, columns=130, density=0.5, lead=(), batch=60, holes=False, dtype=np.float64)
    check_matmul_t_sddmm(kernels.tier(), case)
    right = products.run

    def run(function, *arguments, alone=False):
        if function is not products.gather_dot_moved:
            return right(function, *arguments, alone=alone)
        values, source, grad = arguments[1], arguments[3], arguments[-1]
        if mistake.startswith("values"):
            moved = np.empty_like(values)
            moved[source] = values
            return right(function, arguments[0], moved, *arguments[2:], alone=alone)
        right(function, *arguments, alone=alone)
        grad[:] = grad[source]
        return None

    monkeypatch.setattr(products, "run", run)
    with pytest.raises(AssertionError, match=r"as far from the reference|is wrong"):
        check_matmul_t_sddmm(kernels.tier(), case)
