"""AC/DC: what is kept, by either count; what is carried and forgotten; whole runs, operations, configuration."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from acdc_cases import EPOCHS, STEPS, TURNS
from hypothesis import given
from hypothesis import strategies as st
from quadratic_cases import PRUNABLE, SPECS, TOTAL, applied, best, drawn, quick, stored

from refimpl.methods.acdc import ACDC, under_threshold
from refimpl.methods.allocation import Allocation, count_at, density_from_sparsity
from refimpl.methods.conventions import DEFAULT, Conventions
from refimpl.methods.dense import Dense
from refimpl.methods.phases import Phases
from refimpl.methods.powerprop import Powerpropagation
from refimpl.optim import SGD, SNTASGD, Adam
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.training import flops, published
from refimpl.training.build_method import Plan, build_method
from refimpl.training.config import load_recipe
from refimpl.training.method_section import Method
from refimpl.training.simulate import Workload, planned
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, ParamSpec, SparseWeight, as_sparse, support_of, values_of

# --- counts


def strictly_above(values: np.ndarray, p: float) -> np.ndarray:
    """Say in other words what the authors' program keeps: k entries, less all that tie with the smallest of them."""
    score = np.abs(values) + values.dtype.type(1e-4)
    k = int(np.ceil(values.size * (1 - p)))
    return score > sorted(score.tolist())[-k]


@pytest.mark.parametrize(
    ("p", "kept"), [(0.9, 99), (0.8, 199), (0.75, 249), (0.5, 499), (0.95, 50), (0.98, 20)]
)  # fmt: skip
def test_counts_of_the_authors_program(p: float, kept: int) -> None:
    """Of 1000: 1 − 0.95 and 1 − 0.98 are a little more in floats, and k one more."""
    specs = {"w": ParamSpec("w", (10, 100), "linear", True)}
    params: Params = {"w": np.random.default_rng(1).standard_normal((10, 100))}
    for count, expected in (("strict-threshold", kept), ("exact", round(1000 * (1 - p)))):
        method = ACDC(Allocation(density_from_sparsity(p)), TURNS, epoch_steps=STEPS, count=count)  # type: ignore[arg-type]
        method.supports(specs, seed=0)
        assert method.exchange(params, step=STEPS, seed=0)["w"].new.nnz == expected
        assert method.kept() == {"global": expected}


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.8, 5_100_582), (0.9, 2_550_291), (0.95, 1_275_145), (0.98, 510_058)]
)  # fmt: skip
def test_counts_of_resnet50(sparsity: float, kept: int) -> None:
    """25,502,912 prunable weights under one threshold."""
    specs = {"a": ParamSpec("a", (25_000_000,), "linear", True), "b": ParamSpec("b", (502_912,), "linear", True)}
    method = ACDC(
        Allocation(density_from_sparsity(sparsity)), TURNS, epoch_steps=STEPS, count="strict-threshold"
    )  # fmt: skip
    method.supports(specs, seed=0)
    assert method.kept() == {"global": kept}


def check_threshold(seed: int, p: float, tied: bool, rule: Callable[[np.ndarray, int], np.ndarray]) -> None:
    rng = np.random.default_rng(seed)
    for dtype in (np.float32, np.float64):
        values = (rng.integers(-4, 5, 40) if tied else rng.standard_normal(40)).astype(dtype)
        k = int(np.ceil(40 * (1 - p)))
        assert np.array_equal(~rule(values, k), strictly_above(values, p))


@quick
@given(st.integers(0, 2**32), st.floats(0, 0.97), st.booleans())
def test_strict_threshold(seed: int, p: float, tied: bool) -> None:
    check_threshold(seed, p, tied, under_threshold)


def test_strict_threshold_at_extremes() -> None:
    assert under_threshold(np.ones(6), 3).all()  # of equal weights none is kept
    assert under_threshold(np.array([1e-9, 1.0, 2.0], np.float32), 3).tolist() == [True, False, False]
    close = np.array([1.0, 1.0 + 1e-7, 3.0], np.float32)  # the sum with 1e-4 rounds the two to one number
    assert close[0] != close[1]
    assert under_threshold(close, 2).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="NaN"):
        under_threshold(np.array([1.0, np.nan]), 1)


def check_kept(make: Callable[..., Any], seed: int, density: float, scope: str, tied: bool) -> None:
    """Compare what a compression keeps with a sort."""
    method = make(Allocation(density), TURNS, epoch_steps=STEPS, scope=scope)
    method.supports(SPECS, seed=0)
    params = drawn(seed, tied)
    values = stored(params)
    kept = stored(applied(params, method.exchange(params, step=STEPS, seed=0)))
    parts = [values] if scope == "global" else [{p: v for p, v in values.items() if p[0] == n} for n in PRUNABLE]
    expected = set().union(*(best(part, count_at(density, len(part))) for part in parts))
    assert kept.keys() == expected, "other weights were kept than the largest"
    assert all(kept[place] == values[place] for place in kept), "a weight that stayed has another value"


