"""Whole runs of every method obey the laws, and the laws catch planted mistakes."""

import numpy as np
import pytest

from refimpl.methods import SET, Allocation, Dense, RigL, Selfish, Static, TopKAST
from refimpl.methods.allocation import count_at, densities
from refimpl.methods.schedule import Constant, EverySteps
from refimpl.testing.method_runs import check_run


def layerwise(specs, density):
    found = densities(specs, Allocation(density))
    return sum(count_at(d, specs[name].size) for name, d in found.items())


RUNS = {
    "dense": (lambda d, steps, epoch: Dense(), "static", {}),
    "static": (lambda d, steps, epoch: Static(Allocation(d)), "static", {"counts": layerwise}),
    "set": (lambda d, steps, epoch: SET(Allocation(d), 0.3), "dynamic", {"counts": layerwise}),
    "selfish": (
        lambda d, steps, epoch: Selfish(Allocation(d), 0.5, total_steps=steps), "dynamic", {"counts": layerwise},
    ),
    "rigl": (
        lambda d, steps, epoch: RigL(Allocation(d), 0.3, interval=5, end_step=18), "dynamic", {"counts": layerwise},
    ),
    "topkast": (
        lambda d, steps, epoch: TopKAST(Allocation(d), exploration=0.2, refresh=3, penalty=0.01 * (d < 1)), "hidden",
        {"counts": layerwise},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_runs(name):
    make, kind, options = RUNS[name]
    check_run(make, kind, **options)


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
