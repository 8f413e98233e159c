"""Whole runs of every method, built as a recipe builds it, obey the laws; and the laws catch planted mistakes."""

import dataclasses

import numpy as np
import pytest

from refimpl.methods import DEFAULT, METHODS, SET, Allocation, RigL, Static, TopKAST, profile
from refimpl.methods.allocation import count_at, densities
from refimpl.methods.schedule import Constant, EverySteps
from refimpl.rng import generator
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import trainer_of
from refimpl.training.build_method import Plan, build_method
from refimpl.training.config import load_recipe


def layerwise(specs, density):
    found = densities(specs, Allocation(density))
    return sum(count_at(d, specs[name].size) for name, d in found.items())


def altogether(specs, density):
    return round(density * sum(spec.size for spec in specs.values() if spec.prunable))


def half(specs, density):
    return sum(spec.size for spec in specs.values() if spec.prunable) // 2


RUNS = {
    "dense": ("static", {}),
    "static": ("static", {"counts": layerwise}),
    "magnitude-init": ("static", {"counts": layerwise}),
    "snip": ("static", {"counts": altogether}),
    "grasp": ("static", {"counts": altogether}),
    "synflow": ("static", {"counts": altogether}),
    "one-shot": ("pruning", {"counts": layerwise}),
    "gmp": ("pruning", {"counts": layerwise}),
    "imp": ("pruning", {"counts": altogether}),
    "str": ("hidden", {"dense_at_one": False}),
    "movement": ("hidden", {"counts": layerwise}),
    "iss": ("pruning", {"dense_at_one": False}),
    "set": ("dynamic", {"counts": layerwise}),
    "selfish": ("dynamic", {"counts": layerwise}),
    "rigl": ("dynamic", {"counts": layerwise}),
    "itop": ("dynamic", {"counts": layerwise}),
    "deepr": ("dynamic", {"counts": layerwise, "dense_at_one": False}),
    "dsr": ("dynamic", {"counts": layerwise}),
    "snfs": ("dynamic", {"counts": layerwise}),
    "granet": ("dynamic", {"counts": altogether}),
    "mest": ("dynamic", {"counts": layerwise}),
    "acdc": ("free", {"counts": layerwise}),
    "topkast": ("hidden", {"counts": layerwise}),
    "dpf": ("hidden", {"counts": altogether}),
    "ste": ("hidden", {"counts": layerwise}),
    "sr-ste": ("hidden", {"counts": half, "dense_at_one": False}),
    "powerprop": ("dynamic", {"counts": layerwise, "dense_at_one": False}),
}


def test_no_method_is_left_out():
    assert set(RUNS) - {"powerprop"} == set(METHODS)


def small(name):
    """Return how a recipe builds a method, with an interval that fits runs of 24 steps."""
    options = load_recipe(f"lstm-{name}").method
    changes = {"allocation": "uniform", "rounds": 2, "refresh": 3, "scoring_rounds": 5, "reset_momentum": False}
    changes["interval"] = 4 if options.uses_interval and options.interval else options.interval
    if name == "powerprop":
        changes["power"] = 2.0

    def make(density, steps, epoch):
        backward = min(options.backward_sparsity, 1 - density)
        section = dataclasses.replace(options, **changes, sparsity=1 - density, initial_sparsity=0.0,
                                      backward_sparsity=backward)  # fmt: skip
        return build_method(Plan(section, DEFAULT, steps, epoch))

    return make


@pytest.mark.parametrize("name", RUNS)
def test_runs(name):
    kind, options = RUNS[name]
    check_run(small(name), kind, **options)


# --- planted mistakes ----------------------------------------


class Forgetful(SET):
    """Resumes with another drop fraction."""

    def load_state_dict(self, state, arrays=None):
        super().load_state_dict(state, arrays)
        self.drop_fraction = Constant(0.6)


class Denser(Static):
    """Stores more than it was asked for."""

    def __init__(self, allocation):
        super().__init__(Allocation(min(1.0, allocation.density + 0.1)))


class Moving(Static):
    """A static method that moves."""

    def exchange_due(self, *, step, epoch_end, asgd_triggered=False):
        return epoch_end

    def exchange(self, params, *, step, seed, gradients=None):
        other = SET(self.allocation, 0.5)
        other.supports(self.specs, seed=seed)
        return other.exchange(params, step=step, seed=seed)

    def supports(self, specs, *, seed):
        self.specs = specs
        return super().supports(specs, seed=seed)


class Uphill(Static):
    """Follows the gradient with the wrong sign."""

    def pull(self, params, grads):
        return {name: -g for name, g in super().pull(params, grads).items()}


class Talkative(TopKAST):
    """Shows the model an array that it does not have."""

    def view(self, params):
        return {**super().view(params), "more": np.zeros(1)}


@pytest.mark.parametrize(
    ("make", "kind", "what"),
    [
        (lambda d, steps, epoch: Forgetful(Allocation(d), 0.3), "dynamic", "resumed"),
        (lambda d, steps, epoch: Denser(Allocation(d)), "static", "are stated"),
        (lambda d, steps, epoch: Moving(Allocation(d)), "static", "moved"),
        (lambda d, steps, epoch: SET(Allocation(d), 0.3), "pruning", "gained entries"),
        (lambda d, steps, epoch: Uphill(Allocation(d)), "static", "the loss rose"),
        (lambda d, steps, epoch: Talkative(Allocation(d)), "hidden", "other parameters"),
        (lambda d, steps, epoch: Static(Allocation(d)), "hidden", "not stored whole"),
        (lambda d, steps, epoch: Static(Allocation(0.4)), "static", "density 1"),
        (lambda d, steps, epoch: RigL(Allocation(d), Constant(0.3), when=EverySteps(3)), "static", "moved"),
    ],
)  # fmt: skip
def test_planted(make, kind, what):
    with pytest.raises(AssertionError, match=what):
        check_run(make, kind, counts=layerwise if what != "density 1" else None)


def test_fresh_values_of_what_grows():
    """With the conventions of SET's authors an entry that grows, or grows back, is drawn anew; the others stay."""
    method = SET(Allocation(0.5), 0.6, conventions=profile("set-original"))
    trainer = trainer_of(method, dtype=np.float32)
    before = trainer.state.params["fc.weight"]
    exchange = method.exchange(trainer.state.params, step=3, seed=9)["fc.weight"]
    values = method.values_after("fc.weight", before, exchange, step=3, seed=9)
    kept = exchange.source >= 0
    assert np.array_equal(values[kept], before.values[exchange.source[kept]])
    drawn = generator(9, "grown/fc.weight", 3).standard_normal(int((~kept).sum()))
    np.testing.assert_array_equal(values[~kept], drawn.astype(np.float32) / np.float32(10))
    assert (exchange.source < -1).any()  # some grew back

    keeping = SET(Allocation(0.5), 0.6, conventions=dataclasses.replace(profile("set-original"), regrow="keep"))
    values = keeping.values_after("fc.weight", before, exchange, step=3, seed=9)
    back = exchange.source < -1
    assert np.array_equal(values[back], before.values[-2 - exchange.source[back]])
