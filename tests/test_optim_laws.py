"""Every optimizer keeps the laws and its closed form; planted mistakes do not."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from refimpl.optim import ASGD, SGD, SNTASGD, Adam, LeakingASGD, Optimizer, Slots, make_optimizer
from refimpl.optim.base import BLOCK
from refimpl.testing.optimizers import ClosedForm, check_optimizer
from refimpl.weights.carry import CarryRule

DECAY = 0.03  # on the grid of the scenarios, g + DECAY * w is never a cancelled rounding error


def sgd_form(o: SGD) -> ClosedForm:
    """b_t = Σ_s μ^(t−s) c_s g_s with c = 1 for the optimizer's first step and 1 − τ for the others."""

    def form(start: float, grads: np.ndarray, *, lr: float, born: int) -> tuple[float, float]:
        w, g = [start], []
        for k, grad in enumerate(grads):
            g.append(grad + o.weight_decay * w[-1])
            weights = [o.momentum ** (k - s) * (1.0 if s + born == 1 else 1 - o.dampening) for s in range(k + 1)]
            b = math.fsum(c * x for c, x in zip(weights, g, strict=True))
            direction = g[-1] if o.momentum == 0 else g[-1] + o.momentum * b if o.nesterov else b
            w.append(w[-1] - lr * direction)
        return w[-1], w[-1]

    return form


def adam_form(o: Adam) -> ClosedForm:
    """M and v as weighted sums over the history, with the corrections of the optimizer's step."""

    def moment(beta: float, xs: list[float]) -> float:
        return (1 - beta) * math.fsum(beta ** (len(xs) - 1 - s) * x for s, x in enumerate(xs))

    def form(start: float, grads: np.ndarray, *, lr: float, born: int) -> tuple[float, float]:
        (beta1, beta2), w, g = o.betas, start, []
        for k, grad in enumerate(grads):
            g.append(float(grad) + (0 if o.decoupled else o.weight_decay) * w)
            w -= lr * o.weight_decay * w if o.decoupled else 0.0
            m_hat = moment(beta1, g) / (1 - beta1 ** (k + born))
            v, c2 = moment(beta2, [x * x for x in g]), 1 - beta2 ** (k + born)
            eps = o.eps if o.eps_placement == "torch" else o.eps / math.sqrt(c2)
            w -= lr * m_hat / (math.sqrt(v / c2) + eps)
        return w, w

    return form


def asgd_form(o: ASGD) -> ClosedForm:
    """w̄ = Σ_s μ_s Π_{r>s} (1 − μ_r) w_s over the life of the entry."""

    def form(start: float, grads: np.ndarray, *, lr: float, born: int) -> tuple[float, float]:
        w, mu = [start], []
        for k, grad in enumerate(grads):
            t = born + k
            eta = lr / (1 + o.lambd * lr * (t - 1)) ** o.alpha
            w.append(w[-1] - eta * o.lambd * w[-1] - eta * (grad + o.weight_decay * w[-1]))
            mu.append(1.0 if t - 1 - o.t0 <= 1 else 1 / (t - 1 - o.t0))
        shares = [m * math.prod(1 - later for later in mu[s + 1 :]) for s, m in enumerate(mu)]
        return w[-1], math.fsum(share * x for share, x in zip(shares, w[1:], strict=True))

    return form


def snt_form(o: SNTASGD) -> ClosedForm:
    """The mean of the iterates of this life, with or without the first."""

    def form(start: float, grads: np.ndarray, *, lr: float, born: int) -> tuple[float, float]:
        w = [start]
        for grad in grads:
            w.append(w[-1] - lr * (grad + o.weight_decay * w[-1]))
        counted = w[2:] if o.first_iterate == "skip" and len(grads) > 1 else w[1:]
        return w[-1], math.fsum(counted) / len(counted)

    return form


FORMS: Mapping[type, Callable[..., ClosedForm]] = {
    SGD: sgd_form,
    Adam: adam_form,
    ASGD: asgd_form,
    SNTASGD: snt_form,
}


