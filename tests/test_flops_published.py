"""Operations as the literature counts them: closed formulas, the same by the step, and what lies between and a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods import SET, Allocation, BaseMethod, Conventions, Dense, RigL, Static, TopKAST
from refimpl.methods.dpf import DPF
from refimpl.methods.gmp import GMP
from refimpl.methods.itop import ITOP
from refimpl.methods.schedule import Constant
from refimpl.methods.snfs import SNFS
from refimpl.methods.ste import STE
from refimpl.training import flop_account, flops, published
from refimpl.training.published import FORMULAS, Formula, formula_of
from refimpl.training.simulate import Forecast, Workload, planned
from refimpl.weights import Exchange, Params, ParamSpec, SparseWeight, Support, support_of

Table = list[tuple[int, int, int]]
"""Rows, columns, and positions of each layer: a small network of one's own."""

TABLE: Table = [(8, 20, 49), (16, 8, 25), (12, 16, 4), (4, 12, 1)]
tables = st.lists(
    st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([5, 10, 20]), st.integers(1, 30)), min_size=1, max_size=5
)
densities = st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.75])
whens = st.sampled_from(["instead", "after"])
QUARTERS = Allocation(0.25)


class Layers:
    """A model that is nothing but its table; the first layer has no input gradient."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def specs(self) -> dict[str, ParamSpec]:
        """Describe the layers."""
        return {
            f"{k}": ParamSpec(f"{k}", (rows, columns), "linear", True, columns_per_sample=n, input_gradient=k > 0)
            for k, (rows, columns, n) in enumerate(self.table)
        }

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the weights."""
        rng, supports, params = np.random.default_rng(seed), supports or {}, {}
        for name, spec in self.specs().items():
            dense = rng.standard_normal(spec.shape)
            params[name] = SparseWeight.from_dense(dense, supports[name]) if name in supports else dense
        return params


def passes(table: Table, density: Callable[[int], float] | float = 1.0) -> Fraction:
    """Return 2 Σ c |A| by hand, for a uniform density or one for each size."""
    at = density if callable(density) else lambda size: density
    return sum((Fraction(2 * n) * round(at(rows * columns) * rows * columns) for rows, columns, n in table), Fraction())


def simulated(table: Table, method: BaseMethod, steps: int, *, samples: int = 1, clips: bool = False) -> Forecast:
    """Return the forecast of a run of one epoch with batches of one size."""
    model: Any = Layers(table)
    return planned(model, method, Workload((samples,) * steps, steps, clips))


def mean(found: Forecast) -> Fraction:
    """Return the published operations for one sample, exactly."""
    account = found.total
    return Fraction(flops.total(account["published"])) / Fraction(account["samples"]["published"])


def check_books(found: Forecast) -> None:
    """Executed = published + differences, to the last operation."""
    account = found.total
    executed, formula, between = (flops.total(account[kind]) for kind in ("executed", "published", "differences"))
    assert executed == formula + between


# --- the published counter of a simulated run is the formula ---


@settings(max_examples=30, deadline=None)
@given(tables, densities, st.integers(1, 12))
def test_static_and_set_are_three_passes(table: Table, density: float, steps: int) -> None:
    f_s = passes(table, density)
    for method in (Static(Allocation(density)), SET(Allocation(density))):
        found = simulated(table, method, steps)
        assert mean(found) == published.static(f_s) == 3 * f_s
        assert (found.dense, found.sparse) == (passes(table), f_s)
        check_books(found)
    assert mean(simulated(table, Dense(), steps)) == published.dense(passes(table))


@settings(max_examples=40, deadline=None)
@given(
    tables, densities, st.integers(1, 9), st.integers(1, 4), st.integers(0, 8), st.sampled_from(["instead", "after"])
)
def test_rigl(table: Table, density: float, interval: int, periods: int, rest: int, when: str) -> None:
    """Whole periods give the formula; with an end it holds to the last exchange, and then 3 f_S."""
    f_s, f_d = passes(table, density), passes(table)
    conventions = Conventions(exchange_step=when)  # type: ignore[arg-type]

    def rigl(end: int | None) -> RigL:
        return RigL(Allocation(density), Constant(0.3), interval=interval, end_step=end, conventions=conventions)

    found = simulated(table, rigl(None), interval * periods)
    assert mean(found) == published.rigl(f_s, f_d, interval) == (3 * f_s * interval + 2 * f_s + f_d) / (interval + 1)
    check_books(found)
    steps = interval * periods + rest
    for end in (None, 1, interval, interval + 1, steps):
        found = simulated(table, rigl(end), steps)
        assert mean(found) == published.rigl_until(f_s, f_d, interval, steps, end)
        check_books(found)


