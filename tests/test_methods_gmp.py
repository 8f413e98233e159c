"""Gradual magnitude pruning: the cubic schedule, counts and kept sets on the way, and whole runs.

Counts are found again by exact fractions. Planted mistakes are those that other programs have made.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratic_cases import (
    PRUNABLE,
    SPECS,
    TOTAL,
    Place,
    applied,
    best,
    caught,
    count_of_all,
    count_of_each,
    drawn,
    of_pool,
    quick,
    stored,
)

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.conventions import Conventions
from refimpl.methods.gmp import GMP
from refimpl.methods.pruning import cubic, prune
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import train, trainer_of
from refimpl.weights import Params, SparseWeight, as_sparse, values_of

# --- the cubic schedule


@given(
    st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 50), st.integers(1, 300), st.integers(-5, 400)
)  # fmt: skip
def test_the_cubic_is_the_formula_rounded_once(a: float, b: float, begin: int, length: int, step: int) -> None:
    final, initial, end = min(a, b), max(a, b), begin + length
    got = [cubic(initial, final, step=t, begin=begin, end=end) for t in (step, step + 1)]
    at = min(max(step, begin), end)
    s_i, s_f = 1 - Fraction(initial), 1 - Fraction(final)
    exact = 1 - (s_f + (s_i - s_f) * (1 - Fraction(at - begin, length)) ** 3)
    assert abs(Fraction(got[0]) - exact) <= Fraction(1, 2**54)  # half the spacing of numbers below 1
    assert got[1] <= got[0]
    assert cubic(initial, final, step=begin, begin=begin, end=end) == initial
    assert cubic(initial, final, step=end, begin=begin, end=end) == final


# --- gradual magnitude pruning


def check_gmp(make: Callable[..., Any], begin: int, end: int, interval: int, **options: Any) -> None:
    """Walk through the updates: when they are, how many stay, which, and that none comes back."""
    density, s_i = 0.2, options.get("initial_sparsity", 0.0)
    scope, pool = options.get("scope", "local"), options.pop("pool", "matrix")
    allocation = Allocation(density, options.pop("rule", "uniform"), options.pop("fixed", {}))
    conventions = Conventions(pool=pool)
    method = make(
        allocation, begin_step=begin, end_step=end, interval=interval, conventions=conventions, **options
    )  # fmt: skip
    method.supports(SPECS, seed=0)
    due = [t for t in range(1, end + 3 * interval) if method.exchange_due(step=t, epoch_end=False)]
    assert due == sorted({t for t in range(begin, end, interval) if t} | {end}), "the updates are at other steps"
    final = densities(SPECS, allocation)
    rng = np.random.default_rng(2)
    params = method.start(drawn(4), SPECS, seed=0)
    if begin:
        assert method.exchange(params, step=begin - 1, seed=0) == {}, "something went before the beginning"
    for t in [0, *due] if not begin else due:
        left = 1 - Fraction(t - begin, end - begin)
        before, params = stored(params), applied(params, method.exchange(params, step=t, seed=0) if t else {})
        kept = stored(params)
        assert kept.keys() <= before.keys(), "a weight came back"
        parts = [before] if scope == "global" else of_pool(before, pool)
        for part, whole in zip(parts, [TOTAL] if scope == "global" else map(len, of_pool(_everything(), pool))):
            s_f = 1 - Fraction(final[next(iter(part))[0]])
            s_t = s_f + (min(Fraction(s_i), s_f) - s_f) * left**3
            here = kept.keys() & part.keys()
            # The density is rounded once and its product with the size once, by a unit of 2**-53 each.
            assert abs(len(here) - (1 - s_t) * whole) <= Fraction(1, 2) + Fraction(whole, 2**52), "a count is off"
            assert here == best(part, len(here)), "other weights stayed than the largest"
        for weight in params.values():  # training goes on
            values_of(weight)[...] += 0.3 * rng.standard_normal(values_of(weight).shape)
    total = count_at(density, TOTAL) if scope == "global" else sum(method.kept().values())
    assert len(stored(params)) == total, "the final sparsity was not reached"


def _everything() -> dict[Place, float]:
    return {(name, p): 1.0 for name, spec in PRUNABLE.items() for p in range(spec.size)}


GMP_WALKS: list[tuple[int, int, int, dict[str, Any]]] = [
    (10, 50, 10, {}),
    (10, 47, 10, {}),  # the last update is nearer than the others
    (0, 30, 7, {"initial_sparsity": 0.5}),
    (3, 40, 1, {"scope": "global"}),
    (5, 25, 5, {"initial_sparsity": 0.3, "pool": "gate"}),
    (5, 25, 100, {}),
    (2, 20, 3, {"rule": "erk", "initial_sparsity": 0.4}),
    (2, 20, 3, {"fixed": {"fc.weight": 0.9}, "initial_sparsity": 0.4}),  # one ends denser than that
]


@pytest.mark.parametrize(("begin", "end", "interval", "options"), GMP_WALKS)
def test_gmp_follows_the_cubic_to_the_entry(begin: int, end: int, interval: int, options: dict[str, Any]) -> None:
    check_gmp(GMP, begin, end, interval, **options)


class OneStepAhead(GMP):
    """The shift by one that a schedule of p = t + 1 - start has."""

    def density_at(self, final: float, step: int) -> float:
        return super().density_at(final, step + 1)


class OverTheEnd(GMP):
    """The division by T_end in place of T_end − t_0."""

    def density_at(self, final: float, step: int) -> float:
        left = 1 - (step - self.begin_step) / self.end_step
        return final + (self.initial_density - final) * left**3


class MissesTheEnd(GMP):
    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        return super().exchange_due(step=step, epoch_end=epoch_end) and (step - self.begin_step) % self.interval == 0


class Linear(GMP):
    def density_at(self, final: float, step: int) -> float:
        done = (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.initial_density + (final - self.initial_density) * done


class OfWhatIsLeft(GMP):
    """Takes the sparsity as a share of what is still stored, as iterated calls of some libraries do."""

    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Any]:
        now = {p.label: as_sparse(params[p.label]).nnz for p in self.pools}
        kept = {k: max(1, round(self.density_at(0.2, step) * n)) for k, n in now.items()}
        return prune(params, self.pools, kept)


class TheSmallest(GMP):
    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Any]:
        inverse: Params = {n: SparseWeight(as_sparse(w).support, 1 / as_sparse(w).values) for n, w in params.items()}
        return super().exchange(inverse, step=step, seed=seed)


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (OneStepAhead, "a count is off"),
        (OverTheEnd, "a count is off"),
        (MissesTheEnd, "other steps"),
        (Linear, "a count is off"),
        (OfWhatIsLeft, "a count is off"),
        (TheSmallest, "other weights"),
    ],
)
def test_wrong_schedules_are_caught(planted: type[GMP], match: str) -> None:
    caught(check_gmp, planted, 10, 47, 10, match=match)


def test_gmp_keeps_the_dense_arrays_until_something_goes() -> None:
    trainer = trainer_of(GMP(Allocation(0.5), begin_step=4, end_step=12, interval=4))
    train(trainer, 4)  # the update at the beginning takes nothing, and makes nothing sparse
    assert all(isinstance(w, np.ndarray) for w in trainer.state.params.values())
    train(trainer, 8)
    assert all(isinstance(trainer.state.params[name], SparseWeight) for name in PRUNABLE)


@quick
@given(st.integers(0, 2**32), st.integers(-20, 20))
def test_the_mask_does_not_depend_on_a_common_scale(seed: int, power: int) -> None:
    method = GMP(Allocation(0.3), begin_step=0, end_step=10, interval=1, scope="global")
    method.supports(SPECS, seed=0)
    params = drawn(seed)
    scaled: Params = {name: values_of(w) * 2.0**power for name, w in params.items()}
    one, other = (method.exchange(p, step=6, seed=0) for p in (params, scaled))
    assert {k: e.new for k, e in one.items()} == {k: e.new for k, e in other.items()}


# --- whole runs


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        (lambda a: GMP(a, begin_step=3, end_step=17, interval=4), count_of_each),
        (lambda a: GMP(a, begin_step=0, end_step=12, interval=3, scope="global"), count_of_all),
    ],
)
def test_whole_runs(method: Callable[[Allocation], Any], counts: Any) -> None:
    check_run(lambda density, steps, epoch: method(Allocation(density)), "pruning", counts=counts)


def test_a_gradual_run_from_an_initial_sparsity() -> None:
    def make(density: float, steps: int, epoch: int) -> GMP:
        return GMP(Allocation(density), begin_step=0, end_step=14, interval=4, initial_sparsity=0.3)

    check_run(make, "pruning", counts=count_of_each, dense_at_one=False)


def test_a_state_is_needed_for_nothing_but_itself() -> None:
    """Resuming before any support was asked for, as from a checkpoint alone."""
    first = GMP(Allocation(0.3, fixed={"fc.weight": 0.5}), begin_step=1, end_step=9, interval=2, scope="global")
    first.supports(SPECS, seed=0)
    second = GMP(Allocation(0.3), begin_step=1, end_step=9, interval=2, scope="global")
    second.load_state_dict(first.state_dict(), first.state_arrays())
    params = drawn(8)
    one, other = (m.exchange(params, step=7, seed=0) for m in (first, second))
    assert {k: e.new for k, e in one.items()} == {k: e.new for k, e in other.items()}


# --- errors


HALF = Allocation(0.5)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: GMP(HALF, begin_step=5, end_step=4, interval=1), "from step 5 to step 4; give"),
        (lambda: GMP(HALF, begin_step=0, end_step=0, interval=1), "give"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=0), "0 steps; give at least 1"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=1, initial_sparsity=0.6), "0.6 is above the final"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=1, initial_sparsity=-1), "sparsity is -1"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=1, monotone=False), "DPF"),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


def test_an_emptied_tensor_is_refused_before_training() -> None:
    method = GMP(Allocation(0.01), begin_step=1, end_step=2, interval=1, scope="global")
    with pytest.raises(ValueError, match="keep 2 entries in 5 tensors"):
        method.supports(SPECS, seed=0)
