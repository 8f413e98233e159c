"""The pieces of an exchange against plain definitions: same draws, same drops, and memory for one tensor at a time."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from refimpl.kernels import memory
from refimpl.methods import SET, Allocation, Conventions, RigL
from refimpl.methods import exchange as exchange_module
from refimpl.methods.drop import by_magnitude, by_sign, drop_smallest
from refimpl.methods.exchange import count_stored
from refimpl.methods.grow import Candidates, Ranked, draw_ranks, grow_random
from refimpl.methods.pools import Pool, linked
from refimpl.methods.random_support import draw_distinct
from refimpl.methods.schedule import Constant
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight
from refimpl.weights.support import Support

SEEDS = st.integers(0, 2**32 - 1)


# --- draws ----------------------------------------


def drawn_in_rounds(size, count, rng):
    """Draw as many as are missing until all differ: the definition, on sets."""
    if 2 * count > size:
        return sorted(set(range(size)) - set(drawn_in_rounds(size, size - count, rng)))
    found: set[int] = set()
    while len(found) < count:
        found |= set(rng.integers(size, size=count - len(found)).tolist())
    return sorted(found)


@given(st.sampled_from([1, 5, 40, 700, 5000]), st.floats(0, 1), SEEDS)
def test_draws_are_those_of_the_definition(size, share, seed):
    for count in (round(size * share), round(size * share / 20)):  # by flags for all places, and by sorting
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        drawn = draw_distinct(size, count, one)
        assert drawn.tolist() == drawn_in_rounds(size, count, other)
        assert drawn.dtype == np.int64
        assert one.random() == other.random()  # no draw more, none less


@given(st.sampled_from([2**32 - 1, 2**32, 2**32 + 1, 3 * 2**31, 2**45]), st.integers(0, 300), SEEDS)
def test_draws_among_more_places_than_32_bits_count(size, count, seed):
    drawn = draw_distinct(size, count, np.random.default_rng(seed))
    assert drawn.tolist() == drawn_in_rounds(size, count, np.random.default_rng(seed))


def test_few_draws_take_little_memory():
    tracemalloc.start()
    draw_distinct(10**12, 100_000, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 100_000


def test_repetitions_among_the_last_few_draws_count_once():
    """Half of 4,096 places: the last rounds draw a handful, and in some of these runs one of them comes twice."""
    for seed in range(100):
        drawn = draw_distinct(4096, 2048, np.random.default_rng(seed))
        assert drawn.tolist() == drawn_in_rounds(4096, 2048, np.random.default_rng(seed))


# --- drops ----------------------------------------


def sign_by_sign(values, fraction, conventions):
    """Drop from both signs apart: the definition."""
    negative = values < 0
    gone = []
    for group in (np.flatnonzero(negative), np.flatnonzero(~negative)):
        gone += group[by_magnitude(values[group], fraction, conventions)].tolist()
    return sorted(gone)


NUMBERS = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, np.inf, -np.inf]) | st.floats(-1, 1)


@given(
    st.lists(NUMBERS, max_size=40),
    st.floats(0, 1),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from(["exact", "threshold"]),
    st.sampled_from(["floor", "ceil", "half-even"]),
)
@example([-1.0, -2.0, -3.0, 0.0], 0.4, np.float32, "threshold", "floor")
@example([1.0, 2.0, 3.0, -0.0, -1.0], 0.4, np.float32, "threshold", "floor")
def test_dropping_by_sign_is_dropping_from_both_signs(numbers, fraction, dtype, ties, how):
    values = np.array(numbers, dtype)
    before = values.tobytes()
    conventions = Conventions(drop_ties=ties, drop_rounding=how)
    gone = np.flatnonzero(by_sign(values, fraction, conventions))
    assert gone.tolist() == sign_by_sign(values, fraction, conventions)
    assert values.tobytes() == before


@given(st.lists(NUMBERS | st.just(np.nan), max_size=12), st.floats(0, 1))
def test_a_nan_that_would_be_ranked_is_refused_by_both(numbers, fraction):
    values = np.array(numbers)
    try:
        wanted = sign_by_sign(values, fraction, Conventions())
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            by_sign(values, fraction, Conventions())
    else:
        assert np.flatnonzero(by_sign(values, fraction, Conventions())).tolist() == wanted


@pytest.mark.parametrize("criterion", [by_sign, by_magnitude])
@pytest.mark.parametrize("fraction", [1.5, -0.5])
def test_fractions_outside_the_range_are_refused(criterion, fraction):
    with pytest.raises(ValueError, match="cannot be dropped; give a drop fraction from 0 to 1"):
        criterion(np.array([-1.0, -2.0, 1.0, 2.0]), fraction, Conventions())


def test_scores_are_not_changed():
    scores = np.random.default_rng(0).random(100)
    before = scores.copy()
    drop_smallest(scores, 30)
    assert np.array_equal(scores, before)


# --- candidates and pools ----------------------------------------


@given(st.integers(1, 60), SEEDS, st.sampled_from(["exact", "bernoulli"]))
def test_ranks_and_places_are_one_choice(size, seed, count):
    rng = np.random.default_rng(seed)
    taken = np.flatnonzero(rng.random(size) < 0.4)
    listed = Candidates(size, taken)
    want = int(rng.integers(0, listed.count + 1))
    ranks = draw_ranks(listed, want, np.random.default_rng(seed), count)
    places = grow_random(listed, want, np.random.default_rng(seed), count=count)
    assert np.array_equal(Ranked(listed, ranks).places, places)
    shuffled = rng.permutation(ranks)
    assert np.array_equal(listed.at(shuffled), np.setdiff1d(np.arange(size), taken)[shuffled])


def test_taken_places_are_listed_only_when_asked_for():
    def never():
        raise AssertionError

    candidates = Candidates(10, never, 4)
    assert candidates.count == 6
    assert draw_ranks(candidates, 6, np.random.default_rng(0)).tolist() == list(range(6))
    with pytest.raises(ValueError, match="growth needs 7 free places but only 6"):
        draw_ranks(candidates, 7, np.random.default_rng(0))


def test_pools_that_share_tensors_go_together():
    pool = {label: Pool.chain(label, [(name, 0, 4) for name in label]) for label in ("a", "b", "ab", "c", "cd", "e")}
    gates = [Pool.chain(f"g{i}", [("g", i, i + 1)]) for i in range(3)]
    order = [pool["e"], gates[0], pool["c"], gates[1], pool["a"], pool["cd"], gates[2], pool["b"], pool["ab"]]
    groups = [[p.label for p in group] for group in linked(order)]
    assert sorted(groups) == [["a", "b", "ab"], ["c", "cd"], ["e"], ["g0", "g1", "g2"]]


@given(SEEDS, st.integers(1, 7), st.integers(1, 9))
def test_counting_what_a_pool_stores(seed, rows, columns):
    rng = np.random.default_rng(seed)
    support = Support.from_mask(rng.random((rows, columns)) < 0.5)
    start, stop = np.sort(rng.integers(0, rows * columns + 1, 2)).tolist()
    pool = Pool.chain("p", [("w", start, stop)])
    stored = int(((support.flat >= start) & (support.flat < stop)).sum())
    assert count_stored(pool, {"w": support}) == count_stored(pool, {"w": support.flat}) == stored
    assert support.entries_before(start) == (support.flat < start).sum()


# --- whole exchanges ----------------------------------------


def problem(kind, tensors, shape=(1000, 1000), density=0.1):
    specs = {f"w{i}": ParamSpec(f"w{i}", shape, "linear", True) for i in range(tensors)}
    method = kind(Allocation(density), Constant(0.3))
    rng = np.random.default_rng(0)
    params = {
        name: SparseWeight(support, rng.standard_normal(support.nnz).astype(np.float32))
        for name, support in method.supports(specs, seed=0).items()
    }
    return method, params


class Blocks:
    """A gradient that hands out the same block again and again."""

    shape = (1000, 1000)

    def __init__(self):
        self.block = np.random.default_rng(1).standard_normal((10, 1000)).astype(np.float32)

    def blocks(self):
        for start in range(0, 1000, 10):
            yield slice(start, start + 10), self.block


@pytest.mark.parametrize("kind", [SET, RigL])
def test_only_one_tensor_at_a_time_has_lists(kind):
    """With six times the tensors an exchange takes six times what it returns, and the lists of one."""
    peaks, held = {}, {}
    for tensors in (1, 6):
        method, params = problem(kind, tensors)
        gradients = dict.fromkeys(params, Blocks())
        method.exchange(params, step=1, seed=0, gradients=gradients)
        gc.collect()
        memory.trim()
        tracemalloc.start()
        made = method.exchange(params, step=1, seed=0, gradients=gradients)
        peaks[tensors] = tracemalloc.get_traced_memory()[1]
        memory.trim()
        held[tensors] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(made) == tensors
    nnz = 100_000
    assert held[6] < 6 * 8 * nnz  # a flag, an index of two bytes and a source of four, and pointers to rows
    temporary = peaks[1] - held[1]
    assert peaks[6] - held[6] < 1.2 * temporary


@pytest.mark.parametrize("pool", ["matrix", "gate", "layer"])
@given(seed=SEEDS, forbid=st.booleans())
@settings(max_examples=20)
def test_ranks_and_places_make_the_same_exchange(pool, seed, forbid):
    """A grower that turns ranks into places itself, and the short cut, agree."""
    rng = np.random.default_rng(seed)
    h = int(rng.integers(1, 6))
    blocks = {gate: slice(i * h, (i + 1) * h) for i, gate in enumerate("ifgo")}
    specs = {
        name: ParamSpec(name, (4 * h, int(rng.integers(1, 9))), "linear", True, layer="l", blocks=blocks)
        for name in "ab"
    }
    method = SET(
        Allocation(0.4), Constant(0.5), conventions=Conventions(pool=pool, regrow="forbid" if forbid else "keep")
    )
    params = {
        name: SparseWeight(support, rng.standard_normal(support.nnz))
        for name, support in method.supports(specs, seed=seed).items()
    }
    right = exchange_module.at_random(seed, 1, method.conventions)

    def listed(growths):
        return [ranked.places for ranked in right(growths)]

    try:
        short = method.propose(params, 1, drop=by_sign, grow=right)
    except ValueError:  # free places run short, as they may where dropped ones cannot grow back
        reject()
    for name, exchange in method.propose(params, 1, drop=by_sign, grow=listed).items():
        assert exchange.new == short[name].new
        assert np.array_equal(exchange.source, short[name].source)
        assert np.array_equal(exchange.grown, short[name].grown)


def test_a_criterion_that_names_an_entry_twice_is_refused():
    method, params = problem(SET, 1, (10, 10), 0.5)
    with pytest.raises(ValueError, match="drop an entry once"):
        method.propose(
            params, 1, drop=lambda *_: np.array([1, 1]), grow=exchange_module.at_random(0, 1, method.conventions)
        )


def test_a_criterion_whose_flags_do_not_fit_is_refused():
    method, params = problem(SET, 1, (10, 10), 0.5)
    with pytest.raises(ValueError, match=r"flags of shape \(1,\) for 50 entries"):
        method.propose(
            params, 1, drop=lambda *_: np.array([True]), grow=exchange_module.at_random(0, 1, method.conventions)
        )


# --- planted mistakes ----------------------------------------


def test_a_threshold_counted_one_off_would_be_caught():
    """The definition tells apart a fraction that is one entry more."""
    values = np.linspace(-1, 1, 21)
    for count in (2, 3):
        wanted = sign_by_sign(values, count / 10, Conventions())
        assert np.flatnonzero(by_sign(values, count / 10, Conventions())).tolist() == wanted
        assert np.flatnonzero(by_sign(values, (count + 1) / 10, Conventions())).tolist() != wanted