@quick
@given(st.integers(0, 2**32), st.floats(0.3, 0.99), st.sampled_from(["local", "global"]), st.booleans())
def test_compression_keeps_the_largest(seed: int, density: float, scope: str, tied: bool) -> None:
    check_kept(ACDC, seed, density, scope, tied)


def test_a_pattern() -> None:
    """Two of each four inputs of a row, every time; a convolution's groups run over its input channels."""
    fixed = {"conv.weight": 1.0}
    method = ACDC(Allocation(0.5, fixed=fixed), TURNS, epoch_steps=STEPS, scope="local", pattern=(2, 4))
    trainer = trainer_of(method, steps_per_epoch=STEPS)
    seen = set()

    def after(trainer: Trainer) -> None:
        if method.is_compressed:
            for name in set(PRUNABLE) - {"conv.weight"}:
                weight = trainer.state.params[name]
                assert isinstance(weight, SparseWeight)
                assert (weight.support.mask().reshape(-1, 4).sum(axis=1) == 2).all()
                seen.add(weight.support)

    train(trainer, EPOCHS * STEPS, after)
    assert len(seen) > len(PRUNABLE)  # it moved from phase to phase
    assert isinstance(trainer.state.params["conv.weight"], np.ndarray)


def test_the_optimizer_begins_anew() -> None:
    """Of all parameters, at decompression alone, its count of steps too; what stays at compression keeps its state."""
    for optimizer in (SGD(0.9), Adam()):
        method = ACDC(Allocation(0.3), TURNS, epoch_steps=STEPS)
        trainer = trainer_of(method, optimizer=optimizer, steps_per_epoch=STEPS)
        train(trainer, STEPS - 1)
        window = np.array([STEPS - 1])
        trainer.step(window, window)
        before = {name: {k: a.copy() for k, a in slots.items()} for name, slots in trainer.state.slots.items()}
        trainer.end_epoch(triggered=False)
        assert trainer.state.updates == STEPS
        for name, weight in trainer.state.params.items():
            for slot, array in trainer.state.slots[name].items():
                kept = before[name][slot].reshape(-1)[support_of(weight).flat]
                assert np.array_equal(array.reshape(-1), kept)
        train(trainer, STEPS)
        assert trainer.state.updates == 0
        for name, slots in trainer.state.slots.items():
            for array in slots.values():
                assert array.shape == SPECS[name].shape
                assert not array.any()


def test_what_returns_is_zero_and_the_rest_goes_on() -> None:
    method = ACDC(Allocation(0.3), TURNS, epoch_steps=STEPS, reset_momentum=False)
    trainer = trainer_of(method, steps_per_epoch=STEPS)
    train(trainer, 2 * STEPS - 1)
    window = np.array([STEPS - 1])
    trainer.step(window, window)
    params, slots = trainer.state.params, {n: s["momentum_buffer"] for n, s in trainer.state.slots.items()}
    before = {name: as_sparse(weight) for name, weight in params.items()}
    pictures = {name: weight.dense() for name, weight in before.items()}
    momenta = {name: SparseWeight(weight.support, slots[name].reshape(-1)).dense() for name, weight in before.items()}
    assert sum(before[name].nnz for name in PRUNABLE) == count_at(0.3, TOTAL)
    exchanges = trainer.end_epoch(triggered=False)
    assert exchanges.keys() == PRUNABLE.keys()
    for name, weight in trainer.state.params.items():
        assert isinstance(weight, np.ndarray)
        assert np.array_equal(weight, pictures[name])
        assert np.array_equal(trainer.state.slots[name]["momentum_buffer"], momenta[name])


# --- whole runs


def together(specs: Any, density: float) -> int:
    return count_at(density, TOTAL)


def alone(specs: Any, density: float) -> int:
    return sum(count_at(density, spec.size) for spec in PRUNABLE.values())


def strict(specs: Any, density: float) -> int:
    return int(np.ceil(TOTAL * density)) - 1


RUNS: dict[str, tuple[dict[str, Any], Any]] = {
    "global": ({}, together),
    "local": ({"scope": "local"}, alone),
    "strict": ({"count": "strict-threshold"}, strict),
    "gates": ({"scope": "local", "conventions": Conventions(pool="gate")}, None),
}


@pytest.mark.parametrize("run", RUNS)
def test_whole_runs(run: str) -> None:
    """Resumed in the warm-up, in a compressed and in a dense phase; at density 1 dense training, without the reset."""
    options, counts = RUNS[run]

    def make(density: float, steps: int, epoch: int) -> ACDC:
        return ACDC(Allocation(density), Phases((1, 3), (2,)), epoch_steps=epoch, reset_momentum=False, **options)

    check_run(make, "free", counts=counts)
    if run == "global":
        check_run(lambda *given: with_reset(make(*given)), "free", counts=counts, dense_at_one=False)


