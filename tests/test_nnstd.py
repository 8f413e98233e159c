"""The topology distance: against sets and all permutations, under renaming, and at the level of chance."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.analysis.nnstd import (
    chance_distance,
    layer_distance,
    layer_distances,
    lstm_distance,
    neuron_distance,
    neuron_distances,
    nnstd,
)
from refimpl.weights.support import Support

seeds = st.integers(0, 2**32 - 1)


def wiring(rng, rows, columns, density):
    return rng.random((rows, columns)) < density


def supports(masks):
    return [Support.from_mask(mask) for mask in masks]


def ned(a, b):
    a, b = set(np.flatnonzero(a)), set(np.flatnonzero(b))
    return (len(a - b) + len(b - a)) / len(a | b) if a | b else 0.0


@given(seeds, st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_against_sets_and_all_matchings(seed, density):
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 6), rng.integers(1, 8)
    a, b = wiring(rng, rows, columns, density), wiring(rng, rows, columns, density)
    cost = np.array([[ned(x, y) for y in b] for x in a])
    np.testing.assert_allclose(neuron_distances(*supports([a, b])), cost, atol=1e-15)
    for x in a:
        for y in b:
            assert abs(neuron_distance(np.flatnonzero(x), np.flatnonzero(y)) - ned(x, y)) < 1e-15
    best = min(sum(cost[i, p[i]] for i in range(rows)) for p in permutations(range(rows))) / rows
    distance, matching = layer_distance(*supports([a, b]))
    assert abs(distance - best) < 1e-12
    assert sorted(matching) == list(range(rows))
    assert abs(cost[np.arange(rows), matching].mean() - distance) < 1e-12
    assert abs(layer_distance(*supports([b, a]))[0] - distance) < 1e-12  # symmetric


def distinct_rows(mask):
    return len({row.tobytes() for row in mask}) == len(mask)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_renaming_hidden_neurons_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    sizes = [20, 9, 7, 5]
    a = [wiring(rng, n, m, 0.4) for m, n in pairwise(sizes)]
    if not all(map(distinct_rows, a)):
        return
    b, columns = [], np.arange(sizes[0])
    for mask in a:
        order = rng.permutation(mask.shape[0])
        b.append(mask[order][:, columns])
        columns = order
    assert nnstd(supports(a), supports(b)) == 0


def test_forgetting_to_rename_the_next_inputs_shows():
    a = [np.eye(3, dtype=bool), np.array([[1, 1, 0], [1, 0, 0]], bool)]
    order = [2, 0, 1]
    b = [a[0][order], a[1][:, order]]
    assert nnstd(supports(a), supports(b)) == 0
    assert np.mean([layer_distance(x, y)[0] for x, y in zip(supports(a), supports(b))]) > 0


def test_disjoint_and_empty():
    empty = np.zeros((3, 4), bool)
    left, right = empty.copy(), empty.copy()
    left[:, :2], right[:, 2:] = True, True
    assert nnstd(supports([left]), supports([right])) == 1
    assert nnstd(supports([empty]), supports([empty])) == 0
    assert nnstd(supports([left]), supports([empty])) == 1


@pytest.mark.parametrize("density", [0.1, 0.33, 0.7])
def test_chance_level(density):
    rng = np.random.default_rng(1)
    a, b = wiring(rng, 40, 4000, density), wiring(rng, 40, 4000, density)
    cost = neuron_distances(*supports([a, b]))
    # One pair has a standard deviation of about sqrt(q (1 - q) / u) at a union of u entries.
    q, union = density / (2 - density), density * (2 - density) * 4000
    assert abs(cost.mean() - chance_distance(density)) < 4 * np.sqrt(q * (1 - q) / union)
    assert layer_distance(*supports([a, b]))[0] < cost.mean()


def lstm(rng, hidden, inputs, density):
    return wiring(rng, 4 * hidden, inputs, density), wiring(rng, 4 * hidden, hidden, density)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_renaming_the_units_of_an_lstm(seed):
    rng = np.random.default_rng(seed)
    hidden, inputs = 6, 15
    ih, hh = lstm(rng, hidden, inputs, 0.4)
    order, below = rng.permutation(hidden), rng.permutation(inputs)
    rows = np.concatenate([order + g * hidden for g in range(4)])
    other = supports([ih[rows][:, below], hh[rows][:, order]])
    found = lstm_distance(*supports([ih, hh]), *other, columns=np.argsort(below))
    assert found.distance == 0
    np.testing.assert_array_equal(order[found.matching], np.arange(hidden))
    # Planted mistake: recurrent columns that are not renamed.
    stale = lstm_distance(*supports([ih, hh]), other[0], Support.from_mask(hh[rows]), columns=np.argsort(below))
    assert (stale.distance > 0) == (not np.array_equal(hh[rows], hh[rows][:, order]))


def test_lstm_by_hand_and_at_chance():
    rng = np.random.default_rng(2)
    a, b = lstm(rng, 5, 8, 0.5), lstm(rng, 5, 8, 0.5)
    found = lstm_distance(*supports(a), *supports(b))
    cost = [
        np.mean([[[ned(a[0][g * 5 + j], b[0][g * 5 + p[j]]) for j in range(5)] for g in range(4)]])
        for p in permutations(range(5))
    ]
    assert abs(found.input.mean() - min(cost)) < 1e-12
    p = found.matching
    for g in range(4):
        expected = np.mean([ned(a[1][g * 5 + j], b[1][g * 5 + p[j]][p]) for j in range(5)])
        assert abs(found.recurrent[g] - expected) < 1e-12

    a, b = lstm(rng, 60, 200, 0.33), lstm(rng, 60, 200, 0.33)
    found = lstm_distance(*supports(a), *supports(b))
    # 240 row pairs; of the u > 20 entries in a union (33 on average), Binomial(u, q) are common.
    q = 0.33 / 1.67
    assert abs(found.recurrent.mean() - chance_distance(0.33)) < 4 * np.sqrt(q * (1 - q) / 20 / 240)
    assert found.input.mean() < chance_distance(0.33)


def test_bad_input():
    small, large = supports([np.ones((3, 4), bool), np.ones((3, 5), bool)])
    with pytest.raises(ValueError, match="one shape"):
        layer_distance(small, large)
    with pytest.raises(ValueError, match="permutation of the 4 inputs"):
        layer_distance(small, small, np.array([0, 0, 1, 2]))
    with pytest.raises(ValueError, match="same number"):
        nnstd([small], [])
    with pytest.raises(ValueError, match="in order"):
        layer_distances([small, small], [small, small])
    with pytest.raises(ValueError, match="4 H, H"):
        lstm_distance(small, small, small, small)
    with pytest.raises(ValueError, match="density"):
        chance_distance(0)