@settings(max_examples=20, deadline=None)
@given(tables, densities, st.integers(1, 12))
def test_snfs_and_straight_through(table: Table, density: float, steps: int) -> None:
    f_s, f_d = passes(table, density), passes(table)
    found = simulated(table, SNFS(Allocation(density), Constant(0.3), interval=4), steps)
    assert mean(found) == published.snfs(f_s, f_d) == 2 * f_s + f_d
    check_books(found)
    found = simulated(table, STE(Allocation(density)), steps)
    assert mean(found) == published.straight_through([f_s] * steps, f_d)
    check_books(found)


@settings(max_examples=20, deadline=None)
@given(tables, st.sampled_from([0.1, 0.25, 0.5]), st.sampled_from([0.0, 0.25]), st.integers(1, 12))
def test_topkast(table: Table, density: float, more: float, steps: int) -> None:
    found = simulated(table, TopKAST(Allocation(density), exploration=more, refresh=3), steps)
    assert mean(found) == published.topkast(passes(table, density), passes(table, density + more))
    check_books(found)


def cubic(final: Fraction, step: int, begin: int, end: int) -> Fraction:
    """Return the sparsity of Zhu and Gupta's schedule, the definition in fractions."""
    done = Fraction(min(max(step - begin, 0), end - begin), end - begin)
    return final * (1 - (1 - done) ** 3)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 7))
def test_gmp_in_both_forms(interval: int, updates: int, begin: int) -> None:
    """Layers of one size, so that the operations are in proportion to the overall density, as the formula takes it."""
    table, size = [(8, 25, n) for n in (1, 9, 4)], 200
    end, steps = begin + interval * updates, begin + interval * updates + 5
    method = GMP(Allocation(0.1), begin_step=begin, end_step=end, interval=interval)
    sparsities, at = [], begin if begin == 0 else None
    for step in range(1, steps + 1):  # of the batch of this step; the pruning comes after it
        left = 1 if at is None else 1 - cubic(Fraction(9, 10), at, begin, end)
        sparsities.append(1 - Fraction(round(left * size), size))
        if begin <= step <= end and (step - begin) % interval == 0:
            at = step
    assert sparsities[-1] == Fraction(9, 10)
    found = simulated(table, method, steps)
    assert mean(found) == published.gmp(passes(table), sparsities)
    check_books(found)
    sparse = published.gmp(passes(table), sparsities, "sparse")
    assert Fraction(flops.total(found.total["executed"])) == steps * sparse - first_layer(table, sparsities)


def first_layer(table: Table, sparsities: list[Fraction]) -> Fraction:
    """Return the input gradient that the first layer does not have, over a run."""
    rows, columns, n = table[0]
    return sum((2 * n * rows * columns * (1 - s) for s in sparsities), Fraction())


