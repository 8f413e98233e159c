"""Exchanges against dense references: other programs' steps written out on masks, given the same draws."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from gradient_cases import RandomBlocks
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import SET, Allocation, Conventions, RigL, Selfish, profile
from refimpl.methods.drop import by_sign, drop_smallest, keep_largest
from refimpl.methods.grow import BestCandidates, Candidates, grow_random
from refimpl.methods.onestep import ArrayGradient, exchange_masks
from refimpl.methods.schedule import Constant
from refimpl.weights.carry import CarryRule
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

AUTHORS = profile("selfish-authors")
seeds = st.integers(0, 2**32 - 1)
fractions = st.floats(0.001, 1)


def problem(seed, tied=False):
    """Return a masked weight, its mask, a gradient and uniforms."""
    rng = np.random.default_rng(seed)
    shape = (4 * rng.integers(1, 6), rng.integers(1, 12))
    mask = rng.random(shape) < rng.uniform(0.1, 0.9)
    mask.flat[0] = True
    numbers = rng.integers(-3, 4, shape) if tied else rng.standard_normal(shape)
    return mask * numbers.astype(float), mask, rng.standard_normal(shape), rng.random(shape)


def authors_step(weight, mask, uniforms, d, n_base):
    """Selfish-RNN's program, steps 1 to 5, on a dense mask."""
    n1 = int(mask.sum())
    n0 = mask.size - n1
    k = n0 + math.ceil(d * n1)
    threshold = np.sort(np.abs(weight), axis=None)[k - 1]
    survives = np.abs(weight) > threshold
    g = int(n_base - survives.sum())
    free = ~survives
    p = g / free.sum() if free.any() else 0
    new = survives | (free & (uniforms < p))
    return new, np.where(new, weight, 0)  # masked once, after growth


@given(seeds, fractions, st.booleans(), st.integers(-3, 3))
@settings(max_examples=150, deadline=None)
def test_selfish_authors(seed, d, tied, more):
    weight, mask, _, uniforms = problem(seed, tied)
    n_base = max(1, int(mask.sum()) + more)
    new, values = authors_step(weight, mask, uniforms, d, n_base)
    out = exchange_masks(weight, mask, drop_fraction=d, conventions=AUTHORS, uniforms=uniforms, initial_nnz=n_base)
    np.testing.assert_array_equal(out.mask, new)
    np.testing.assert_array_equal(out.weights, values)


@given(seeds, fractions)
@settings(max_examples=50, deadline=None)
def test_the_reference_tells_apart_the_conventions(seed, d):
    # The comparison above has teeth: each changed convention differs from the reference for some input.
    weight, mask, _, uniforms = problem(seed, tied=True)
    if mask.sum() * d <= 2 or not (weight[mask] == 0).any():
        return
    out = exchange_masks(weight, mask, drop_fraction=d, conventions=AUTHORS, uniforms=uniforms)
    exact = exchange_masks(
        weight, mask, drop_fraction=d, conventions=replace(AUTHORS, drop_ties="exact"), uniforms=uniforms
    )
    assert exact.dropped.sum() == math.ceil(d * mask.sum()) <= out.dropped.sum()


def rigl_step(weight, mask, gradient, f):
    """RigL on dense arrays, by stable sorts."""
    n1 = int(mask.sum())
    count = math.floor(f * n1)
    score = np.where(mask, np.abs(weight), -1).reshape(-1)
    keep = np.zeros(mask.size, bool)
    keep[np.argsort(-score, kind="stable")[: n1 - count]] = True
    score = np.where(keep, -1, np.abs(gradient).reshape(-1))
    grown = np.zeros(mask.size, bool)
    grown[np.argsort(-score, kind="stable")[:count]] = True
    new = (keep | grown).reshape(mask.shape)
    return new, np.where(new & mask, weight, 0)


