"""Lottery tickets: what stays in each round, rewinding to the bit, and planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from quadratic_cases import (
    PRUNABLE,
    SPECS,
    TOTAL,
    best,
    caught,
    count_of_all,
    count_of_each,
    of_pool,
    stored,
)

from refimpl.methods.allocation import Allocation, count_at
from refimpl.methods.base import BaseMethod
from refimpl.methods.imp import IMP
from refimpl.optim import SGD, Adam
from refimpl.testing.method_runs import check_run
from refimpl.testing.quadratic import train, trainer_of
from refimpl.training.trainer import Trainer
from refimpl.weights import Params, SparseWeight, support_of, values_of


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


# --- whole runs


@pytest.mark.parametrize(
    ("method", "counts"),
    [
        (lambda a: IMP(a, rounds=3, round_steps=6), count_of_all),
        (lambda a: IMP(a, rounds=2, round_steps=12, rewind_step=6, scope="local"), count_of_each),
    ],
)
def test_whole_runs(method: Callable[[Allocation], Any], counts: Any) -> None:
    check_run(lambda density, steps, epoch: method(Allocation(density)), "pruning", counts=counts)


# --- errors


HALF = Allocation(0.5)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda: IMP(HALF, rounds=1, round_steps=5), "1 rounds; give at least 2"),
        (lambda: IMP(HALF, rounds=2, round_steps=5, rewind_step=5), "from step 5 to step 5; give"),
    ],
)
def test_bad_settings(bad: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bad()