class InTurn(BaseMethod):
    """Dense and compressed phases in turn, as AC/DC's: all weights, then the largest tenth of each tensor."""

    name = "in-turn"

    def __init__(self, phases: list[tuple[str, int]]) -> None:
        super().__init__()
        ends = np.cumsum([steps for _, steps in phases])[:-1]
        self.turns = {int(end): kind for end, (kind, _) in zip(ends, phases[1:])}

    def exchange_due(self, *, step: int, epoch_end: bool, asgd_triggered: bool = False) -> bool:
        """Tell whether a phase ends."""
        return not epoch_end and step in self.turns

    def settled(self, step: int) -> bool:
        """Never: sets move to the end."""
        return False

    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Exchange]:
        """Take out all but a tenth, or bring the rest back."""
        made = {}
        for name, weight in params.items():
            old = support_of(weight)
            everything = np.arange(old.size)
            if self.turns[step] == "dense":
                made[name] = Exchange.of(old, np.empty(0, np.int64), np.setdiff1d(everything, old.flat))
            else:
                order = np.argsort(-np.abs(weight).reshape(-1))  # type: ignore[arg-type]
                made[name] = Exchange.of(old, np.sort(order[old.size // 10 :]), np.empty(0, np.int64))
        return made


@pytest.mark.parametrize(
    "phases", [[("dense", 4), ("compressed", 3), ("dense", 2), ("compressed", 6)], [("dense", 1), ("compressed", 1)]]
)
def test_phases_in_turn(phases: list[tuple[Any, int]]) -> None:
    """A method that the counters know nothing of, walked through with weights."""
    table = [(10, 10, 3), (20, 5, 1)]
    found = simulated(table, InTurn(phases), sum(steps for _, steps in phases))
    assert mean(found) == published.acdc(passes(table), passes(table, 0.1), phases)
    check_books(found)


def test_dpf_follows_the_cubic() -> None:
    table, steps = [(10, 10, 3), (20, 5, 1)], 12
    found = simulated(table, DPF(Allocation(0.1), interval=4, end_step=8), steps)
    f_s = [passes(table)] * 4 + [passes(table, float(1 - cubic(Fraction(9, 10), 4, 0, 8)))] * 4
    f_s += [passes(table, 0.1)] * 4
    assert mean(found) == published.straight_through(f_s, passes(table))
    check_books(found)


def test_itop_by_gradient_is_rigl_without_an_end_and_at_random_is_set() -> None:
    f_s, f_d = passes(TABLE, 0.25), passes(TABLE)
    for growth, expected in (("gradient", published.rigl(f_s, f_d, 5)), ("random", published.static(f_s))):
        method = ITOP(QUARTERS, Constant(0.5), total_steps=20, interval=5, growth=growth)  # type: ignore[arg-type]
        assert mean(simulated(TABLE, method, 20)) == expected


# --- formulas against one another and against what is known ---


def test_closed_forms() -> None:
    f_d, f_s = Fraction(100), Fraction(20)
    assert published.granet([f_d, f_s], f_d, 4) == (published.rigl(f_d, f_d, 4) + published.rigl(f_s, f_d, 4)) / 2
    assert published.soft_threshold([f_d, f_s]) == 180
    assert published.mest(f_s, Fraction(30), 3, 12) == Fraction(3 * 30 * 3 + 3 * 20 * 9, 12)
    assert published.mest(f_s, f_s, 3, 12) == published.static(f_s)
    assert published.acdc(f_d, f_s, [("dense", 1), ("compressed", 3)]) == Fraction(3 * 100 + 3 * 3 * 20, 4)
    assert published.imp(f_d, [10, 10, 10], Fraction(4, 5)) == 3 * 100 * 10 * (1 + Fraction(4, 5) + Fraction(16, 25))
    assert published.iss(f_d) == published.dense(f_d) == 300
    assert published.snip_scoring(f_d, 7) * 3 == published.grasp_scoring(f_d, 7) == 6300
    assert published.synflow_scoring([f_d, f_s]) == 360
    assert published.gmp(f_d, [Fraction(0)] * 3) == published.gmp(f_d, [Fraction(0)] * 3, "sparse") == 300


@given(st.integers(1, 1000), st.integers(1, 50))
def test_rigl_lies_between_set_and_snfs(interval: int, percent: int) -> None:
    """At ΔT = 0 it would be SNFS's, and it falls towards 3 f_S as exchanges get rarer."""
    f_d, f_s = Fraction(100), Fraction(percent)
    assert published.rigl(f_s, f_d, 0) == published.snfs(f_s, f_d)
    assert published.static(f_s) < published.rigl(f_s, f_d, interval + 1) < published.rigl(f_s, f_d, interval)


def test_every_method_has_a_formula() -> None:
    for name in published.BY_METHOD.values():
        assert name in FORMULAS
    assert all(formula.status in ("verified", "remembered", "derived") for formula in FORMULAS.values())
    unknown = BaseMethod()
    assert formula_of(unknown).name == "sparse"
    unknown.flops_formula = "dense"  # type: ignore[attr-defined]
    assert formula_of(unknown).name == "dense"
    unknown.flops_formula = "dens"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no formula of operations 'dens'; there are sparse, dense"):
        formula_of(unknown)


# --- executed = published + differences, each by its own count ---


def test_each_difference_by_hand() -> None:
    """RigL that clips by the dense norm, 10 steps of 3 samples with exchanges at 4 and 8 in place of steps."""
    f_s, f_d = passes(TABLE, 0.25), passes(TABLE)
    method = RigL(QUARTERS, Constant(0.3), interval=4, conventions=Conventions(clip_norm="dense"))
    found = simulated(TABLE, method, 10, samples=3, clips=True)
    rows, columns, n = TABLE[0]
    assert found.total["differences"] == {
        "first_layer": -10 * 3 * (2 * n * rows * columns // 4),
        "shared_batch": -2 * 3 * 3 * f_s,
        "dense_norm": 8 * 3 * (f_d - f_s),
    }
    assert found.total["executed"]["growth"] == 2 * 3 * (f_d - f_s)
    check_books(found)


def test_methods_that_use_the_dense_gradient_differ_in_the_first_layer_alone() -> None:
    for method in (SNFS(QUARTERS, Constant(0.3), interval=4), STE(QUARTERS), DPF(QUARTERS, interval=2, end_step=6)):
        assert set(simulated(TABLE, method, 10).total["differences"]) == {"first_layer"}, method.name


def test_gmp_differs_by_the_gradient_of_what_is_gone() -> None:
    method = GMP(QUARTERS, begin_step=2, end_step=6, interval=2)
    found = simulated(TABLE, method, 10)
    terms = found.total
    gone = 10 * passes(TABLE) - Fraction(terms["executed"]["weight_gradient"])
    assert terms["differences"]["gradient_set"] == -gone
    assert set(terms["differences"]) == {"first_layer", "gradient_set"}


COUNTS = st.integers(0, 160)


@given(
    st.sampled_from(sorted(FORMULAS)),
    st.lists(st.tuples(COUNTS, COUNTS), min_size=4, max_size=4),
    st.sampled_from(["growth", "observed"]),
    st.sets(st.integers(0, 3)),
    st.sets(st.integers(0, 3)),
    st.integers(1, 5),
)
def test_books_balance_for_all_sets_and_formulas(
    formula: str, sets: list[tuple[int, int]], why: str, seen: set[int], normed: set[int], samples: int
) -> None:
    """Whatever A and B are, and whatever else a step looked at; an exchange looks at all gradients."""
    specs = Layers(TABLE).specs()
    whole = {}
    if seen:
        whole[why] = list(specs) if why == "growth" else [str(k) for k in seen]
    if normed:
        whole["dense_norm"] = [str(k) for k in normed]
    used, graded = ({str(k): pair[i] for k, pair in enumerate(sets)} for i in (0, 1))
    account = flop_account.new_account()
    flop_account.StepCounter(FORMULAS[formula], specs).add(account, used, graded, samples, whole)
    executed, counted, between = (flops.total(account[kind]) for kind in ("executed", "published", "differences"))
    assert executed == counted + between
    assert set(account["differences"]) <= set(published.DIFFERENCES)


def test_snfs_remembers_the_gradient_of_each_step() -> None:
    found = simulated(TABLE, SNFS(QUARTERS, Constant(0.3), total_steps=10), 10)
    assert found.total["executed"]["observed"] == 10 * (passes(TABLE) - passes(TABLE, 0.25))
    assert "growth" not in found.total["executed"]


# --- planted mistakes ---


def _mean_with(formula: Formula, monkeypatch: pytest.MonkeyPatch) -> Fraction:
    monkeypatch.setitem(FORMULAS, "rigl", formula)
    return mean(simulated(TABLE, RigL(QUARTERS, Constant(0.3), interval=4), 8))


@pytest.mark.parametrize(
    "wrong",
    [
        Formula("rigl", "", "verified", exchange_batch=False),
        Formula("rigl", "", "verified", exchange_batch=True, graded="all"),
        Formula("rigl", "", "verified", exchange_batch=True, used="all"),
    ],
)
def test_catches_a_wrong_formula(wrong: Formula, monkeypatch: pytest.MonkeyPatch) -> None:
    right = published.rigl(passes(TABLE, 0.25), passes(TABLE), 4)
    assert _mean_with(FORMULAS["rigl"], monkeypatch) == right
    assert _mean_with(wrong, monkeypatch) != right


def test_catches_an_exchange_that_is_no_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is over the batches that the paper's authors train on, which is one more for each exchange."""
    monkeypatch.setattr(Formula, "batches", lambda self, *, exchange=False: 1)
    found = simulated(TABLE, RigL(QUARTERS, Constant(0.3), interval=4), 8)
    assert mean(found) != published.rigl(passes(TABLE, 0.25), passes(TABLE), 4)


@pytest.mark.parametrize("term", ["first_layer", "shared_batch", "dense_norm"])
def test_catches_a_forgotten_difference(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Formula.differences

    def forgetful(*args: Any, **options: Any) -> dict[str, float]:
        return {name: value for name, value in right(*args, **options).items() if name != term}

    monkeypatch.setattr(Formula, "differences", forgetful)
    method = RigL(QUARTERS, Constant(0.3), interval=4, conventions=Conventions(clip_norm="dense"))
    found = simulated(TABLE, method, 8, clips=True)
    with pytest.raises(AssertionError):
        check_books(found)


def test_fractions_of_an_empty_account() -> None:
    found = flop_account.fractions(flop_account.new_account(), Layers(TABLE).specs())
    assert all(np.isnan(fraction) for fraction in found.values())
