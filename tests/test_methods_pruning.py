"""One-shot and gradual magnitude pruning, and lottery tickets: counts, kept sets, schedules, rewinding.

What is kept is found again here by sorting in plain Python, counts by exact fractions. Planted mistakes, those that
other programs have made among them, show that the checks see what they should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.base import BaseMethod
from refimpl.methods.conventions import Conventions
from refimpl.methods.drop import drop_smallest
from refimpl.methods.gmp import GMP
from refimpl.methods.imp import IMP
from refimpl.methods.oneshot import OneShot
from refimpl.methods.pruning import cubic, prune
from refimpl.optim import SGD, Adam
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, ParamSpec, SparseWeight, Support, as_sparse, support_of, values_of

SPECS = QuadraticModel().specs()
PRUNABLE = {name: spec for name, spec in SPECS.items() if spec.prunable}
TOTAL = sum(spec.size for spec in PRUNABLE.values())
quick = settings(max_examples=25, deadline=None)


def drawn(seed: int, tied: bool = False) -> Params:
    """Return random dense parameters of the quadratic model, of few different magnitudes if they are to tie."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(-3, 4, spec.shape).astype(float) if tied else rng.standard_normal(spec.shape)
        for name, spec in SPECS.items()
    }


def applied(params: Params, exchanges: dict[str, Any]) -> Params:
    """Return the parameters after exchanges."""
    moved = {name: SparseWeight(e.new, e.carry(values_of(params[name]).reshape(-1))) for name, e in exchanges.items()}
    return params | moved


Place = tuple[str, int]


def stored(params: Params) -> dict[Place, float]:
    """Return the stored values of the prunable tensors by place, in order."""
    out: dict[Place, float] = {}
    for name in PRUNABLE:
        weight = as_sparse(params[name])
        out |= {(name, int(p)): float(v) for p, v in zip(weight.support.flat, weight.values, strict=True)}
    return out


def best(values: dict[Place, float], count: int) -> set[Place]:
    """Return the places of the largest magnitudes; sorting is stable, so of equal ones the first stay."""
    return set(sorted(values, key=lambda place: -abs(values[place]))[:count])


def of_pool(values: dict[Place, float], pool: str) -> list[dict[Place, float]]:
    """Divide places as a convention does: by tensor, gate or layer."""
    parts: dict[str, dict[Place, float]] = {}
    for (name, p), value in values.items():
        spec = SPECS[name]
        row = p // (spec.size // spec.shape[0])
        label = {"matrix": name, "layer": spec.layer, "gate": name}[pool]
        if pool == "gate" and spec.blocks:
            label += next(gate for gate, rows in spec.blocks.items() if rows.start <= row < rows.stop)
        parts.setdefault(label, {})[name, p] = value
    return list(parts.values())


def caught(check: Callable[..., None], *arguments: Any, match: str) -> None:
    """Require that a check fails on a planted mistake."""
    with pytest.raises(AssertionError, match=match):
        check(*arguments)


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


# --- one-shot


def check_one_shot(make: Callable[..., Any], seed: int, density: float, scope: str, pool: Any, tied: bool) -> None:
    """Compare the kept set with a sort, within each pool or over all tensors."""
    method = make(Allocation(density), at_step=7, scope=scope, conventions=Conventions(pool=pool))
    method.supports(SPECS, seed=0)
    params = drawn(seed, tied)
    before = {name: values_of(w).copy() for name, w in params.items()}
    exchanges = method.exchange(params, step=7, seed=0)
    assert all(np.array_equal(values_of(params[name]), before[name]) for name in params), "the exchange wrote"
    kept = stored(applied(params, exchanges))
    values = stored(params)
    parts = [values] if scope == "global" else of_pool(values, pool)
    expected = set().union(*(best(part, round(density * len(part))) for part in parts))
    assert kept.keys() == expected, "other weights were kept than the largest"
    assert all(kept[place] == values[place] for place in kept), "a weight that stayed has another value"
    again = method.exchange(applied(params, exchanges), step=7, seed=0)
    assert again == {}, "pruned once more, more went"


@quick
@given(
    st.integers(0, 2**32), st.floats(0.3, 0.99), st.sampled_from(["local", "global"]),
    st.sampled_from(["matrix", "gate", "layer"]), st.booleans(),
)  # fmt: skip
def test_one_shot_keeps_the_largest(seed: int, density: float, scope: str, pool: str, tied: bool) -> None:
    check_one_shot(OneShot, seed, density, scope, pool, tied)