@given(seeds, st.floats(0, 1), st.booleans())
@settings(max_examples=150, deadline=None)
def test_rigl(seed, f, tied):
    weight, mask, gradient, _ = problem(seed, tied)
    gradient = np.round(gradient) if tied else gradient
    new, values = rigl_step(weight, mask, gradient, f)
    out = exchange_masks(weight, mask, drop_fraction=f, gradient=gradient)
    np.testing.assert_array_equal(out.mask, new)
    np.testing.assert_array_equal(out.weights, values)
    for rows in (1, 3):  # the method, which sees the gradient in blocks, does the same
        method = RigL(Allocation(0.5), Constant(f))
        method.supports({"w": ParamSpec("w", mask.shape, "linear", True)}, seed=0)
        sparse = SparseWeight.from_dense(weight, Support.from_mask(mask))
        exchange = method.exchange({"w": sparse}, step=1, seed=0, gradients={"w": ArrayGradient(gradient, rows)})["w"]
        np.testing.assert_array_equal(exchange.new.mask(), new)
        np.testing.assert_array_equal(SparseWeight(exchange.new, exchange.carry(sparse.values)).dense(), values)


@given(seeds, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_random_growth_from_given_ranks(seed, f):
    weight, mask, _, _ = problem(seed)
    count = math.floor(f * mask.sum())
    order = np.flatnonzero(mask)[np.argsort(np.abs(weight[mask]), kind="stable")]
    free = np.sort(np.concatenate([np.flatnonzero(~mask), order[:count]]))
    ranks = np.random.default_rng(seed).permutation(free.size)[:count]
    out = exchange_masks(weight, mask, drop_fraction=f, ranks=ranks)
    np.testing.assert_array_equal(np.flatnonzero(out.grown), np.sort(free[ranks]))
    np.testing.assert_array_equal(np.flatnonzero(out.dropped), np.sort(order[:count]))
    assert out.mask.sum() == mask.sum()


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_gate_by_gate_is_each_gate_alone(seed):
    weight, mask, gradient, _ = problem(seed)
    h = mask.shape[0] // 4
    gates = {name: slice(i * h, (i + 1) * h) for i, name in enumerate("ifgo")}
    ranks = []
    rng = np.random.default_rng(seed)
    for rows in gates.values():
        n1 = int(mask[rows].sum())
        free = mask[rows].size - n1 + math.floor(0.4 * n1)
        ranks.append(rng.permutation(free)[: math.floor(0.4 * n1)])
    options = {"drop_fraction": 0.4, "conventions": Conventions(pool="gate"), "blocks": gates}
    at_random = exchange_masks(weight, mask, ranks=ranks, **options)
    by_gradient = exchange_masks(weight, mask, gradient=gradient, **options)
    uniforms = rng.random(mask.shape)
    bernoulli = replace(AUTHORS, pool="gate")
    coins = exchange_masks(weight, mask, drop_fraction=0.4, conventions=bernoulli, blocks=gates, uniforms=uniforms)
    for rows, drawn in zip(gates.values(), ranks):
        if mask[rows].any():
            new, _ = authors_step(weight[rows], mask[rows], uniforms[rows], 0.4, int(mask[rows].sum()))
            np.testing.assert_array_equal(coins.mask[rows], new)
        alone = exchange_masks(weight[rows], mask[rows], drop_fraction=0.4, ranks=drawn)
        np.testing.assert_array_equal(at_random.mask[rows], alone.mask)
        alone = exchange_masks(weight[rows], mask[rows], drop_fraction=0.4, gradient=gradient[rows])
        np.testing.assert_array_equal(by_gradient.mask[rows], alone.mask)


def test_set_counts_of_the_original_program():
    # 111 negative and 89 positive weights, zeta 0.3: the original program, which rounds up, keeps 77 and 62.
    values = np.random.default_rng(0).permutation(np.concatenate([-np.arange(1, 112), np.arange(1, 90)])) / 100.0
    kept = np.delete(values, by_sign(values, 0.3, Conventions(drop_rounding="ceil")))
    assert ((kept < 0).sum(), (kept > 0).sum()) == (77, 62)
    assert kept[kept < 0].max() == -0.35
    assert kept[kept > 0].min() == 0.28


@pytest.mark.parametrize(("regrow", "value", "slot"), [("keep", 0.1, 7.0), ("reset", 0.5, 0.0)])
def test_values_and_slots_of_regrown_entries(regrow, value, slot):
    weight, mask = np.array([[0.1, 0.9, 0.0, 0.0]]), np.array([[True, True, False, False]])
    conventions = Conventions(regrow=regrow, grown_value=0.5)
    slots = {"momentum": np.array([[7.0, 8.0, 9.0, 9.0]])}
    back = exchange_masks(weight, mask, drop_fraction=0.5, conventions=conventions, ranks=[0], slots=slots)
    assert back.regrown.tolist() == [[True, False, False, False]]
    assert back.weights.tolist() == [[value, 0.9, 0, 0]]
    assert back.slots["momentum"].tolist() == [[slot, 8, 0, 0]]
    new = exchange_masks(weight, mask, drop_fraction=0.5, conventions=conventions, ranks=[1], slots=slots)
    assert new.weights.tolist() == [[0, 0.9, 0.5, 0]]
    assert new.slots["momentum"].tolist() == [[0, 8, 0, 0]]
    rules = {"momentum": CarryRule(grown=3.0, regrown="reset")}
    back = exchange_masks(
        weight, mask, drop_fraction=0.5, conventions=conventions, ranks=[0], slots=slots, slot_rules=rules
    )
    assert back.slots["momentum"].tolist() == [[3, 8, 0, 0]]


def test_forbidden_regrowth():
    weight, mask = np.array([[0.1, 0.9, 0.0, 0.0]]), np.array([[True, True, False, False]])
    forbid = Conventions(regrow="forbid")
    out = exchange_masks(weight, mask, drop_fraction=0.5, conventions=forbid, ranks=[0])
    assert out.mask.tolist() == [[False, True, True, False]]
    full = np.ones((1, 4), bool)
    with pytest.raises(ValueError, match="growth needs 2 free places but only 0"):
        exchange_masks(weight, full, drop_fraction=0.5, conventions=forbid, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_fraction": -0.1}, "drop fraction"),
        ({"drop_fraction": float("nan")}, "drop fraction"),
        ({}, "rng or ranks"),
        ({"ranks": [0, 0]}, "must all differ"),
        ({"ranks": [0, 17]}, "must lie from 0"),
        ({"ranks": [0]}, "there must be 2"),
        ({"ranks": [[0], [1]]}, "2 blocks"),
        ({"gradient": np.ones((2, 2))}, "gradient has shape"),
        ({"gradient": np.full((4, 4), np.nan)}, "NaN"),
        ({"conventions": Conventions(pool="layer")}, "several tensors"),
        ({"conventions": Conventions(pool="gate"), "blocks": {"i": slice(0, 3)}}, "partition"),
    ],
)
def test_bad_arguments(options, message):
    weight = np.diag([1.0, 2, 3, 4])
    with pytest.raises(ValueError, match=message):
        exchange_masks(weight, weight != 0, **{"drop_fraction": 0.5, **options})


