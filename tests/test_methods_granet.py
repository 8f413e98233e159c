"""GraNet: the cubic total, pruning over all tensors, and the exchange of each tensor."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from gradient_cases import RandomBlocks
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods.allocation import Allocation
from refimpl.methods.conventions import Conventions
from refimpl.methods.granet import GraNet
from refimpl.methods.onestep import ArrayGradient
from refimpl.methods.schedule import Constant
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight, as_sparse, support_of

seeds = st.integers(0, 2**32 - 1)
SHAPES = {"a": (6, 5), "b": (4, 2, 3, 1), "c": (9, 4)}
SPECS = {name: ParamSpec(name, shape, "linear", True, layer="x") for name, shape in SHAPES.items()}
SIZE = 90
BEGIN, END = 3, 17


def total_of(specs, density):
    return round(density * sum(spec.size for spec in specs.values() if spec.prunable))


def quick(density, initial=0.8, kind=GraNet, **options):
    options = {"begin_step": BEGIN, "end_step": END, "interval": 4} | options
    return kind(Allocation(density), 0.4, initial_density=max(initial, density), **options)


@pytest.mark.parametrize("initial", [0.8, 1.0])
@pytest.mark.parametrize("end_growth_step", [None, 10, 24])
def test_whole_runs(initial, end_growth_step):
    check_run(lambda d, total, epoch: quick(d, initial, end_growth_step=end_growth_step), "dynamic", counts=total_of)


@pytest.mark.parametrize("conventions", [
    Conventions(pool="gate"), Conventions(pool="layer"), Conventions(regrow="forbid"),
    Conventions(regrow="reset", drop_ties="threshold"), Conventions(exchange_step="after"),
])  # fmt: skip
def test_whole_runs_of_other_conventions(conventions):
    check_run(lambda d, total, epoch: quick(d, 1.0, conventions=conventions), "dynamic", counts=total_of)


# --- the total of a run --------------------------------------


def check_totals(kind, initial=1.0):
    """The total follows the cubic, in exact fractions, never rises, and ends where it was asked to."""
    density, size = 0.3, sum(spec.size for spec in QuadraticModel().specs().values() if spec.prunable)
    totals, per_tensor = [], []

    def look(trainer):
        weights = [trainer.state.params[name] for name, spec in trainer.specs.items() if spec.prunable]
        per_tensor.append([support_of(w).nnz for w in weights])
        totals.append(sum(per_tensor[-1]))

    trainer = trainer_of(quick(density, initial, kind), steps_per_epoch=100)
    train(trainer, END + 5, look)
    assert totals == sorted(totals, reverse=True), "the total has grown"
    for step in (3, 7, 11, 15, END):
        left = Fraction(END - step, END - BEGIN)
        exact = Fraction(density) + (Fraction(initial) - Fraction(density)) * left**3
        assert totals[step - 1] == round(exact * size), f"the total of step {step} is off the cubic"
    assert totals[-1] == totals[END - 1] == round(density * size), "the final total is another"
    assert len({tuple(counts) for counts in per_tensor}) == (5 if initial == 1 else len(set(totals)))


def test_the_total_follows_the_cubic():
    check_totals(GraNet)


# --- one exchange --------------------------------------------


def problem(seed, fraction, tied=False, kind=GraNet, **conventions):
    method = kind(
        Allocation(0.2), Constant(fraction), initial_density=0.7, begin_step=0, end_step=100, interval=10,
        conventions=Conventions(**conventions),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    params = {}
    for name, support in method.supports(SPECS, seed=seed).items():
        values = rng.integers(-3, 4, support.nnz) if tied else rng.standard_normal(support.nnz)
        params[name] = SparseWeight(support, values * (1.0 if tied else 10.0 ** -rng.integers(0, 2)))
    params["b"] = params["b"].dense() if seed % 3 == 0 else params["b"]  # a dense array counts as stored whole
    gradients = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return method, params, gradients


def check_exchange(kind, seed, step, fraction, tied=False):
    method, params, gradients = problem(seed, fraction, tied, kind)
    offered = {name: ArrayGradient(g, 2) for name, g in gradients.items()}
    exchanges = method.exchange(params, step=step, seed=seed, gradients=offered)
    # (1) over all tensors together, the largest of each tensor staying
    stored = {name: as_sparse(w) for name, w in params.items()}
    entries = [(abs(v), i, name, int(p)) for i, (name, w) in enumerate(stored.items())
               for p, v in zip(w.support.flat, w.values)]  # fmt: skip
    left = Fraction(100 - step, 100)
    target = round((Fraction(0.2) + (Fraction(0.7) - Fraction(0.2)) * left**3) * SIZE)
    safe = {max((e for e in entries if e[2] == name), key=lambda e: (e[0], -e[3])) for name in stored}
    worst = sorted((e for e in entries if e not in safe), key=lambda e: (e[0], -e[1], -e[3]))
    pruned = set(worst[: max(0, len(entries) - target)])
    for name in stored:
        rest = [e for e in entries if e[2] == name and e not in pruned]
        k = int(fraction * len(rest))
        dropped = set(sorted(rest, key=lambda e: (e[0], -e[3]))[:k])
        kept = {e[3] for e in rest} - {e[3] for e in dropped}
        score = np.abs(gradients[name]).reshape(-1)
        grown = set(sorted(set(range(score.size)) - kept, key=lambda p: (-score[p], p))[:k])
        if name not in exchanges:
            assert len(kept | grown) == score.size
            continue
        e = exchanges[name]
        gone = {entry[3] for entry in pruned | dropped if entry[2] == name}
        assert set(e.dropped.tolist()) == gone, "not the smallest were pruned and dropped"
        assert set(e.grown.tolist()) == grown, "growth is not where the gradient is largest"
        assert e.new.nnz == len(rest), "the exchange of a tensor does not conserve its count"


@given(seeds, st.integers(0, 100), st.floats(0, 1), st.booleans())
@settings(max_examples=150, deadline=None)
def test_one_exchange(seed, step, fraction, tied):
    check_exchange(GraNet, seed, step, fraction, tied)


def test_a_tensor_of_small_weights_keeps_its_largest():
    method, params, _ = problem(1, 0.0)
    params["a"].values[...] *= 1e-6
    exchanges = method.exchange(params, step=100, seed=0, gradients=None)
    assert exchanges["a"].new.flat.tolist() == [params["a"].support.flat[np.argmax(np.abs(params["a"].values))]]
    assert sum(e.new.nnz for e in exchanges.values()) == 18


def test_a_tensor_of_fixed_density_is_exchanged_but_not_pruned():
    allocation = Allocation(0.2, fixed={"a": 0.5, "c": 1.0})
    method = GraNet(allocation, Constant(0.5), initial_density=1.0, begin_step=0, end_step=10, interval=5)
    assert list(method.supports(SPECS, seed=0)) == ["a"]
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    params["a"] = SparseWeight.from_dense(params["a"], method.supports(SPECS, seed=0)["a"])
    gradients = {name: ArrayGradient(rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    exchanges = method.exchange(params, step=10, seed=0, gradients=gradients)
    assert sorted(exchanges) == ["a", "b"]
    assert exchanges["a"].new.nnz == 15
    assert exchanges["a"].dropped.size == 7
    assert exchanges["b"].new.nnz == round(0.2 * 24)


def test_when():
    method = quick(0.3, end_growth_step=24)
    method.supports(SPECS, seed=0)
    due = [t for t in range(40) if method.exchange_due(step=t, epoch_end=False)]
    assert due == [3, 7, 11, 15, 17, 19, 23]
    assert not any(method.exchange_due(step=t, epoch_end=True) for t in range(40))
    assert [t for t in range(40) if method.needs_gradient(t)] == due
    assert [method.settled(t) for t in (0, 16, 17)] == [False, False, True]
    early = quick(0.3, end_growth_step=10)
    early.supports(SPECS, seed=0)
    assert [t for t in due if early.needs_gradient(t)] == [3, 7]


@pytest.mark.parametrize("options", [
    {"initial_density": 0.1}, {"initial_density": 1.1}, {"begin_step": 20}, {"interval": 0}, {"end_growth_step": 2},
])  # fmt: skip
def test_errors(options):
    arguments = {"initial_density": 0.5, "begin_step": 3, "end_step": 17, "interval": 2} | options
    with pytest.raises(ValueError, match="give"):
        GraNet(Allocation(0.2), 0.3, **arguments)


def test_too_few_entries_for_all_tensors():
    method = GraNet(Allocation(0.02), 0.3, begin_step=0, end_step=9, interval=3)
    with pytest.raises(ValueError, match="3 tensors would share 2 entries"):
        method.supports(SPECS, seed=0)


def test_a_nan_is_refused():
    method, params, _ = problem(1, 0.0)
    params["a"].values[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        method.exchange(params, step=50, seed=0)


def test_nothing_dense_is_made():
    shape = (4000, 4000)

    method = GraNet(
        Allocation(0.002), Constant(0.5), initial_density=0.005, begin_step=0, end_step=100, interval=10
    )  # fmt: skip
    tracemalloc.start()
    support = method.supports({"w": ParamSpec("w", shape, "linear", True)}, seed=0)["w"]
    weight = SparseWeight(support, np.random.default_rng(0).standard_normal(support.nnz))
    method.exchange({"w": weight}, step=50, seed=0, gradients={"w": RandomBlocks(shape)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * support.nnz + 5 * 25 * 4000 * 4 < shape[0] * shape[1]


# --- planted mistakes ----------------------------------------


class StopsOneUpdateEarly(GraNet):
    def density(self, step):
        return super().density(min(step, 15))


class OverTheEnd(GraNet):
    """The progress is t/t₁ instead of (t − t₀)/(t₁ − t₀)."""

    def density(self, step):
        left = 1 - min(step / self.updates.end, 1)
        return self.allocation.density + (self.initial_density - self.allocation.density) * left**3


class OneFewer(GraNet):
    def _target(self, step):
        return super()._target(step) - 1


@pytest.mark.parametrize("kind", [StopsOneUpdateEarly, OverTheEnd, OneFewer])
def test_mistakes_in_the_total_are_caught(kind):
    with pytest.raises(AssertionError):
        check_totals(kind)


class PerTensor(GraNet):
    """Prunes each tensor to the density, instead of all together."""

    def _pruned(self, params, step):
        counts = {p.label: as_sparse(params[p.label]).nnz for p in self.pools}
        return {p.label: max(0, counts[p.label] - round(self.density(step) * p.size)) for p in self.pools}


class GrowsWhatItPruned(GraNet):
    def _regrown(self, stored, left, pool, step):
        return super()._regrown(stored, stored, pool, step)


class MaskedGradient(GraNet):
    def exchange(self, params, *, step, seed, gradients=None):
        masked = {
            name: ArrayGradient(g.array * support_of(params[name]).mask()) for name, g in gradients.items()
        }  # fmt: skip
        return super().exchange(params, step=step, seed=seed, gradients=masked)


def caught(kind):
    for seed in range(1, 11):
        try:
            check_exchange(kind, seed, 40, 0.4)
        except (AssertionError, ValueError):
            return True
    return False


def test_the_unmutated_method_passes():
    assert not caught(GraNet)


@pytest.mark.parametrize("kind", [PerTensor, GrowsWhatItPruned, MaskedGradient, OneFewer])
def test_mistakes_in_the_exchange_are_caught(kind):
    assert caught(kind)