def in_place_of_prune(change: Callable[..., dict[str, Any]]) -> type[OneShot]:
    class Planted(OneShot):
        def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Any]:
            return change(self, params)

    return Planted


def _signed(method: OneShot, params: Params) -> dict[str, Any]:
    lowest = min(float(values_of(w).min()) for w in params.values())
    shifted: Params = {name: values_of(w) - lowest for name, w in params.items()}
    return prune(shifted, method.pools, method.kept(), method.conventions)


def _one_fewer(method: OneShot, params: Params) -> dict[str, Any]:
    return prune(params, method.pools, {k: n - 1 for k, n in method.kept().items()}, method.conventions)


def _ties_die(method: OneShot, params: Params) -> dict[str, Any]:
    return prune(params, method.pools, method.kept(), replace(method.conventions, drop_ties="threshold"))


def _normalized(method: OneShot, params: Params) -> dict[str, Any]:
    scaled: Params = {name: values_of(w) / np.linalg.norm(values_of(w)) for name, w in params.items()}
    return prune(scaled, method.pools, method.kept(), method.conventions)


def _each_alone(method: OneShot, params: Params) -> dict[str, Any]:
    alone = OneShot(method.allocation, at_step=7)
    alone.supports(SPECS, seed=0)
    return alone.exchange(params, step=7, seed=0)


@pytest.mark.parametrize(
    ("change", "scope", "tied"),
    [
        (_signed, "local", False),
        (_one_fewer, "local", False),
        (_ties_die, "local", True),
        (_normalized, "global", False),
        (_each_alone, "global", False),
    ],
)
def test_wrong_kept_sets_are_caught(change: Callable[..., dict[str, Any]], scope: str, tied: bool) -> None:
    caught(check_one_shot, in_place_of_prune(change), 3, 0.5, scope, "matrix", tied, match="kept|more went")


def test_one_shot_against_torch() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as torch_prune

    params = drawn(5)
    for scope in ("local", "global"):
        method = OneShot(Allocation(0.25), at_step=1, scope=scope)
        method.supports(SPECS, seed=0)
        ours = applied(params, method.exchange(params, step=1, seed=0))
        modules = {}
        for name in PRUNABLE:
            modules[name] = torch.nn.Module()
            modules[name].weight = torch.nn.Parameter(torch.from_numpy(values_of(params[name]).copy()))
        if scope == "global":
            goes = TOTAL - count_at(0.25, TOTAL)
            torch_prune.global_unstructured(
                [(m, "weight") for m in modules.values()], torch_prune.L1Unstructured, amount=goes
            )
        else:
            for name, module in modules.items():
                size = PRUNABLE[name].size
                torch_prune.l1_unstructured(module, "weight", amount=size - count_at(0.25, size))
        for name, module in modules.items():
            np.testing.assert_array_equal(support_of(ours[name]).mask(), module.weight_mask.numpy().astype(bool))


def test_a_tensor_that_loses_nothing_stays_a_dense_array() -> None:
    params = drawn(1)
    params["rnn.weight_hh_l0"] = 1e3 * np.sign(values_of(params["rnn.weight_hh_l0"]))
    for options in ({"scope": "global"}, {"conventions": Conventions(pool="layer")}):
        method = OneShot(Allocation(0.6), at_step=1, **options)
        method.supports(SPECS, seed=0)
        gone = method.exchange(params, step=1, seed=0).keys()
        assert gone == PRUNABLE.keys() - {"rnn.weight_hh_l0"}


def test_global_scope_leaves_fixed_tensors_out() -> None:
    fixed = {"encoder.weight": 1.0, "fc.weight": 0.3}
    method = OneShot(Allocation(0.5, fixed=fixed), at_step=1, scope="global")
    method.supports(SPECS, seed=0)
    params = drawn(1)
    pruned = applied(params, method.exchange(params, step=1, seed=0))
    assert pruned["encoder.weight"] is params["encoder.weight"]
    assert support_of(pruned["fc.weight"]).nnz == 12
    rest = {place: v for place, v in stored(params).items() if place[0] not in fixed}
    kept = {place for place in stored(pruned) if place[0] not in fixed}
    assert kept == best(rest, round(0.5 * len(rest)))