# --- the pieces ----------------------------------------


@given(st.lists(st.integers(0, 5), max_size=30), st.data())
def test_drop_and_keep_by_sorting(scores, data):
    scores = np.array(scores, float)
    count = data.draw(st.integers(0, scores.size))
    ranked = sorted(range(scores.size), key=lambda i: (scores[i], -i))
    assert drop_smallest(scores, count).tolist() == sorted(ranked[:count])
    largest = sorted(range(scores.size), key=lambda i: (-scores[i], i))
    assert keep_largest(scores, count).tolist() == sorted(largest[:count])
    if count:
        bound = scores[ranked[count - 1]]
        assert drop_smallest(scores, count, "threshold").tolist() == np.flatnonzero(scores <= bound).tolist()


def test_nan_scores_are_refused():
    for ties in ("exact", "threshold"):
        with pytest.raises(ValueError, match="NaN"):
            drop_smallest(np.array([1.0, np.nan, 0.5]), 1, ties)


@given(st.integers(0, 40), st.data())
def test_ranks_of_free_places(size, data):
    taken = np.array(sorted(data.draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=size))) if size else [], int)
    candidates = Candidates(size, taken)
    free = np.setdiff1d(np.arange(size), taken)
    np.testing.assert_array_equal(candidates.at(np.arange(candidates.count)), free)


