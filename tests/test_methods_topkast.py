"""Top-KAST in whole runs: what is frozen, and its last stage, in which B = A."""

import numpy as np
import pytest

from refimpl.methods.allocation import Allocation, count_at, densities
from refimpl.methods.topkast import TopKAST
from refimpl.optim import SGD
from refimpl.testing.method_runs import check_run
from refimpl.testing.methods import check_method
from refimpl.testing.quadratic import QuadraticModel, train, trainer_of
from refimpl.weights import support_of

SPECS = QuadraticModel().specs()
PRUNABLE = [name for name, spec in SPECS.items() if spec.prunable]


def each(specs, density):
    return sum(count_at(d, specs[name].size) for name, d in densities(specs, Allocation(density)).items())


def test_whole_runs_of_topkast():
    check_run(
        lambda d, steps, epoch: TopKAST(Allocation(d), exploration=0.2, refresh=4, penalty=0.1 * (d < 1), stop_step=13),
        "hidden",
        counts=each,
    )


def test_single_exchanges():
    check_method(
        lambda density, fraction: TopKAST(Allocation(density), exploration=fraction, stop_step=500),
        growth=None,
        max_examples=15,
    )


def check_frozen(kind=TopKAST, stop=None):
    """A ⊆ B always; what is outside B keeps its bits, under momentum and weight decay; B = A from the stop step on."""
    method = kind(Allocation(0.3), exploration=0.25, refresh=3, stop_step=stop)
    trainer = trainer_of(method, optimizer=SGD(0.9, weight_decay=0.1))
    for _ in range(14):
        params = trainer.state.params
        graded = {name: method.gradient_support(name, params) for name in PRUNABLE}
        seen = method.view(params)
        for name in PRUNABLE:
            assert support_of(seen[name]) in graded[name]
            wide = stop is None or trainer.state.step < stop
            share = count_at(0.55 if wide else 0.3, SPECS[name].size)
            assert graded[name].nnz == share, f"B has {graded[name].nnz} entries, not {share}"
        before = {name: params[name].copy() for name in PRUNABLE}
        train(trainer, 1)
        for name in PRUNABLE:
            outside = ~graded[name].mask()
            assert np.array_equal(before[name][outside], trainer.state.params[name][outside]), "a frozen weight moved"
            assert not np.array_equal(before[name], trainer.state.params[name])


@pytest.mark.parametrize("stop", [None, 7, 9])
def test_topkast_freezes_what_is_outside_b(stop):
    check_frozen(stop=stop)


class ZeroOutside(TopKAST):
    def adjust(self, params, *, step, lr, seed):
        for name, (a, _) in self.chosen(params).items():
            params[name][~a.support.mask()] = 0


class MovesAll(TopKAST):
    def update_support(self, name, params):
        return None

    def pull(self, params, grads):
        pulled = super().pull(params, grads)
        for name, (_, b) in self.chosen(params).items():
            whole = np.zeros(params[name].size)
            whole[b.flat] = pulled[name]
            pulled[name] = whole.reshape(params[name].shape)
        return pulled


class StopsLate(TopKAST):
    def exchange_due(self, *, step, epoch_end, asgd_triggered=False):
        return self.when(step=step, epoch_end=epoch_end)


@pytest.mark.parametrize("mutant", [ZeroOutside, MovesAll, StopsLate])
def test_mistakes_in_topkast_are_caught(mutant):
    with pytest.raises(AssertionError):
        check_frozen(mutant, stop=7)


def test_an_impossible_stop_is_refused():
    with pytest.raises(ValueError, match="stop step"):
        TopKAST(Allocation(0.5), stop_step=0)
