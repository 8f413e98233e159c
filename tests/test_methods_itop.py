"""ITOP: the laws of drop and grow for each growth rule; what was explored; and places that were never active."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.exploration import Explored
from refimpl.methods.itop import ITOP
from refimpl.methods.schedule import Constant
from refimpl.testing.method_runs import check_run
from refimpl.testing.methods import check_method
from refimpl.testing.quadratic import QuadraticModel, trainer_of
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight, support_of
from refimpl.weights.support import Support

seeds = st.integers(0, 2**32 - 1)
RULES = ("random", "gradient", "random-unfired")
VARIANTS = {
    "default": Conventions(),
    "gate": Conventions(pool="gate"),
    "layer, ceil": Conventions(pool="layer", drop_rounding="ceil"),
    "forbid": Conventions(regrow="forbid"),
    "reset, threshold": Conventions(regrow="reset", drop_ties="threshold"),
    "bernoulli": Conventions(growth_count="bernoulli"),
}


@pytest.mark.parametrize("conventions", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("growth", RULES)
def test_the_laws_of_drop_and_grow(growth, conventions):
    check_method(
        lambda density, fraction: ITOP(
            Allocation(density), Constant(fraction), total_steps=9, interval=3, growth=growth, conventions=conventions
        ),
        growth="gradient" if growth == "gradient" else "random",
        max_examples=20,
    )


@pytest.mark.parametrize("growth", RULES)
def test_whole_runs(growth):
    check_run(
        lambda d, total, epoch: ITOP(Allocation(d, "erk"), 0.5, total_steps=total, interval=2, growth=growth),
        "dynamic",
    )


def test_when_and_how_much():
    method = ITOP(Allocation(0.5), 0.5, total_steps=100, interval=10)
    method.supports(QuadraticModel().specs(), seed=0)
    assert [t for t in range(1, 201) if method.exchange_due(step=t, epoch_end=False)] == list(range(10, 201, 10))
    assert not method.exchange_due(step=10, epoch_end=True)
    for t in (0, 30, 100):
        expected = 0.005 + 0.495 * (1 + np.cos(np.pi * t / 100)) / 2
        assert abs(method.drop_fraction(t) - expected) <= 4 * np.finfo(float).eps
    assert not method.needs_gradient(10)
    with pytest.raises(ValueError, match="'random-unfired'"):
        ITOP(Allocation(0.5), 0.5, total_steps=1, interval=1, growth="momentum")


# --- what was explored ---------------------------------------


@st.composite
def histories(draw):
    """Draw a shape, and lists of places that are active one after another."""
    size = draw(st.integers(1, 70))
    lists = st.lists(st.integers(0, size - 1), unique=True, max_size=size).map(sorted)
    return size, draw(st.lists(lists | st.just(list(range(size))), max_size=4))


def check_record(kind, history):
    size, lists = history
    explored, ever = kind(), set()
    for places in lists:
        explored.update("w", Support((size, 1), places))
        ever |= set(places)
        np.testing.assert_array_equal(explored.mask("w"), [p in ever for p in range(size)])
        assert explored.fraction("w") == explored.overall() == len(ever) / size
        for start, stop in ((0, size), (size // 3, size - size // 4)):
            never = [p for p in range(start, stop) if p not in ever]
            assert explored.count("w", start, stop) == stop - start - len(never)
            for ranks in (np.arange(len(never)), np.arange(1, len(never), 3)):
                np.testing.assert_array_equal(explored.unexplored("w", start, stop, ranks), np.array(never, int)[ranks])
            with pytest.raises(ValueError, match="never active"):
                explored.unexplored("w", start, stop, np.array([len(never)]))
        resumed = kind()
        resumed.load_state_dict(explored.state_dict(), explored.state_arrays())
        np.testing.assert_array_equal(resumed.mask("w"), explored.mask("w"))
        assert sum(a.nbytes for a in explored.state_arrays().values()) == -(-size // 8)


@given(histories())
@settings(max_examples=150)
def test_the_record_of_places(history):
    check_record(Explored, history)


def test_the_record_over_pieces():
    rng = np.random.default_rng(0)
    size = 1 << 20
    flat = np.flatnonzero(rng.random(size) < 0.6)
    explored = Explored()
    explored.update("w", Support((1 << 10, 1 << 10), flat))
    never = np.setdiff1d(np.arange(300_001, 900_007), flat)
    ranks = np.flatnonzero(rng.random(never.size) < 0.01)
    np.testing.assert_array_equal(explored.unexplored("w", 300_001, 900_007, ranks), never[ranks])


def test_the_overall_fraction_weighs_tensors_by_their_size():
    explored = Explored()
    assert explored.overall() == 0
    explored.update("a", Support((2, 5), [0, 3]))
    explored.update("b", Support((30,), list(range(15))))
    assert explored.overall() == 17 / 40
    assert explored.names == ["a", "b"]
    with pytest.raises(ValueError, match="10 entries"):
        explored.update("a", Support((2, 6), [0]))
    with pytest.raises(ValueError, match="lacks the bits of a"):
        explored.load_state_dict({"sizes": {"a": 10}}, {})


class CountsEachTime(Explored):
    def fraction(self, name):
        self.total = getattr(self, "total", 0)
        return super().fraction(name) + self.total

    def update(self, name, support):
        self.total = getattr(self, "total", -1) + 1
        super().update(name, support)


class Forgets(Explored):
    def update(self, name, support):
        self._bits.pop(name, None)
        super().update(name, support)


class BitsTheOtherWay(Explored):
    def mask(self, name):
        return np.unpackbits(self._bits[name], count=self._sizes[name]).astype(bool)


@pytest.mark.parametrize("kind", [CountsEachTime, Forgets, BitsTheOtherWay])
def test_mistakes_in_the_record_are_caught(kind):
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        settings(max_examples=150, database=None)(given(histories())(lambda history: check_record(kind, history)))()


# --- exploration in a run ------------------------------------


def explore(growth, kind=ITOP, steps=24):
    """Train; check the bounds of the explored fraction after each step, and return it."""
    method = kind(Allocation(0.3), 0.5, total_steps=steps, interval=2, growth=growth)
    trainer = trainer_of(method)
    explored, fractions, grown = Explored(), [], 0
    names = [name for name, spec in trainer.specs.items() if spec.prunable]
    size = sum(trainer.specs[name].size for name in names)
    for step in range(steps + 1):
        if step:
            window = np.array([trainer.state.window])
            exchanges = trainer.step(window, window).exchanges
            grown += sum(e.counts()["grown"] for e in exchanges.values())
        for name in names:
            explored.update(name, support_of(trainer.state.params[name]))
        stored = sum(trainer.state.params[name].nnz for name in names)
        fractions.append(explored.overall())
        assert fractions[-1] >= stored / size, "less was explored than is active"
        assert fractions[-1] <= min(1, fractions[0] + grown / size) + 1e-12, "more was explored than ever grew"
    assert fractions == sorted(fractions), "the explored fraction has fallen"
    return fractions[-1], fractions[0] + grown / size


def test_exploration_in_a_run():
    shares = {growth: explore(growth, steps=8) for growth in RULES}
    # What was never active grows first: nothing is grown twice until all has been, which takes longer than this run.
    assert shares["random-unfired"][0] == pytest.approx(shares["random-unfired"][1], abs=1e-12)
    assert shares["random-unfired"][0] > shares["random"][0]
    assert shares["random"][0] > 0.3
    explore("random-unfired", steps=30)  # long enough for all places of some tensors


# --- places that were never active ---------------------------


def two_tensors(seed, shape=(6, 10), density=0.2, pool="matrix", kind=ITOP):
    blocks = {"i": slice(0, 2), "f": slice(2, 6)}
    specs = {n: ParamSpec(n, shape, "linear", True, blocks, layer="x") for n in ("u", "v")}
    method = kind(
        Allocation(density), Constant(0.5), total_steps=9, interval=1, growth="random-unfired",
        conventions=Conventions(pool=pool),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    params = {
        name: SparseWeight(support, rng.standard_normal(support.nnz))
        for name, support in method.supports(specs, seed=seed).items()
    }
    return method, params


def check_unfired(kind, seed, pool, density):
    method, params = two_tensors(seed, density=density, pool=pool, kind=kind)
    ever = {name: set(w.support.flat.tolist()) for name, w in params.items()}
    for step in range(1, 9):
        exchanges = method.exchange(params, step=step, seed=seed)
        for p in method.pools:
            inside = [(s.name, f) for s in p.segments for f in range(s.start, s.stop)]
            never = {(n, f) for n, f in inside if f not in ever[n]}
            grown = {(n, f) for n, f in inside if f in set(exchanges[n].grown.tolist())}
            assert len(grown & never) == min(len(grown), len(never)), "what was active grew before what never was"
        for name, e in exchanges.items():
            ever[name] |= set(e.new.flat.tolist())
            params[name] = SparseWeight(e.new, method.values_after(name, params[name], e, step=step, seed=seed))
            params[name].values[...] += np.random.default_rng(step).standard_normal(e.new.nnz)


@given(seeds, st.sampled_from(["matrix", "gate", "layer"]), st.floats(0.1, 0.6))
@settings(max_examples=50, deadline=None)
def test_what_was_never_active_grows_first(seed, pool, density):
    check_unfired(ITOP, seed, pool, density)


class GrowsAnywhere(ITOP):
    def exchange(self, params, *, step, seed, gradients=None):
        self.growth = "random"
        return super().exchange(params, step=step, seed=seed)


class RemembersTheStartOnly(ITOP):
    def exchange(self, params, *, step, seed, gradients=None):
        if step > 1:
            self.explored.update = lambda name, support: None
        return super().exchange(params, step=step, seed=seed)


@pytest.mark.parametrize("kind", [GrowsAnywhere, RemembersTheStartOnly])
def test_mistakes_in_what_grows_first_are_caught(kind):
    with pytest.raises((AssertionError, ValueError)):
        check_unfired(kind, 0, "gate", 0.2)


def test_all_that_was_never_active_is_equally_likely():
    method, params = two_tensors(0)
    never = np.setdiff1d(np.arange(60), params["u"].support.flat)
    grown = np.zeros(60)
    for step in range(2000):
        grown[method.exchange(params, step=step, seed=0)["u"].grown] += 1
    assert grown.sum() == grown[never].sum()
    expected = grown.sum() / never.size
    assert ((grown[never] - expected) ** 2 / expected).sum() < stats.chi2.ppf(1 - 1e-6, never.size - 1)


@pytest.mark.parametrize("growth", ["random", "random-unfired"])
def test_memory_is_that_of_the_support_and_of_the_bits(growth):
    shape = (4000, 4000)
    method = ITOP(Allocation(0.005), Constant(0.5), total_steps=9, interval=1, growth=growth)
    tracemalloc.start()
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    weight = SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))
    method.exchange({"w": weight}, step=1, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bits = shape[0] * shape[1] // 8 if growth == "random-unfired" else 0
    assert peak < 150 * support.nnz + bits + (1 << 21) < shape[0] * shape[1] * 1.2
    assert bits or peak < 150 * support.nnz
