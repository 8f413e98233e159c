"""Supports against sets of positions and masks, and sparse weights against dense arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.rng import generator
from refimpl.weights import SparseWeight, Support, density_of, index_dtype, support_of, values_of

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
SEEDS = st.integers(0, 2**32)


@st.composite
def masks(draw):
    shape = draw(SHAPES)
    return generator(draw(SEEDS), "mask").random(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))


@given(masks())
def test_a_mask_comes_back(mask):
    support = Support.from_mask(mask)
    assert np.array_equal(support.mask(), mask)
    assert support.mask().dtype == bool
    assert support == Support.from_mask(support.mask())
    assert support.nnz == mask.sum()
    assert support.size == mask.size
    assert support.density == mask.mean()
    assert support.shape == mask.shape


@given(masks())
def test_the_order_is_canonical(mask):
    support = Support.from_mask(mask)
    rows, columns = support.matrix_shape
    assert (rows, columns) == (mask.shape[0], mask[0].size)
    assert support.flat.tolist() == sorted(set(support.flat.tolist()))
    assert np.array_equal(support.flat, np.flatnonzero(mask))
    assert np.array_equal(support.rows * columns + support.indices, support.flat)
    assert support.indptr[0] == 0
    assert support.indptr[-1] == support.nnz
    for i, row in enumerate(mask.reshape(rows, columns)):
        assert support.indices[support.indptr[i] : support.indptr[i + 1]].tolist() == np.flatnonzero(row).tolist()
    assert np.array_equal(support.row_counts, mask.reshape(rows, columns).sum(axis=1))
    assert support.flat.dtype == support.rows.dtype == support.indptr.dtype == np.int64


@given(masks(), SEEDS)
def test_positions(mask, seed):
    support = Support.from_mask(mask)
    asked = generator(seed, "asked").integers(0, mask.size, 10)
    stored = support.flat.tolist()
    assert support.positions_of(asked).tolist() == [stored.index(k) if k in stored else -1 for k in asked]
    assert support.positions_of(support.flat).tolist() == list(range(support.nnz))
    assert support.positions_of(np.empty(0, np.int64)).tolist() == []


@given(masks(), SEEDS)
def test_containing_and_equality_are_those_of_sets(mask, seed):
    support = Support.from_mask(mask)
    other = Support.from_mask(mask & (generator(seed, "other").random(mask.shape) < 0.7))
    assert other in support
    assert (support in other) == (support.nnz == other.nnz) == (support == other)
    if support == other:
        assert hash(support) == hash(other)
    assert Support.empty(mask.shape) in support
    assert support in Support.full(mask.shape)
    assert support != Support(mask.reshape(-1).shape, support.flat) or mask.ndim == 1
    assert support not in Support.full((*mask.shape, 1))
    assert support != mask.tolist()


def test_full_and_empty():
    assert Support.full((3, 4)).density == 1
    assert Support.full((3, 4)).mask().all()
    assert Support.empty((3, 4)).nnz == 0
    assert Support.empty((3, 4)).row_counts.tolist() == [0, 0, 0]
    assert Support.empty((3, 4)).density == 0


@pytest.mark.parametrize(("columns", "dtype"), [(1, "u2"), (65535, "u2"), (65536, "u2"), (65537, "u4")])
def test_indices_are_as_narrow_as_the_shape_allows(columns, dtype):
    support = Support((2, columns), [0, columns - 1, 2 * columns - 1] if columns > 1 else [0, 1])
    assert support.indices.dtype == index_dtype(columns) == np.dtype(dtype)
    assert support.flat[-1] == 2 * columns - 1
    assert support.positions_of(np.array([2 * columns - 1])).tolist() == [support.nnz - 1]


def test_positions_beyond_32_bits():
    shape = (70_000, 70_000)
    last = 70_000**2 - 1
    support = Support(shape, [5, last])
    assert support.flat.tolist() == [5, last]
    assert support.positions_of(np.array([last, 6])).tolist() == [1, -1]


def test_a_support_cannot_be_changed():
    support = Support((2, 2), [0, 3])
    for array in (support.indices, support.indptr):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    support.flat[0] = 1  # a copy
    assert support.flat.tolist() == [0, 3]


@pytest.mark.parametrize("flat", [[1, 0], [0, 0], [-1, 2], [0, 6], [0, 3, 2], [5, 5]])
def test_positions_that_do_not_ascend_within_the_shape_are_an_error(flat):
    with pytest.raises(ValueError, match=r"must ascend strictly within 0\.\.5"):
        Support((2, 3), flat)


def test_other_errors():
    with pytest.raises(ValueError, match="a shape and a list"):
        Support((), [0])
    with pytest.raises(ValueError, match="2 axes"):
        Support((2, 3), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="at most"):
        index_dtype((1 << 32) + 1)


@given(masks(), SEEDS, st.sampled_from([np.float32, np.float64]))
def test_a_sparse_weight_is_its_dense_picture(mask, seed, dtype):
    dense = (generator(seed, "dense").standard_normal(mask.shape) + 10).astype(dtype)
    w = SparseWeight.from_dense(dense, Support.from_mask(mask))
    assert np.array_equal(w.dense(), np.where(mask, dense, 0))
    assert w.dense().dtype == w.dtype == dtype
    assert np.array_equal(w.values, dense[mask])
    assert (w.shape, w.nnz, w.density) == (mask.shape, mask.sum(), mask.mean())
    again = SparseWeight.from_dense(w.dense())
    assert again.support == w.support
    assert np.array_equal(again.values, w.values)


def test_values_are_kept_by_reference_and_an_explicit_zero_stays():
    values = np.array([1.0, 0.0])
    w = SparseWeight(Support((2, 2), [0, 3]), values)
    values[0] = 5
    assert w.dense().tolist() == [[5, 0], [0, 0]]
    assert w.nnz == 2
    assert values_of(w) is values


def test_a_dense_weight_is_seen_as_a_full_one():
    w = np.ones((2, 3))
    assert values_of(w) is w
    assert support_of(w) == Support.full((2, 3))
    assert density_of(w) == 1
    assert support_of(SparseWeight(Support((2, 2), [1]), np.ones(1))) == Support((2, 2), [1])


def test_what_a_sparse_weight_refuses():
    support = Support((2, 3), [0, 5])
    for values, message in (
        (np.ones(3), r"2 entries needs as many values; got an array of shape \(3,\)"),
        (np.ones((2, 1)), r"shape \(2, 1\)"),
        (np.ones(2, int), "must be float32 or float64; got int64"),
        (np.ones(2, np.float16), "got float16"),
        (np.ones(2, ">f4"), "got >f4"),
        (np.ones(4)[::2], "a strided view, of which np.ascontiguousarray makes a copy"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseWeight(support, values)
    with pytest.raises(ValueError, match=r"the support has shape \(2, 3\), the weight \(3, 2\)"):
        SparseWeight.from_dense(np.ones((3, 2)), support)