def check(optimizer: SGD | Adam | ASGD | SNTASGD) -> None:
    check_optimizer(
        lambda: dataclasses.replace(optimizer),
        closed_form=FORMS[type(optimizer)](optimizer),
        regrown=optimizer.regrown,
        decays=optimizer.weight_decay > 0 or getattr(optimizer, "lambd", 0) > 0,
        max_examples=30,
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(),
        SGD(weight_decay=DECAY),
        SGD(momentum=0.9, regrown="reset"),
        SGD(momentum=0.9, dampening=0.5, weight_decay=DECAY),
        SGD(momentum=0.9, nesterov=True),
        Adam(),
        Adam(betas=(0.5, 0.9), weight_decay=DECAY, regrown="reset"),
        Adam(weight_decay=DECAY, decoupled=True),
        Adam(eps=1e-3, eps_placement="inside-correction"),
        ASGD(),
        ASGD(t0=0, lambd=0, regrown="reset"),
        ASGD(t0=2, lambd=0.1, weight_decay=DECAY),
        SNTASGD(),
        SNTASGD(regrown="reset"),
        SNTASGD(first_iterate="include", weight_decay=DECAY),
        SNTASGD(first_iterate="include", regrown="reset"),
    ],
    ids=repr,
)
def test_laws(optimizer: SGD | Adam | ASGD | SNTASGD) -> None:
    check(optimizer)


class AverageNotReset(SNTASGD):
    """Keeps the average and age of what was dropped and regrown, whatever it was told."""

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        return SNTASGD().carry_rules


class AgeNotReset(SNTASGD):
    """Forgets the average of what was dropped and regrown, but not its age."""

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        return {"average": CarryRule(0.0, "reset"), "age": CarryRule(0.0, "keep")}


class GrownHaveAnAge(SNTASGD):
    """Gives new entries an age, so that their average begins with a number from before they were there."""

    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        return {"average": CarryRule(0.0), "age": CarryRule(2.0)}


