"""Every method obeys the laws, and the laws catch planted mistakes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refimpl.methods import (
    DEFAULT,
    SET,
    Allocation,
    Conventions,
    Dense,
    RigL,
    Selfish,
    Static,
    TopKAST,
    profile,
)
from refimpl.methods import dropgrow as dropgrow_module
from refimpl.methods import exchange as exchange_module
from refimpl.methods.drop import by_magnitude, drop_smallest
from refimpl.methods.exchange import at_random, by_gradient
from refimpl.methods.grow import Candidates
from refimpl.methods.onestep import ArrayGradient
from refimpl.methods.pools import pools_of
from refimpl.methods.schedule import Constant, Cosine, EveryEpoch, EverySteps
from refimpl.testing.methods import check_method
from refimpl.weights.parameters import ParamSpec
from refimpl.weights.sparse import SparseWeight

VARIANTS = {
    "default": DEFAULT,
    "selfish-authors": profile("selfish-authors"),
    "gate": Conventions(pool="gate"),
    "layer": Conventions(pool="layer", drop_rounding="half-even"),
    "forbid": Conventions(regrow="forbid", drop_rounding="ceil"),
    "reset, threshold, initial": Conventions(regrow="reset", drop_ties="threshold", growth_target="initial"),
    "gate, bernoulli": Conventions(pool="gate", growth_count="bernoulli", initial_count="bernoulli"),
}


def selfish(conventions):
    return lambda density, fraction: Selfish(Allocation(density), Constant(fraction), conventions=conventions)


@pytest.mark.parametrize("conventions", VARIANTS.values(), ids=VARIANTS)
def test_selfish(conventions):
    check_method(selfish(conventions))


@pytest.mark.parametrize("conventions", [DEFAULT, Conventions(pool="gate"), Conventions(pool="layer")])
@pytest.mark.parametrize("rule", ["uniform", "erk"])
def test_rigl(conventions, rule):
    check_method(
        lambda density, fraction: RigL(
            Allocation(density, rule), Constant(fraction), interval=5, conventions=conventions
        ),
        growth="gradient",
    )


@pytest.mark.parametrize("criterion", ["sign", "magnitude"])
def test_set(criterion):
    check_method(
        lambda density, fraction: SET(Allocation(density, "er"), fraction, criterion=criterion),
        criterion=criterion,
    )


def test_methods_that_move_nothing():
    check_method(lambda density, fraction: Dense(), growth=None)
    check_method(lambda density, fraction: Static(Allocation(density, "er")), growth=None)
    check_method(lambda density, fraction: TopKAST(Allocation(density), exploration=fraction, penalty=0.1), growth=None)


# --- planted mistakes ----------------------------------------


def largest(values, fraction, conventions):
    return drop_smallest(-np.abs(values), int(fraction * values.size))


def rounded_up(values, fraction, conventions):
    return by_magnitude(values, fraction, replace(conventions, drop_rounding="ceil"))


def ties_the_other_way(values, fraction, conventions):
    return by_magnitude(values[::-1], fraction, conventions)[::-1]


def signed_not_absolute(values, fraction, conventions):
    return drop_smallest(values, int(fraction * values.size))


class Mutant(Selfish):
    """Selfish with another criterion or growth."""

    drop = staticmethod(by_magnitude)

    def grower(self, step, seed):
        return at_random(seed, step, self.conventions)

    def exchange(self, params, *, step, seed, gradients=None):
        return self.propose(params, step, drop=self.drop, grow=self.grower(step, seed))


def mutant(**overrides):
    kind = type("Planted", (Mutant,), overrides)
    return lambda density, fraction: kind(Allocation(density), Constant(fraction))


def caught(make, **options):
    with pytest.raises((AssertionError, ValueError, BaseExceptionGroup), match=r".") as report:
        check_method(make, shrink=False, **options)
    found = report.value
    kinds = found.exceptions if isinstance(found, BaseExceptionGroup) else [found]
    assert all(isinstance(kind, AssertionError | ValueError) for kind in kinds)
    return str(kinds)


def test_the_unmutated_mutant_passes():
    check_method(mutant())


@pytest.mark.parametrize("wrong", [largest, rounded_up, ties_the_other_way, signed_not_absolute])
def test_a_wrong_criterion_is_caught(wrong):
    assert "criterion" in caught(mutant(drop=staticmethod(wrong)))


def test_permutation_alone_catches_a_criterion_that_looks_at_places():
    def last_ones(values, fraction, conventions):
        return np.arange(values.size - int(fraction * values.size), values.size)

    assert "permut" in caught(mutant(drop=staticmethod(last_ones)), criterion=None, max_examples=200)


def wrap_candidates(change):
    def grower(self, step, seed):
        usual = at_random(seed, step, self.conventions)
        return lambda growths: usual([change(g) for g in growths])

    return grower


def test_growth_on_stored_entries_is_caught():
    everything = wrap_candidates(lambda g: replace(g, candidates=Candidates(g.pool.size, np.empty(0, np.int64))))
    assert "the exchange failed" in caught(mutant(grower=everything))  # Exchange.of refuses it


def test_growing_one_too_few_is_caught():
    assert "another number" in caught(mutant(grower=wrap_candidates(lambda g: replace(g, want=max(0, g.want - 1)))))


def test_forgetting_that_dropped_entries_are_eligible_is_caught(monkeypatch):
    # The mutant excludes them and then fills up as far as it can, as masks that are edited too early do.
    def forgetful(params, pools, **options):
        options["conventions"] = replace(options["conventions"], regrow="forbid")
        usual = options["grow"]
        options["grow"] = lambda growths: usual([replace(g, want=min(g.want, g.candidates.count)) for g in growths])
        return exchange_module.propose(params, pools, **options)

    monkeypatch.setattr(dropgrow_module, "propose", forgetful)
    caught(mutant())


def test_letting_dropped_entries_regrow_against_the_conventions_is_caught(monkeypatch):
    def careless(params, pools, **options):
        options["conventions"] = replace(options["conventions"], regrow="keep")
        return exchange_module.propose(params, pools, **options)

    monkeypatch.setattr(dropgrow_module, "propose", careless)
    assert "forbid" in caught(selfish(Conventions(regrow="forbid")))


@pytest.mark.parametrize(("promised", "done"), [("gate", "matrix"), ("matrix", "gate"), ("matrix", "layer")])
def test_another_pool_than_promised_is_caught(monkeypatch, promised, done):
    monkeypatch.setattr(dropgrow_module, "pools_of", lambda specs, names, scope: pools_of(specs, names, done))
    message = caught(selfish(Conventions(pool=promised)))
    assert "criterion" in message or "another number" in message


def test_growth_from_a_fixed_seed_is_caught():
    fixed = mutant(grower=lambda self, step, seed: at_random(7, 7, self.conventions))

    def make(density, fraction):
        method = fixed(density, fraction)
        method.conventions = Conventions(growth_target="initial")
        return method

    assert "seed" in caught(make, max_examples=200)


def test_an_exchange_that_writes_is_caught():
    class Writes(Selfish):
        def exchange(self, params, *, step, seed, gradients=None):
            out = super().exchange(params, step=step, seed=seed)
            for name, e in out.items():
                params[name].values[e.old.positions_of(e.dropped)] = 0
            return out

    assert "changed" in caught(lambda density, fraction: Writes(Allocation(density), Constant(fraction)))


def test_forgotten_state_is_caught():
    class Forgets(Selfish):
        def load_state_dict(self, state, arrays=None):
            super().load_state_dict({**state, "initial_nnz": {k: n - 1 for k, n in state["initial_nnz"].items()}})

    conventions = Conventions(growth_target="initial")
    make = lambda density, fraction: Forgets(Allocation(density), Constant(fraction), conventions=conventions)  # noqa: E731
    assert "resuming" in caught(make)


def test_gradient_growth_that_ignores_dropped_or_prefers_later_places_is_caught():
    class Later(RigL):
        def exchange(self, params, *, step, seed, gradients=None):
            scaled = {}
            for name, gradient in gradients.items():
                array = gradient.array * (1 + 1e-9 * np.arange(gradient.array.size).reshape(gradient.shape))
                scaled[name] = type(gradient)(array, 3)
            return self.propose(params, step, drop=by_magnitude, grow=by_gradient(scaled))

    assert "largest gradient" in caught(
        lambda density, fraction: Later(Allocation(density), Constant(fraction)), growth="gradient"
    )


# --- schedules and states ----------------------------------------


def test_when_exchanges_are_due():
    specs = {"w": ParamSpec("w", (8, 10), "linear", True)}

    def begun(method):
        assert not method.exchange_due(step=10, epoch_end=True)  # nothing is sparse yet
        method.supports(specs, seed=0)
        return method

    method = begun(Selfish(Allocation(0.5), 0.7, total_steps=100))
    assert not method.exchange_due(step=10, epoch_end=False)
    assert method.exchange_due(step=10, epoch_end=True)
    assert not method.exchange_due(step=10, epoch_end=True, asgd_triggered=True)
    method = begun(Selfish(Allocation(0.5), 0.7, total_steps=100, conventions=Conventions(trigger_epoch="exchange")))
    assert method.exchange_due(step=10, epoch_end=True, asgd_triggered=True)

    rigl = begun(RigL(Allocation(0.5), 0.3, interval=10, end_step=40))
    assert [t for t in range(60) if rigl.exchange_due(step=t, epoch_end=False)] == [10, 20, 30]
    assert not any(rigl.exchange_due(step=t, epoch_end=True) for t in range(60))
    assert rigl.needs_gradient(20)
    assert rigl.replaces_step(20)
    assert not rigl.replaces_step(21)
    after = begun(RigL(Allocation(0.5), interval=10, end_step=40, conventions=Conventions(exchange_step="after")))
    assert after.needs_gradient(20)
    assert not after.replaces_step(20)
    assert not method.needs_gradient(10)


def test_cosine_of_the_selfish_runs():
    # The authors' recursive schedule at the ends of epochs: d0 = 0.8, 1,328 steps an epoch, T = 132,797.
    fraction = Selfish(Allocation(0.33), 0.8, total_steps=132_797).drop_fraction
    for epoch, value in {1: 0.79980, 2: 0.79922, 10: 0.78054, 25: 0.68357, 50: 0.40249, 75: 0.12141,
                         90: 0.02445, 99: 0.00520, 100: 0.00500}.items():  # fmt: skip
        assert abs(fraction(1328 * epoch) - value) < 6e-6
    assert fraction(10**9) == 0.005


def test_cosine_of_rigl():
    fraction = Cosine(0.3, 75_000)
    for t in (0, 100, 50_000, 75_000):
        assert abs(fraction(t) - 0.15 * (1 + np.cos(np.pi * t / 75_000))) < 1e-15
    assert fraction(100_000) == 0


@pytest.mark.parametrize(
    "bad",
    [
        lambda: EverySteps(0),
        lambda: Constant(1.5),
        lambda: Constant(float("nan")),
        lambda: Cosine(0.5, 0),
        lambda: Cosine(-0.1, 10),
        lambda: Selfish(Allocation(0.5), 0.7),
        lambda: RigL(Allocation(0.5)),
        lambda: SET(Allocation(0.5), criterion="threshold"),
        lambda: TopKAST(Allocation(0.5), exploration=2),
        lambda: TopKAST(Allocation(0.5), penalty=-1),
        lambda: TopKAST(Allocation(0.5), refresh=0),
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=r"give"):
        bad()


def test_missing_gradients_and_dense_weights_are_said():
    specs = {"w": ParamSpec("w", (6, 5), "linear", True)}
    rigl = RigL(Allocation(0.5), Constant(0.5))
    support = rigl.supports(specs, seed=0)["w"]
    weight = SparseWeight(support, np.ones(support.nnz))
    with pytest.raises(ValueError, match="needs the gradient of w"):
        rigl.exchange({"w": weight}, step=100, seed=0)
    with pytest.raises(ValueError, match="no sparse weight"):
        rigl.exchange({"w": weight.dense()}, step=100, seed=0)
    weight.values[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        rigl.exchange({"w": weight}, step=100, seed=0, gradients={})


def test_growth_draws_anew_for_each_tensor_step_and_seed():
    specs = {name: ParamSpec(name, (40, 30), "linear", True) for name in "ab"}
    method = Selfish(Allocation(0.3), Constant(0.5))
    support = method.supports(specs, seed=0)["a"]
    weight = SparseWeight(support, np.linspace(-1, 1, support.nnz))

    def grown(name, step, seed):
        return method.exchange({"a": weight, "b": weight}, step=step, seed=seed)[name].grown.tobytes()

    assert len({grown("a", 1, 0), grown("b", 1, 0), grown("a", 2, 0), grown("a", 1, 1)}) == 4


def test_initial_target_uses_the_counts_of_a_saved_state():
    specs = {"w": ParamSpec("w", (40, 30), "linear", True)}
    method = Selfish(Allocation(0.3), Constant(0.5), conventions=profile("selfish-authors"), when=EveryEpoch())
    support = method.supports(specs, seed=3)["w"]
    state = json.loads(json.dumps(method.state_dict()))
    assert state["initial_nnz"] == {"w": support.nnz}
    state["initial_nnz"]["w"] = 10**3
    method.load_state_dict(state)
    grown = [
        method.exchange({"w": SparseWeight(support, np.linspace(-1, 1, support.nnz))}, step=1, seed=s)["w"].new.nnz
        for s in range(30)
    ]
    assert abs(np.mean(grown) - 1000) < 4 * np.sqrt(1000 * 0.25 / 30)


# --- Top-KAST ----------------------------------------


def test_topkast_sets_penalty_and_frozen_sets():
    rng = np.random.default_rng(0)
    specs = {"w": ParamSpec("w", (8, 10), "linear", True), "b": ParamSpec("b", (8,), "bias")}
    method = TopKAST(Allocation(0.2), exploration=0.3, refresh=5, penalty=0.5)
    assert method.supports(specs, seed=0) == {}
    w = rng.standard_normal((8, 10))
    params = {"w": w, "b": rng.standard_normal(8)}
    order = np.argsort(-np.abs(w).reshape(-1), kind="stable")
    seen = method.view(params)
    assert seen["b"] is params["b"]
    np.testing.assert_array_equal(seen["w"].support.flat, np.sort(order[:16]))
    backward = method.gradient_support("w", params)
    np.testing.assert_array_equal(backward.flat, np.sort(order[:40]))
    assert method.gradient_support("b", params) is None

    expected = np.zeros(80)
    expected[order[:16]] = 0.5 * w.reshape(-1)[order[:16]]
    expected[order[16:40]] = 0.5 / 0.2 * w.reshape(-1)[order[16:40]]
    zeros = {"w": ArrayGradient(np.zeros((8, 10))), "b": np.zeros(8)}
    np.testing.assert_allclose(method.pull(params, zeros)["w"], expected[backward.flat], rtol=1e-15)

    w *= rng.standard_normal(w.shape)  # A and B stay while the weights move, and the view follows the values
    np.testing.assert_array_equal(method.view(params)["w"].support.flat, np.sort(order[:16]))
    np.testing.assert_array_equal(method.view(params)["w"].values, w.reshape(-1)[np.sort(order[:16])])
    assert method.exchange_due(step=5, epoch_end=False)
    assert method.exchange(params, step=5, seed=0) == {}
    order = np.argsort(-np.abs(w).reshape(-1), kind="stable")
    np.testing.assert_array_equal(method.view(params)["w"].support.flat, np.sort(order[:16]))


def test_topkast_refuses_a_state_without_its_sets():
    specs = {"w": ParamSpec("w", (8, 10), "linear", True)}
    method = TopKAST(Allocation(0.2))
    method.supports(specs, seed=0)
    method.view({"w": np.ones((8, 10))})
    with pytest.raises(ValueError, match="lacks the sets of w"):
        TopKAST(Allocation(0.2)).load_state_dict(method.state_dict())
