"""Kernels that change a topology: the compiled ones against the definition, bit for bit, and both against sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from refimpl import kernels
from refimpl.kernels import spec_topology as spec
from refimpl.kernels import topology
from refimpl.kernels.cpu import topology as cpu
from refimpl.weights import Support

SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])
SHAPES = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 40)),
    st.tuples(st.just(1), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.just(1)),
    st.tuples(st.integers(1, 3), st.sampled_from([65_536, 65_537, 70_000])),  # where indices widen
    st.tuples(st.integers(1, 3), st.sampled_from([1 << 21, 1 << 32])),  # too long for buffers of a row
    st.just((70_000, 70_000)),  # where flat positions need more than 32 bits
)


def some(rng, size, share, most=400):
    """Return distinct places, ascending; in a row of ten at the end of a large range, where neighbours meet."""
    count = min(round(share * size), most)
    if size > 10 * most:
        drawn = np.concatenate([rng.integers(size, size=count), size - 1 - np.arange(min(count, 10))])
        return np.unique(drawn)[-count:] if count else np.empty(0, np.int64)
    return np.sort(rng.choice(size, count, replace=False)).astype(np.int64)


@st.composite
def changes(draw):
    """Return a support, what goes, and what grows: places and, beside them, their ranks among the free ones."""
    rng = np.random.default_rng(draw(SEEDS))
    shape = draw(SHAPES)
    size = shape[0] * shape[1]
    old = Support(shape, some(rng, size, draw(SHARES)))
    goes = rng.random(old.nnz) < draw(SHARES)
    kept = old.flat[~goes]
    ranks = some(rng, size - kept.size, draw(SHARES))
    if draw(st.booleans()) and old.nnz:  # grow back much of what goes
        back = old.flat[goes]
        ranks = np.union1d(ranks, back - np.searchsorted(kept, back))
    return old, goes, kept, ranks


@given(changes())
def test_places_of_entries(case):
    old, goes, kept, _ = case
    low, high = old.nnz // 3, old.nnz - old.nnz // 4
    for tier in (spec, cpu):
        assert np.array_equal(tier.places(old, 0, old.nnz, goes), kept)
        assert np.array_equal(
            tier.places(old, low, high), old.rows[low:high] * old.matrix_shape[1] + old.indices[low:high]
        )
        some_kept = tier.places(old, low, high, goes)
        assert np.array_equal(some_kept, old.flat[low:high][~goes[low:high]])
        assert some_kept.dtype == np.int64


@given(changes())
def test_free_places_are_counted_through(case):
    old, _, kept, ranks = case
    found = cpu.free_places(kept, ranks)
    assert np.array_equal(found, spec.free_places(kept, ranks))
    assert not np.isin(found, kept).any()
    assert np.array_equal(found - np.searchsorted(kept, found), ranks)  # a rank is the number of free places before
    if old.size < 10_000:
        free = np.setdiff1d(np.arange(old.size), kept)
        assert np.array_equal(found, free[ranks])


@given(changes())
def test_an_exchange_is_one_of_sets(case):
    old, goes, kept, ranks = case
    grown = spec.free_places(kept, ranks)
    wanted = np.union1d(kept, grown)
    for tier in (spec, cpu):
        by_place, by_rank = tier.exchange(old, goes, grown, False), tier.exchange(old, goes, ranks, True)
        for one, other, dtype in zip(by_place, by_rank, [np.int64, old.indices.dtype, np.int32], strict=True):
            assert np.array_equal(one, other)
            assert one.dtype == other.dtype == dtype
        indptr, indices, source = by_place
        assert np.array_equal(np.repeat(np.arange(old.shape[0]), np.diff(indptr)) * old.shape[1] + indices, wanted)
        assert np.array_equal(wanted[source < 0], grown)
        assert np.array_equal(old.flat[source[source >= 0]], wanted[source >= 0])
        assert np.array_equal(old.flat[-2 - source[source < -1]], wanted[source < -1])
        assert set(wanted[source < -1].tolist()) == set(old.flat[goes].tolist()) & set(grown.tolist())


@given(changes(), st.data())
def test_a_place_that_is_kept_cannot_grow(case, data):
    old, goes, kept, ranks = case
    assume(kept.size)
    grown = np.union1d(spec.free_places(kept, ranks), kept[data.draw(st.integers(0, kept.size - 1))])
    for name in ("spec", "cpu"):
        with kernels.use(name), pytest.raises(ValueError, match="that are not kept, each once"):
            topology.exchange(old, goes, grown, False)


@pytest.mark.parametrize(
    ("grown", "ranked", "message"),
    [
        ([1, 1], False, "each once"),
        ([4, 3], False, "each once"),
        ([-1, 3], False, r"flat positions .* 0\.\.5"),
        ([3, 6], False, r"flat positions .* 0\.\.5"),
        ([0, 4], True, r"ranks of free places .* 0\.\.3"),
        ([-1], True, r"ranks of free places .* 0\.\.3"),
        ([2, 2], True, "each once"),
    ],
)
def test_what_grows_is_checked(grown, ranked, message):
    old = Support((2, 3), [0, 1, 5])
    with pytest.raises(ValueError, match=message):
        topology.exchange(old, np.array([False, True, False]), np.array(grown), ranked)


@given(changes(), st.sampled_from([np.float32, np.float64, np.int32, np.uint16]), st.booleans(), st.booleans())
def test_carrying(case, dtype, reset, pairs):
    old, goes, _, ranks = case
    _, _, source = spec.exchange(old, goes, ranks, True)
    bits = np.random.default_rng(old.nnz).bytes(old.nnz * (1 + pairs) * np.dtype(dtype).itemsize)
    aligned = np.frombuffer(bits, dtype).reshape((old.nnz, 2) if pairs else old.nnz)  # NaN of all kinds among them
    for tier in (spec, cpu):
        out = tier.carry(source, aligned, 7, reset)
        assert out.dtype == dtype
        held = aligned.view(np.dtype(f"u{aligned.itemsize}")).tolist()
        seven = np.full(aligned.shape[1:], 7, dtype).view(np.dtype(f"u{aligned.itemsize}")).tolist()
        wanted = [held[s] if s >= 0 else held[-2 - s] if s < -1 and not reset else seven for s in source.tolist()]
        assert out.view(np.dtype(f"u{out.itemsize}")).tolist() == wanted


@st.composite
def streams(draw):
    """Return scores in pieces, with ties or without, the places that are taken, and how many are wanted."""
    rng = np.random.default_rng(draw(SEEDS))
    size = draw(st.sampled_from([1, 7, 8, 9, 100, 4096, 4097, 9_000, 20_000]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    gradient = rng.standard_normal(size).astype(dtype)
    if draw(st.booleans()):
        gradient = np.round(gradient)
    if draw(st.booleans()):
        gradient = gradient[np.argsort(np.abs(gradient), kind="stable")]  # every piece enters, and the list overflows
    start = draw(st.sampled_from([0, 5, 2**40]))
    taken = start + np.flatnonzero(rng.random(size) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    want = draw(st.integers(0, size - taken.size))
    return gradient, start, taken, want, draw(st.sampled_from([size, 1 + size // 3, 1 + size // 20]))


def best(tier, gradient, start, taken, want, length):
    """Run a tier's two kernels as growth does."""
    capacity = want + max(want, 2 * topology.STRETCH)
    found, scores = np.empty(capacity, np.int64), np.empty(capacity, gradient.dtype)
    held, threshold = 0, -1.0
    at = 0
    while at < gradient.size:
        piece = gradient[at : at + length]
        held, done = tier.collect(piece, start + at, taken, threshold, found, scores, held)
        at += done
        if held > want:
            threshold = tier.shorten(found[:held], scores[:held], want)
            held = want
    return found[:held], scores[:held]