@given(seeds, st.integers(1, 9))
def test_best_candidates_in_any_blocks(seed, length):
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 40)
    gradient = rng.integers(-4, 5, size).astype(np.float32)
    taken = np.flatnonzero(rng.random(size) < 0.4)
    candidates = Candidates(size, taken)
    best = BestCandidates(candidates, rng.integers(0, candidates.count + 1))
    for start in range(0, size, length):
        best.add(start, gradient[start : start + length])
    free = np.setdiff1d(np.arange(size), taken)
    expected = free[np.argsort(-np.abs(gradient[free]), kind="stable")][: best.want]
    np.testing.assert_array_equal(best.places, np.sort(expected))


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def test_random_growth_is_uniform():
    # 60 of 100 places are free, 7 grow, 20,000 times. Drawn without replacement, the counts vary less than
    # multinomial ones, by the factor (1 - 7/60) * 60/59; scaled by it, the statistic is chi-square with 59
    # degrees of freedom: mean 59, standard deviation 10.9.
    taken = np.flatnonzero(np.arange(100) % 5 < 2)
    candidates, rng = Candidates(100, taken), np.random.default_rng(5)
    counts = np.zeros(100)
    for _ in range(20_000):
        counts[grow_random(candidates, 7, rng)] += 1
    assert not counts[taken].any()
    free = np.delete(counts, taken)
    statistic = chi_square(free, 20_000 * 7 / 60) / (1 - 7 / 60) * 59 / 60
    assert 59 - 4 * 10.9 < statistic < 59 + 4 * 10.9


def test_pairs_that_grow_together_are_uniform():
    candidates, rng = Candidates(9, np.array([0, 4, 5])), np.random.default_rng(6)
    counts = np.zeros((9, 9))
    for _ in range(15_000):
        counts[tuple(grow_random(candidates, 2, rng))] += 1
    free = [1, 2, 3, 6, 7, 8]
    pairs = np.array([counts[a, b] for a in free for b in free if a < b])
    assert pairs.sum() == 15_000
    assert chi_square(pairs, 1000) < 14 + 4 * math.sqrt(28)


def test_bernoulli_growth_has_the_binomial_law():
    candidates, rng = Candidates(50, np.arange(0, 50, 5)), np.random.default_rng(7)
    numbers = np.array([grow_random(candidates, 10, rng, count="bernoulli").size for _ in range(8000)])
    assert abs(numbers.mean() - 10) < 4 * math.sqrt(7.5 / 8000)  # Binomial(40, 1/4)
    assert abs(numbers.var() - 7.5) < 4 * 7.5 * math.sqrt(2 / 8000)


def test_effective_rewiring_of_selfish():
    # At density rho, of the d n dropped the share d rho / (1 - rho + d rho) is expected back at once.
    rho, d = 0.33, 0.8
    specs = {"w": ParamSpec("w", (400, 300), "linear", True)}
    method = Selfish(Allocation(rho), Constant(d))
    support = method.supports(specs, seed=0)["w"]
    values = np.random.default_rng(0).standard_normal(support.nnz)
    exchange = method.exchange({"w": SparseWeight(support, values)}, step=1, seed=0)["w"]
    share = d * rho / (1 - rho + d * rho)
    assert abs(exchange.regrown.size / exchange.dropped.size - share) < 4 * math.sqrt(
        share * (1 - share) / exchange.dropped.size
    )


@pytest.mark.parametrize("kind", [Selfish, SET, RigL])
def test_nothing_dense_is_made(kind):
    # 16 million entries at density 0.005. A dense mask would take 16 MB, a dense score 128 MB.
    shape = (4000, 4000)
    method = kind(Allocation(0.005), Constant(0.5))

    tracemalloc.start()
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    weight = SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))
    method.exchange({"w": weight}, step=1, seed=0, gradients={"w": RandomBlocks(shape)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block = 25 * 4000 * 4 if kind is RigL else 0
    assert peak < 150 * support.nnz + 5 * block < shape[0] * shape[1]