def test_a_pattern_keeps_n_of_each_m() -> None:
    shapes, gates = {"a": (6, 8), "b": (3, 4, 1, 2)}, {"i": slice(0, 3), "f": slice(3, 6)}
    specs = {
        name: ParamSpec(name, shape, "linear", True, gates if name == "a" else {}) for name, shape in shapes.items()
    }
    rng = np.random.default_rng(0)
    params: Params = {name: rng.integers(-3, 4, shape).astype(float) for name, shape in shapes.items()}
    method = OneShot(Allocation(0.25), at_step=4, pattern=(1, 4), conventions=Conventions(pool="gate"))
    method.supports(specs, seed=0)
    pruned = applied(params, method.exchange(params, step=4, seed=0))
    a = support_of(pruned["a"]).mask()
    for row, group in np.ndindex(6, 2):
        part = slice(4 * group, 4 * group + 4)
        expected = np.zeros(4, bool)
        expected[np.argmax(np.abs(values_of(params["a"])[row, part]))] = True  # argmax names the first of equal ones
        np.testing.assert_array_equal(a[row, part], expected)
    b = support_of(pruned["b"]).mask()
    assert (b.sum(axis=1) == 1).all()  # over the input channels of each position
    assert method.exchange(pruned, step=4, seed=0) == {}


def test_when_the_pruning_is() -> None:
    method = OneShot(Allocation(0.5), at_step=9)
    assert [t for t in range(20) if method.exchange_due(step=t, epoch_end=False)] == [9]
    assert not method.exchange_due(step=9, epoch_end=True)
    assert [method.settled(t) for t in (8, 9, 10)] == [False, True, True]


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


# --- lottery tickets


class Recorder:
    """Notes what a run of lottery tickets does: parameters before and after each end of an epoch, and rates asked."""

    def __init__(self, method: IMP, **options: Any) -> None:
        self.rates: list[tuple[int, int]] = []
        self.before: dict[int, Params] = {}
        self.after: dict[int, Params] = {}

        def lr(step: int, epoch: int) -> float:
            self.rates.append((step, epoch))
            return 0.05 * 0.98**step

        self.trainer = trainer_of(method, lr=lr, **options)
        self.after[0] = pictures(self.trainer.state.params)

    def __call__(self, trainer: Trainer) -> None:
        state = trainer.state
        (self.before if state.window == trainer.steps_per_epoch else self.after)[state.step] = pictures(state.params)


def pictures(params: Params) -> Params:
    """Return copies."""
    return {n: SparseWeight(w.support, w.values.copy()) if isinstance(w, SparseWeight) else w.copy()
            for n, w in params.items()}  # fmt: skip