@given(streams())
@settings(max_examples=60)
def test_the_best_of_a_stream(case):
    gradient, start, taken, want, length = case
    assume(want)
    free = np.setdiff1d(np.arange(gradient.size) + start, taken)
    wanted = np.sort(free[np.argsort(-np.abs(gradient[free - start]), kind="stable")[:want]])
    for tier in (spec, cpu):
        found, scores = best(tier, gradient, start, taken, want, length)
        assert np.array_equal(found, wanted)
        assert np.array_equal(scores, np.abs(gradient[wanted - start]))


@given(streams(), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
@settings(max_examples=60)
def test_collecting_is_the_same_in_both_tiers(case, threshold):
    gradient, start, taken, _, _ = case
    lists = []
    for tier in (spec, cpu):
        found, scores = np.empty(gradient.size + 5000, np.int64), np.empty(gradient.size + 5000, gradient.dtype)
        found[:3] = -9
        held, done = tier.collect(gradient, start, taken, threshold, found, scores, 3)
        assert done == gradient.size
        lists.append((found[:held].tolist(), scores[3:held].tolist()))
    assert lists[0] == lists[1]


@given(st.integers(1, 10_000), st.data())
@example(4096, None)
@settings(max_examples=30)
def test_a_nan_is_found_wherever_it_stands(size, data):
    at = data.draw(st.integers(0, size - 1)) if data else size - 1
    gradient = np.zeros(size, np.float32)
    gradient[at] = np.nan
    found, scores = np.empty(size + 5000, np.int64), np.empty(size + 5000, np.float32)
    for taken in (np.empty(0, np.int64), np.arange(size)):
        for tier in (spec, cpu):
            with pytest.raises(ValueError, match="a gradient to be ranked is NaN"):
                tier.collect(gradient, 0, taken, 1.0, found, scores, 0)


def test_infinities_are_scores_like_others():
    gradient = np.array([1, -np.inf, 2, np.inf, 0], np.float32)
    for tier in (spec, cpu):
        assert best(tier, gradient, 0, np.array([3]), 2, 5)[0].tolist() == [1, 2]


def test_an_exchange_of_rows_that_are_longer_than_any_stretch():
    """A list that gallops over thousands of keys in one row and none in the next ones."""
    rng = np.random.default_rng(0)
    shape = (40, 50_000)
    old = Support(shape, np.sort(rng.choice(50_000 * 40, 30_000, replace=False)))
    goes = rng.random(old.nnz) < 0.3
    kept = old.flat[~goes]
    free = np.setdiff1d(np.concatenate([np.arange(20_000), np.arange(1_900_000, 2_000_000)]), kept)
    for one, other in zip(spec.exchange(old, goes, free, False), cpu.exchange(old, goes, free, False), strict=True):
        assert np.array_equal(one, other)


# --- planted mistakes ----------------------------------------


def caught(test, *strategies):
    """Run a test on generated cases until one fails."""
    quick = settings(phases=[Phase.generate], report_multiple_bugs=False, database=None)

    def once(case):
        test.hypothesis.inner_test(*case)

    with pytest.raises(AssertionError):
        quick(given(st.tuples(*strategies))(once))()


def broken(monkeypatch, name, mistake):
    """Replace a kernel by one that makes a mistake in what the right one returned."""
    right = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda *arguments: mistake(right(*arguments), *arguments))