def with_reset(method: ACDC) -> ACDC:
    method.reset_momentum = True
    return method


def test_runs_with_averages_and_reparametrized() -> None:
    def make(density: float, steps: int, epoch: int) -> ACDC:
        return ACDC(Allocation(density), Phases.spread(EPOCHS), epoch_steps=epoch)

    check_run(make, "free", counts=together, dense_at_one=False, optimizers=(SNTASGD(),), epochs=EPOCHS)
    check_run(lambda *given: Powerpropagation(make(*given), 2.0), "free", counts=together, dense_at_one=False)


def test_at_density_one_the_reset_is_all_that_is_left() -> None:
    method = ACDC(Allocation(1.0), TURNS, epoch_steps=STEPS)
    trainer, dense = (trainer_of(m, steps_per_epoch=STEPS) for m in (method, Dense()))
    train(trainer, EPOCHS * STEPS)

    def forget(other: Trainer) -> None:
        if other.state.window == 0 and other.state.step in (2 * STEPS, 5 * STEPS):
            other.state.updates = 0
            other.fresh_slots()

    train(dense, EPOCHS * STEPS, forget)
    for name, weight in dense.state.params.items():
        assert np.array_equal(values_of(weight), values_of(trainer.state.params[name]))
    assert all(method.settled(step) for step in range(EPOCHS * STEPS))


def test_settled_from_the_last_phase_on() -> None:
    method = ACDC(Allocation(0.3), TURNS, epoch_steps=STEPS)
    method.supports(SPECS, seed=0)
    assert [method.settled(step) for step in (1, STEPS + 1, 6 * STEPS, 6 * STEPS + 1)] == [False, False, False, True]
    due = [e for e in range(EPOCHS) if method.exchange_due(step=e * STEPS, epoch_end=True)]
    assert due == [1, 2, 3, 5, 6]
    assert not any(method.exchange_due(step=step, epoch_end=False) for step in range(EPOCHS * STEPS))


def test_an_exchange_gives_the_same_again() -> None:
    method = ACDC(Allocation(0.3), TURNS, epoch_steps=STEPS)
    method.supports(SPECS, seed=0)
    params: Params = drawn(3)
    for step in (STEPS, 2 * STEPS):
        one, other = (method.exchange(params, step=step, seed=0) for _ in range(2))
        assert {name: e.new for name, e in one.items()} == {name: e.new for name, e in other.items()}
        params = applied(params, one)
    assert all(values_of(params[name]).size == spec.size for name, spec in PRUNABLE.items())


# --- operations


@pytest.mark.parametrize("density", [0.5, 0.25])
def test_the_planned_operations_are_the_closed_formula(density: float) -> None:
    """3 f_D in dense and 3 f_S in compressed phases, in turn; density shared uniformly, so that f_S is known."""
    model: Any = QuadraticModel()
    specs = {name: spec for name, spec in SPECS.items() if spec.kind != "bias"}
    phases = [(p.kind, p.length * STEPS) for p in TURNS.until(EPOCHS)]
    method = ACDC(Allocation(density), TURNS, epoch_steps=STEPS, scope="local")
    found = planned(model, method, Workload((1,) * STEPS, EPOCHS * STEPS))
    f_d, f_s = (flops.forward(specs, {n: int(s.size * d) for n, s in specs.items()}) for d in (1, density))
    mean = published.acdc(Fraction(f_d), Fraction(f_s), phases)
    assert flops.total(found.total["published"]) == mean * EPOCHS * STEPS
    trainer = trainer_of(ACDC(Allocation(density), TURNS, epoch_steps=STEPS, scope="local"), steps_per_epoch=STEPS)
    train(trainer, EPOCHS * STEPS)
    assert found.total == trainer.state.flops


@pytest.mark.parametrize("options", [{"count": "strict-threshold"}, {"pattern": (2, 4)}])
def test_planned_counts(options: dict[str, Any]) -> None:
    fixed = {"conv.weight": 1.0} if "pattern" in options else {}
    make = lambda: ACDC(Allocation(0.5, fixed=fixed), TURNS, epoch_steps=STEPS, scope="local", **options)  # noqa: E731
    model: Any = QuadraticModel()
    found = planned(model, make(), Workload((1,) * STEPS, EPOCHS * STEPS), dtype=np.float64)
    trainer = trainer_of(make(), steps_per_epoch=STEPS)
    train(trainer, EPOCHS * STEPS)
    assert found.total == trainer.state.flops
    assert not found.notes