def check_imp(make: Callable[..., Any], scope: str = "global", rewind: int = 6) -> None:
    """Watch three rounds of 12 steps, two epochs each; the weights to come back to are those of step ``rewind``."""
    method = make(Allocation(0.25), rounds=3, round_steps=12, rewind_step=rewind, scope=scope)
    seen = Recorder(method)
    train(seen.trainer, 12 + 2 * (12 - rewind), seen)
    origin = seen.after[rewind]
    steps = [12, 12 + 12 - rewind]
    for r, at in enumerate(steps, 1):
        trained, now = seen.before[at], seen.after[at]
        share = 0.25 ** (r / 2)  # 0.5 and 0.25, exactly
        values = stored(trained)
        parts = [values] if scope == "global" else of_pool(values, "matrix")
        sizes = [TOTAL] if scope == "global" else [spec.size for spec in PRUNABLE.values()]
        expected = set().union(*(best(part, round(share * n)) for part, n in zip(parts, sizes)))
        assert stored(now).keys() == expected, "the largest of the trained weights were not what stayed"
        for name in SPECS:
            was = values_of(origin[name]).reshape(-1)
            same = values_of(now[name]).reshape(-1)
            assert np.array_equal(same, was[support_of(now[name]).flat]), f"{name} is not what it was at step {rewind}"
    again = [(t, t // 6) for t in range(rewind, 12)]
    assert seen.rates == [(t, t // 6) for t in range(12)] + 2 * again, "the learning rate did not go back"
    settled = [t for t in range(1, 30) if method.settled(t)]
    assert method.horizon(99) == 12, "the schedule of the learning rate is not that of a round"
    assert settled[0] == steps[-1] + 1, "the method says another step from which it has its density"


@pytest.mark.parametrize(("scope", "rewind"), [("global", 6), ("local", 6), ("global", 0)])
def test_imp_rewinds_to_the_bit(scope: str, rewind: int) -> None:
    check_imp(IMP, scope, rewind)


class RanksRewound(IMP):
    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Any]:
        return super().exchange(params if step == self.rewind_step else self.remembered, step=step, seed=seed)


class PrunesOneMore(IMP):
    def kept(self, *arguments: Any) -> dict[str, int]:
        return {label: count - 1 for label, count in super().kept(*arguments).items()}


class NeverGoesBack(IMP):
    def rewind(self, params: Params, *, step: int) -> Any:
        super().rewind(params, step=step)


class ForgetsBiases(IMP):
    def rewind(self, params: Params, *, step: int) -> Any:
        back = super().rewind(params, step=step)
        return back and back._replace(params=back.params | {"fc.bias": values_of(params["fc.bias"])})


class RemembersNoCopies(IMP):
    """The arrays that the optimizer goes on to move are what is remembered."""

    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> dict[str, Any]:
        out = super().exchange(params, step=step, seed=seed)
        if step == self.rewind_step:
            self.remembered = dict(params)
        return out


class HandsOutWhatItRemembers(IMP):
    def rewind(self, params: Params, *, step: int) -> Any:
        back = super().rewind(params, step=step)
        return back and back._replace(params=self.remembered)


class SameSharePerRound(IMP):
    """Prunes by the share of the rounds, not by its power."""

    def kept(self, at: Any = None) -> dict[str, int]:
        return super().kept(lambda d: 1 - (1 - d) * np.log(at(d)) / np.log(d)) if at else super().kept()


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (RanksRewound, "the largest of the trained"),
        (PrunesOneMore, "the largest of the trained"),
        (SameSharePerRound, "the largest of the trained"),
        (NeverGoesBack, "is not what it was"),
        (ForgetsBiases, "fc.bias is not what it was"),
        (RemembersNoCopies, "is not what it was"),
        (HandsOutWhatItRemembers, "is not what it was"),
    ],
)
def test_wrong_tickets_are_caught(planted: type[IMP], match: str) -> None:
    caught(check_imp, planted, match=match)


class Ticket(BaseMethod):
    """Trains given weights on given supports."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params

    def start(self, params: Params, specs: Any, probe: Any = None, *, seed: int) -> Params:
        return pictures(self.params)


@pytest.mark.parametrize("optimizer", [SGD(0.9), Adam()])
def test_a_ticket_trains_alone_as_in_the_last_round(optimizer: Any) -> None:
    seen = Recorder(IMP(Allocation(0.2), rounds=3, round_steps=12), optimizer=optimizer)
    train(seen.trainer, 36, seen)
    alone = trainer_of(Ticket(seen.after[24]), lr=lambda step, epoch: 0.05 * 0.98**step, optimizer=optimizer)
    train(alone, 12)
    for name, weight in alone.state.params.items():
        other = seen.trainer.state.params[name]
        assert support_of(other) == support_of(weight)
        np.testing.assert_array_equal(values_of(other), values_of(weight))


def test_what_is_remembered_shrinks() -> None:
    method = IMP(Allocation(0.1), rounds=3, round_steps=6)
    trainer = trainer_of(method)
    sizes = []
    train(trainer, 18, lambda t: sizes.append(sum(values_of(w).size for w in method.remembered.values())))
    dense = sum(spec.size for spec in SPECS.values())
    assert sizes[0] == dense
    assert sizes[-1] == count_at(0.1, TOTAL) + dense - TOTAL


def test_nothing_to_prune_is_no_reason_to_go_back() -> None:
    method = IMP(Allocation(1.0), rounds=3, round_steps=6)
    trainer = trainer_of(method)
    train(trainer, 18)
    assert trainer.state.origin_step == 0
    assert not method.remembered
    assert method.settled(1)
    assert method.horizon(18) == 18


@pytest.mark.parametrize(
    ("round_steps", "rewind", "missed"),
    [(8, 0, "8, where weights are to be pruned"), (12, 3, "3, where weights are to be remembered")],
)
def test_rounds_that_end_within_an_epoch_are_refused(round_steps: int, rewind: int, missed: str) -> None:
    trainer = trainer_of(IMP(Allocation(0.5), rounds=2, round_steps=round_steps, rewind_step=rewind))
    with pytest.raises(ValueError, match=f"step {missed}.*whole epochs"):
        train(trainer, 18)


# --- all


def _local(specs: Any, density: float) -> int:
    return sum(count_at(density, spec.size) for spec in specs.values() if spec.prunable)


def _together(specs: Any, density: float) -> int:
    return count_at(density, sum(spec.size for spec in specs.values() if spec.prunable))


RUNS: dict[str, tuple[Callable[[Allocation], Any], Any]] = {
    "one-shot": (lambda a: OneShot(a, at_step=8), _local),
    "one-shot, global": (lambda a: OneShot(a, at_step=6, scope="global"), _together),
    "gmp": (lambda a: GMP(a, begin_step=3, end_step=17, interval=4), _local),
    "gmp, global": (lambda a: GMP(a, begin_step=0, end_step=12, interval=3, scope="global"), _together),
    "imp": (lambda a: IMP(a, rounds=3, round_steps=6), _together),
    "imp, rewinding": (lambda a: IMP(a, rounds=2, round_steps=12, rewind_step=6, scope="local"), _local),
}


@pytest.mark.parametrize("run", RUNS)
def test_whole_runs(run: str) -> None:
    make, counts = RUNS[run]
    check_run(lambda density, steps, epoch: make(Allocation(density)), "pruning", counts=counts)


def test_a_gradual_run_from_an_initial_sparsity() -> None:
    def make(density: float, steps: int, epoch: int) -> GMP:
        return GMP(Allocation(density), begin_step=0, end_step=14, interval=4, initial_sparsity=0.3)

    check_run(make, "pruning", counts=_local, dense_at_one=False)


def test_a_pattern_in_a_run() -> None:
    def make(density: float, steps: int, epoch: int) -> OneShot:
        return OneShot(Allocation(density, fixed={"conv.weight": 1.0}), at_step=7, pattern=(2, 4))

    counts = lambda specs, density: _local(specs, 0.5) + SPECS["conv.weight"].size // 2  # noqa: E731
    check_run(make, "pruning", counts=counts, density=0.5, dense_at_one=False)


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
ALL: Any = "all"


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: OneShot(HALF, at_step=0), "after step 0; give a step of at least 1"),
        (lambda: OneShot(HALF, at_step=1, scope=ALL), "'all'; give 'local'"),
        (lambda: OneShot(Allocation(0.5, "erk"), at_step=1, scope="global"), "'erk'.*give the rule 'uniform'"),
        (lambda: OneShot(HALF, at_step=1, pattern=(3, 2)), "3:2; give"),
        (lambda: OneShot(HALF, at_step=1, pattern=(2, 4), scope="global"), "2:4.*give it with"),
        (lambda: GMP(HALF, begin_step=5, end_step=4, interval=1), "from step 5 to step 4; give"),
        (lambda: GMP(HALF, begin_step=0, end_step=0, interval=1), "give"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=0), "0 steps; give at least 1"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=1, initial_sparsity=0.6), "0.6 is above the final"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=1, initial_sparsity=-1), "sparsity is -1"),
        (lambda: GMP(HALF, begin_step=0, end_step=4, interval=1, monotone=False), "DPF"),
        (lambda: IMP(HALF, rounds=1, round_steps=5), "1 rounds; give at least 2"),
        (lambda: IMP(HALF, rounds=2, round_steps=5, rewind_step=5), "from step 5 to step 5; give"),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (OneShot(Allocation(0.001), at_step=1), "encoder.weight of 48 entries would keep none"),
        (GMP(Allocation(0.01), begin_step=1, end_step=2, interval=1, scope="global"), "keep 2 entries in 5 tensors"),
        (OneShot(Allocation(0.3), at_step=1, pattern=(2, 4)), "keeps 0.5 of a tensor.*density 0.3"),
        (OneShot(Allocation(0.4), at_step=1, pattern=(2, 5)), "groups of 5"),
    ],
)
def test_what_cannot_work_is_refused_before_training(method: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        method.supports(SPECS, seed=0)


def test_a_tensor_that_would_be_emptied_and_weights_that_are_nan_are_refused() -> None:
    method = OneShot(HALF, at_step=1, scope="global")
    method.supports(SPECS, seed=0)
    params = drawn(0)
    params["rnn.weight_hh_l0"] = values_of(params["rnn.weight_hh_l0"]) * 1e-6
    with pytest.raises(ValueError, match=r"all entries of rnn\.weight_hh_l0"):
        method.exchange(params, step=1, seed=0)
    params["rnn.weight_hh_l0"] = np.full((16, 4), np.nan)
    with pytest.raises(ValueError, match="NaN"):
        method.exchange(params, step=1, seed=0)


def test_a_pool_that_stores_less_is_left_alone() -> None:
    weight = SparseWeight(Support((4, 4), [1, 5, 9]), np.ones(3))
    method = OneShot(HALF, at_step=1)
    method.supports({"w": ParamSpec("w", (4, 4), "linear", True)}, seed=0)
    assert prune({"w": weight}, method.pools, {"w": 8}) == {}
    assert drop_smallest(weight.values, 0).size == 0