def swap_sources(result, *_):
    indptr, indices, source = result
    return indptr, indices, np.where(source < 0, -1, source)  # forgets what grows back


def one_column_on(result, *_):
    indptr, indices, source = result
    return indptr, indices + (indices > 3).astype(indices.dtype), source


def sources_from_the_end(result, *_):
    return result[0], result[1], result[2][::-1].copy()


@pytest.mark.parametrize("mistake", [swap_sources, one_column_on, sources_from_the_end])
def test_a_wrong_exchange_is_caught(monkeypatch, mistake):
    broken(monkeypatch, "exchange", mistake)
    caught(test_an_exchange_is_one_of_sets, changes())


@pytest.mark.parametrize("name", ["places", "free_places"])
def test_wrong_places_are_caught(monkeypatch, name):
    broken(monkeypatch, name, lambda found, *_: found + (found > 7))
    caught(test_places_of_entries if name == "places" else test_free_places_are_counted_through, changes())


def test_a_carry_that_takes_the_other_rule_is_caught(monkeypatch):
    right = cpu.carry
    monkeypatch.setattr(cpu, "carry", lambda source, aligned, fill, reset: right(source, aligned, fill, not reset))
    caught(test_carrying, changes(), st.just(np.float32), st.booleans(), st.just(False))


def test_a_threshold_that_lets_ties_in_is_caught(monkeypatch):
    right = cpu.collect
    monkeypatch.setattr(
        cpu, "collect", lambda piece, start, taken, threshold, *rest: right(
            piece, start, taken, np.nextafter(threshold, -1), *rest
        )
    )  # fmt: skip
    caught(test_collecting_is_the_same_in_both_tiers, streams(), st.sampled_from([0.0, 1.0]))


def test_keeping_the_last_of_tied_scores_is_caught(monkeypatch):
    right = cpu.shorten

    def wrong(found, scores, want):
        found[:], scores[:] = found[::-1].copy(), scores[::-1].copy()
        threshold = right(found, scores, want)
        found[:want], scores[:want] = found[:want][::-1].copy(), scores[:want][::-1].copy()
        return threshold

    monkeypatch.setattr(cpu, "shorten", wrong)
    caught(test_the_best_of_a_stream, streams())