def test_ranked_together_the_plan_says_what_it_does_not_know() -> None:
    model: Any = QuadraticModel()
    found = planned(model, ACDC(Allocation(0.3), TURNS, epoch_steps=STEPS), Workload((1,) * STEPS, EPOCHS * STEPS))
    assert len(found.notes) == 1
    assert sum(found.last.used.values()) == count_at(0.3, TOTAL)


# --- configuration


def built(epochs: int, **options: Any) -> Any:
    return build_method(Plan(Method(name="acdc", sparsity=0.7, **options), DEFAULT, epochs * STEPS, STEPS))


def test_from_a_configuration() -> None:
    method = built(8)
    assert method.phases == Phases.spread(8)
    assert (method.scope, method.reset_momentum, method.count, method.epoch_steps) == ("global", True, "exact", STEPS)
    method = built(
        8, compress=[1, 3, 6], decompress=[2, 5], count="strict-threshold", reset_momentum=False, scope="local"
    )
    assert method.phases == TURNS
    assert (method.scope, method.reset_momentum, method.count) == ("local", False, "strict-threshold")
    assert built(8, compress=[4]).phases == Phases((4,))
    patterned = build_method(Plan(Method(name="acdc", sparsity=0.5, pattern="2:4"), DEFAULT, 48, STEPS))
    assert patterned.scope == "local"  # type: ignore[attr-defined]
    assert load_recipe("mlp-fashion-mnist-acdc").method.compress == (2, 4, 6)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: built(1), "give at least 2 epochs"),
        (lambda: built(3, compress=[1, 3], decompress=[2]), "begins at epoch 3, but the run has 3 epochs"),
        (lambda: built(3, decompress=[2]), r"method.compress is 'auto'; give both"),
        (lambda: ACDC(Allocation(0.5), TURNS, epoch_steps=0), "0 steps; give at least 1"),
        (lambda: ACDC(Allocation(0.5), TURNS, epoch_steps=1, count="most"), "'most'; give"),  # type: ignore[arg-type]
        (lambda: ACDC(Allocation(0.5), TURNS, epoch_steps=1, pattern=(2, 4)), "2:4.*scope 'local'"),
        (lambda: ACDC(Allocation(0.5, "erk"), TURNS, epoch_steps=1), "'erk'"),
        (lambda: ACDC(Allocation(0.001), TURNS, epoch_steps=1).supports(SPECS, seed=0), "lower the sparsity"),
        (
            lambda: ACDC(Allocation(0.02), TURNS, epoch_steps=1, scope="local", count="strict-threshold").supports(
                SPECS, seed=0
            ),
            "to keep 0 entries.*lower the sparsity",
        ),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()


def test_epochs_of_another_length_are_noticed() -> None:
    trainer = trainer_of(ACDC(Allocation(0.3), TURNS, epoch_steps=4), steps_per_epoch=STEPS)
    with pytest.raises(ValueError, match=r"step 5 lies in a compressed phase.*not 4"):
        train(trainer, EPOCHS * STEPS)


def test_a_tensor_of_equal_weights_is_not_emptied_silently() -> None:
    method = ACDC(Allocation(0.5), TURNS, epoch_steps=STEPS, scope="local", count="strict-threshold")
    method.supports(SPECS, seed=0)
    params = {**drawn(0), "fc.weight": np.ones((10, 4))}
    with pytest.raises(ValueError, match=r"fc\.weight would keep no weight"):
        method.exchange(params, step=STEPS, seed=0)


# --- planted mistakes


SEED_WITH_TIES = 0


def test_catches_other_counts() -> None:
    def not_strict(values: np.ndarray, k: int) -> np.ndarray:
        score = np.abs(values) + values.dtype.type(1e-4)
        return score < np.sort(score)[values.size - k]

    def one_tie_stays(values: np.ndarray, k: int) -> np.ndarray:
        goes = np.ones(values.size, bool)
        goes[np.argsort(-np.abs(values), kind="stable")[: k - 1]] = False
        return goes

    check_threshold(SEED_WITH_TIES, 0.6, True, under_threshold)
    for planted in (not_strict, one_tie_stays):
        with pytest.raises(AssertionError):
            check_threshold(SEED_WITH_TIES, 0.6, True, planted)
    with pytest.raises(AssertionError, match="other weights"):
        check_kept(partial(ACDC, count="strict-threshold"), 0, 0.5, "global", False)


def test_catches_a_phase_that_is_forgotten_on_resuming() -> None:
    class Forgets(ACDC):
        def load_state_dict(self, state: Any, arrays: Any = None) -> None:
            super().load_state_dict({**state, "compressed": False})

    def make(density: float, steps: int, epoch: int) -> ACDC:
        return Forgets(Allocation(density), Phases((1, 3), (2,)), epoch_steps=epoch)

    with pytest.raises(ValueError, match="lies in a compressed phase"):
        check_run(make, "free", dense_at_one=False)
