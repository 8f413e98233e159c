"""Linear maps and embeddings: the laws of every layer, and their definitions by loops."""

from typing import Any

import numpy as np
import pytest

from refimpl.layers import embedding, linear
from refimpl.rng import generator
from refimpl.testing.layers import Layer, check_layer
from refimpl.weights import SparseWeight, Support, add_to

# Few different panel widths, because the compiled tier makes one kernel for each.
COLUMNS = [(1, 1), (1, 4), (2, 2), (3, 1), (2, 3), (4, 2)]


pytestmark = pytest.mark.usefixtures("tier")


def make_linear(
    rng: np.random.Generator, *, outputs: int, inputs: int, panels: tuple[int, ...], columns: int, bias: bool
) -> Layer:
    params: Any = {"w": rng.standard_normal((outputs, inputs))}
    if bias:
        params["b"] = rng.standard_normal(outputs)
    return Layer(
        lambda p, x: linear.forward(p, "w", "b" if bias else None, x),
        lambda dy, cache, grads, dx: linear.backward(dy, cache, grads, input_gradient=dx),
        params,
        (rng.standard_normal((*panels, inputs, columns)),),
        sparse=("w",),
        complex_step=True,
    )


def test_linear() -> None:
    sizes = {
        "outputs": range(1, 6),
        "inputs": range(1, 6),
        "panels": [(), (1,), (2,), (2, 1)],
        "columns": [1, 3, 4],
        "bias": [True, False],
    }
    check_layer(make_linear, sizes)


def test_linear_by_loops() -> None:
    rng = np.random.default_rng(0)
    w, b = rng.integers(-4, 5, (3, 4)).astype(float), rng.integers(-4, 5, 3).astype(float)
    x, dy = rng.integers(-4, 5, (2, 4, 3)).astype(float), rng.integers(-4, 5, (2, 3, 3)).astype(float)
    support = Support.from_mask(w > 0)
    for weight in (w, SparseWeight.from_dense(w, support)):
        dense = weight.dense() if isinstance(weight, SparseWeight) else weight
        y, cache = linear.forward({"w": weight, "b": b}, "w", "b", x)
        grads: dict[str, Any] = {}
        dx = linear.backward(dy, cache, grads)
        # Small integers: every sum is exact, so there is no bound.
        np.testing.assert_array_equal(y, np.einsum("rc,pcn->prn", dense, x) + b[:, None])
        np.testing.assert_array_equal(dx, np.einsum("rc,prn->pcn", dense, dy))
        np.testing.assert_array_equal(grads["w"].on(support), np.einsum("prn,pcn->rc", dy, x)[w > 0])
        np.testing.assert_array_equal(grads["b"], dy.sum((0, 2)))


def make_embedding(
    rng: np.random.Generator, *, words: int, size: int, columns: tuple[int, int], dropout: float
) -> Layer:
    tokens = rng.integers(0, words, columns)
    return Layer(
        lambda p: embedding.forward(p, "w", tokens, dropout=dropout, rng=generator(3, "embedding")),
        lambda dy, cache, grads, dx: embedding.backward(dy, cache, grads),
        {"w": rng.standard_normal((words, size))},
        sparse=("w",),
        complex_step=True,
    )


def test_embedding() -> None:
    sizes = {"words": range(1, 7), "size": range(1, 5), "columns": COLUMNS, "dropout": [0.0, 0.5]}
    check_layer(make_embedding, sizes)


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding_by_loops(sparse: bool) -> None:
    rng = np.random.default_rng(1)
    w = rng.integers(-4, 5, (5, 3)).astype(float)
    tokens = np.array([[0, 4], [4, 2], [4, 0]])
    dx = rng.integers(-4, 5, (3, 3, 2)).astype(float)
    x, cache = embedding.forward({"w": SparseWeight.from_dense(w) if sparse else w}, "w", tokens)
    grads: dict[str, Any] = {}
    embedding.backward(dx, cache, grads)
    expected = np.zeros_like(w)
    for t, b in np.ndindex(3, 2):
        np.testing.assert_array_equal(x[t, :, b], w[tokens[t, b]])
        expected[tokens[t, b]] += dx[t, :, b]
    np.testing.assert_array_equal(grads["w"].dense(), expected)
    np.testing.assert_array_equal(grads["w"].on(Support.full(w.shape)), expected.reshape(-1))


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding_dropout_drops_words(sparse: bool) -> None:
    rng = np.random.default_rng(2)
    w = rng.uniform(1, 2, (50, 4))
    tokens = rng.integers(0, 50, (30, 4))
    params: Any = {"w": SparseWeight.from_dense(w, Support.full(w.shape)) if sparse else w}
    x, _ = embedding.forward(params, "w", tokens, dropout=0.25, rng=generator(0, "words", 7))
    again, _ = embedding.forward(params, "w", tokens, dropout=0.25, rng=generator(0, "words", 7))
    np.testing.assert_array_equal(x, again)
    ratio = x / w[tokens].transpose(0, 2, 1)
    dropped = ratio == 0
    np.testing.assert_allclose(ratio[~dropped], 1 / 0.75, rtol=4 * np.finfo(float).eps)
    by_word = {word: np.unique(dropped.transpose(0, 2, 1)[tokens == word]) for word in range(50)}
    assert all(flags.size <= 1 for flags in by_word.values()), "a word is dropped in every place or in none"
    assert 0 < sum(flags.any() for flags in by_word.values()) < 50


def test_embedding_without_dropout_is_the_lookup() -> None:
    w = np.random.default_rng(3).standard_normal((6, 3))
    tokens = np.array([[1, 5], [0, 1]])
    plain, _ = embedding.forward({"w": w}, "w", tokens)
    options: Any
    for options in ({"dropout": 0.5}, {"dropout": 0.0, "rng": generator(0, "words")}):
        x, cache = embedding.forward({"w": w}, "w", tokens, **options)
        np.testing.assert_array_equal(x, plain)
        assert cache.scale is None


def test_embedding_dropout_keeps_the_expectation() -> None:
    # The mean of 4000 draws of 0 or 1/keep has standard deviation sqrt(p / keep / 4000); five of them.
    p, draws = 0.3, 4000
    w, tokens = np.ones((3, 1)), np.array([[0, 1, 2, 0]])
    total = sum(
        embedding.forward({"w": w}, "w", tokens, dropout=p, rng=generator(0, "words", k))[0] for k in range(draws)
    )
    assert np.abs(total / draws - 1).max() < 5 * np.sqrt(p / (1 - p) / draws)


def test_gradients_of_shared_parameters_add() -> None:
    """Two maps that share weight and bias: one key, the sum of both gradients."""
    rng = np.random.default_rng(4)
    params: Any = {"w": rng.standard_normal((3, 3)), "b": rng.standard_normal(3)}
    x, dy = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    together: dict[str, Any] = {}
    parts: list[dict[str, Any]] = [{}, {}]
    for scale, part in zip((1.0, 2.0), parts):
        _, cache = linear.forward(params, "w", "b", scale * x)
        linear.backward(dy, cache, together)
        linear.backward(dy, cache, part)
    np.testing.assert_array_equal(together["w"].dense(), parts[0]["w"].dense() + parts[1]["w"].dense())
    np.testing.assert_array_equal(together["b"], parts[0]["b"] + parts[1]["b"])
    before = parts[0]["b"].copy()
    add_to(parts[0], "b", parts[1]["b"])
    np.testing.assert_array_equal(parts[0]["b"] - parts[1]["b"], before)