class FirstIterateIncluded(SNTASGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        SNTASGD(first_iterate="include").update(values, grad, slots, lr=lr, step=step)


class AverageBeforeUpdate(SNTASGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        before = values.copy()
        super().update(values, grad, slots, lr=lr, step=step)
        after = values.copy()
        values[...] = before
        slots["average"] += (before - after) / np.maximum(slots["age"] - 1, 1).astype(values.dtype)
        values[...] = after


class DampenedAtFirst(SGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        super().update(values, grad, slots, lr=lr, step=step + 1)


class PlainMomentumNotNesterov(SGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        SGD(momentum=self.momentum).update(values, grad, slots, lr=lr, step=step)


class NoBiasCorrection(Adam):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        super().update(values, grad, slots, lr=lr, step=100_000)


class CoupledAfterAll(Adam):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        dataclasses.replace(Adam(), betas=self.betas, weight_decay=self.weight_decay).update(
            values, grad, slots, lr=lr, step=step
        )


class EpsInsideAfterAll(Adam):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        Adam(eps=self.eps, eps_placement="inside-correction").update(values, grad, slots, lr=lr, step=step)


class OneStepTooFar(ASGD):
    def averaging_weight(self, step: int) -> float:
        return 1 / max(1.0, step - self.t0)


class WritesTheGradient(SGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        grad *= lr
        values -= grad


class LooksAtItsNeighbours(SGD):
    """Divides by the number of entries: no longer a rule about single ones."""

    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        values -= lr * grad / max(1, grad.size)


class KnowsThePlace(SGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        values -= lr * grad
        if values.size > 1:
            values.reshape(-1)[0] -= lr * grad.reshape(-1)[0]


class RemembersInItself(SGD):
    calls = 0

    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        object.__setattr__(self, "calls", self.calls + 1)
        values -= lr * grad / self.calls


class ReplacesASlot(SGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        super().update(values, grad, slots, lr=lr, step=step)
        slots["momentum_buffer"] = slots["momentum_buffer"].copy()


class ForgetsARule(Adam):
    @property
    def carry_rules(self) -> Mapping[str, CarryRule]:
        return {"exp_avg": CarryRule()}


class PromotesSlots(ASGD):
    def init(self, values: np.ndarray) -> Slots:
        return {"average": values.astype(np.float64)}


class Uphill(SGD):
    def update(self, values: np.ndarray, grad: np.ndarray, slots: Slots, *, lr: float, step: int) -> None:
        values += lr * grad


MOMENTUM = {"momentum": 0.9}
DECOUPLED = {"weight_decay": DECAY, "decoupled": True}


@pytest.mark.parametrize(
    ("mutant", "options", "law"),
    [
        (AverageNotReset, {"regrown": "reset"}, "closed form: the number to evaluate"),
        (AgeNotReset, {"regrown": "reset"}, "closed form: the number to evaluate"),
        (GrownHaveAnAge, {}, "closed form: the number to evaluate"),
        (FirstIterateIncluded, {}, "closed form: the number to evaluate"),
        (AverageBeforeUpdate, {}, "closed form: the number to evaluate"),
        (DampenedAtFirst, {**MOMENTUM, "dampening": 0.5}, "closed form: the value"),
        (PlainMomentumNotNesterov, {**MOMENTUM, "nesterov": True}, "closed form: the value"),
        (NoBiasCorrection, {}, "closed form: the value"),
        (CoupledAfterAll, DECOUPLED, "closed form: the value"),
        (EpsInsideAfterAll, {"eps": 1e-3}, "closed form: the value"),
        (OneStepTooFar, {"t0": 0, "lambd": 0}, "closed form: the number to evaluate"),
        (WritesTheGradient, {}, "in place: the gradient is only read"),
        (LooksAtItsNeighbours, {}, "sparse is masked dense"),
        (KnowsThePlace, {}, "a permutation permutes the result|sparse is masked dense"),
        (RemembersInItself, {}, "a new object goes on"),
        (ReplacesASlot, MOMENTUM, "in place: the slots are the arrays"),
        (ForgetsARule, {}, "in place: every slot has a carry rule"),
        (PromotesSlots, {"t0": 0, "lambd": 0}, "in place: slot average is float64"),
        (Uphill, {}, "first step goes against"),
    ],
)
def test_mutants_are_caught(mutant: type, options: dict[str, object], law: str) -> None:
    intended = mutant.__mro__[1](**options)
    with pytest.raises(AssertionError, match=law):
        check_optimizer(
            lambda: mutant(**options),
            closed_form=FORMS[type(intended)](intended) if law.startswith("closed form") else None,
            regrown=intended.regrown,
            decays=intended.weight_decay > 0,
            max_examples=300,
            shrink=False,
        )


def test_a_leaking_average_has_no_common_laws() -> None:
    with pytest.raises(ValueError, match="dense gradient"):
        check_optimizer(LeakingASGD)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "asgd", "nt-asgd", "snt-asgd"])
def test_stretches_change_no_bit(name: str) -> None:
    """Arrays longer than a stretch, and arrays that are not contiguous, get what their entries get alone."""
    rng = np.random.default_rng(5)
    optimizer = make_optimizer(name, **({"momentum": 0.9} if name == "sgd" else {}))
    assert isinstance(optimizer, Optimizer)
    start = rng.standard_normal((2, BLOCK + 3)).astype(np.float32)
    grads = rng.standard_normal((3, *start.shape)).astype(np.float32)

    def run(values: np.ndarray, cut: tuple[slice, ...]) -> np.ndarray:
        slots = optimizer.init(values)
        for step in range(3):
            optimizer.update(values, grads[step][cut], slots, lr=np.float64(0.1), step=step + 1)
        return optimizer.averaged(values, slots)

    whole = run(start.copy(), (slice(None),))
    tail = (slice(None), slice(-5, None))
    assert np.array_equal(whole[tail], run(start[tail].copy(), tail))
    not_contiguous = start.copy().T
    slots = optimizer.init(not_contiguous)
    for step in range(3):
        optimizer.update(not_contiguous, grads[step].T, slots, lr=0.1, step=step + 1)
    assert np.array_equal(optimizer.averaged(not_contiguous, slots), whole.T)
    assert whole.dtype == np.float32
