"""Gradients as promises: on a support, in blocks and in full they are one matrix, found by brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.rng import generator
from refimpl.testing.bounds import error_ratio, gamma
from refimpl.weights import EmbeddingGrad, LinearGrad, ScaledGrad, SparseWeight, SumGrad, Support, add_to
from refimpl.weights import gradient as module

TERMS = 200  # more than any entry below sums, the last additions and factors included
TIERS = pytest.mark.parametrize("tier", kernels.TIERS)


class Example:
    """A random gradient with its dense value and the bound on its rounding."""

    def __init__(self, kind: str, seed: int, shape: tuple[int, int] = (7, 9)) -> None:
        rng = generator(seed, "example")
        self.shape = shape
        rows, columns = shape
        self.dense, self.size = np.zeros(shape, np.longdouble), np.zeros(shape, np.longdouble)
        if kind == "linear":
            lead = [(), (5,), (5, 1)][rng.integers(3)]
            dy, x = rng.standard_normal((*lead, rows, 7)), rng.standard_normal((*lead, columns, 7))
            self.promise = LinearGrad(shape, dy, x)
            for p in np.ndindex(*lead):
                for b in range(7):
                    self._add(slice(None), np.multiply.outer(dy[p][:, b], x[p][:, b].astype(np.longdouble)))
        elif kind == "embedding":
            tokens, dx = rng.integers(0, rows, (5, 3)), rng.standard_normal((5, columns, 3))
            self.promise = EmbeddingGrad(shape, tokens, dx)
            for t, b in np.ndindex(5, 3):
                self._add(tokens[t, b], dx[t, :, b].astype(np.longdouble))
        elif kind == "sum":
            parts = [Example(part, seed + i) for i, part in enumerate(("linear", "embedding", "linear"))]
            self.promise = SumGrad([part.promise for part in parts])
            for part in parts:
                self.dense, self.size = self.dense + part.dense, self.size + part.size
        else:
            inner = Example("linear" if kind == "scaled" else "sum", seed)
            mask = rng.random(shape) < 0.5
            factors = rng.integers(0, 3, int(mask.sum())) / 0.7
            w = SparseWeight(Support.from_mask(mask), np.ones(factors.size))
            self.promise = ScaledGrad(inner.promise, w, factors)
            scale = np.ones(shape)
            scale[mask] = factors
            self.dense, self.size = inner.dense * scale, inner.size * scale

    def _add(self, where, term) -> None:
        self.dense[where] += term
        self.size[where] += np.abs(term)

    def check(self, got: np.ndarray, where=...) -> None:
        bound = gamma(TERMS, np.float64) * self.size
        assert error_ratio(got, self.dense[where], bound[where]) <= 1


KINDS = pytest.mark.parametrize("kind", ["linear", "embedding", "sum", "scaled", "scaled sum"])


@TIERS
@KINDS
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), rows=st.sampled_from([1, 2, 3, 100]))
def test_every_way_of_asking_gives_one_matrix(tier, kind, seed, rows):
    before, module.BLOCK_ENTRIES = module.BLOCK_ENTRIES, 9 * rows
    try:
        with kernels.use(tier):
            example = Example(kind, seed)
            assert example.promise.shape == example.shape
            example.check(example.promise.dense())
            mask = generator(seed, "mask").random(example.shape) < 0.4
            example.check(example.promise.on(Support.from_mask(mask)), mask)
            example.check(example.promise.on(Support.full(example.shape)).reshape(example.shape))
            assert example.promise.on(Support.empty(example.shape)).shape == (0,)
            seen = []
            for part, block in example.promise.blocks():
                assert block.shape == (part.stop - part.start, example.shape[1])
                assert block.shape[0] <= rows
                example.check(block, part)
                seen += range(part.start, part.stop)
            assert seen == list(range(example.shape[0]))
            example.check(example.promise.dense())  # asking changed nothing
    finally:
        module.BLOCK_ENTRIES = before


def test_a_gradient_of_a_convolution_has_the_weights_shape():
    rng = generator(0, "conv")
    dy, x = rng.standard_normal((5, 7)), rng.standard_normal((12, 7))
    promise = LinearGrad((5, 3, 2, 2), dy, x)
    assert promise.dense().shape == (5, 3, 2, 2)
    full = promise.on(Support.full((5, 3, 2, 2)))
    bound = gamma(14, np.float64) * (np.abs(dy) @ np.abs(x.T))
    assert error_ratio(full, promise.dense().reshape(-1), 2 * bound.reshape(-1)) <= 1


def test_what_is_known_is_not_computed_again():
    support = Support((2, 2), [0, 3])
    known = np.array([1.0, 2.0])
    promise = LinearGrad((2, 2), np.ones((2, 3)), np.ones((2, 3)), (support, known))
    assert promise.on(support) is known
    assert promise.on(Support((2, 2), [0, 1])).tolist() == [3, 3]


def test_adding_does_not_change_what_is_added():
    support = Support((2, 2), [0, 3])
    known = np.array([1.0, 2.0])
    part = LinearGrad((2, 2), np.ones((2, 3)), np.ones((2, 3)), (support, known))
    assert SumGrad([part, part]).on(support).tolist() == [2, 4]
    w = SparseWeight(support, np.ones(2))
    assert ScaledGrad(part, w, np.array([2.0, 0.0])).on(support).tolist() == [2, 0]
    assert ScaledGrad(part, w, np.array([2.0, 0.0])).on(Support((2, 2), [0, 3])).tolist() == [6, 0]
    assert known.tolist() == [1, 2]


def test_a_dense_weight_can_be_scaled_too():
    w, factor = np.ones((2, 2)), np.array([[0.0, 2.0], [1.0, 0.0]])
    inner = LinearGrad((2, 2), np.ones((2, 3)), np.ones((2, 3)))
    promise = ScaledGrad(inner, w, factor)
    assert promise.dense().tolist() == (3 * factor).tolist()
    assert promise.on(Support((2, 2), [1, 2])).tolist() == [6, 3]


def test_gradients_of_one_weight_add_up():
    dy, x = np.ones((2, 3)), np.ones((2, 3))
    grads: dict = {}
    for count in (1, 2, 3):
        add_to(grads, "w", LinearGrad((2, 2), dy, x))
        assert grads["w"].dense().tolist() == [[3 * count] * 2] * 2
    assert isinstance(grads["w"], SumGrad)
    assert len(grads["w"].parts) == 3  # flat, not nested
    add_to(grads, "b", np.ones(2))
    first = grads["b"]
    add_to(grads, "b", np.ones(2))
    assert grads["b"].tolist() == [2, 2]
    assert first.tolist() == [1, 1]
