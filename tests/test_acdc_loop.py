"""AC/DC's runs against a masked-dense reading of the published loop, step by step.

The reading holds dense arrays and masks, as the authors' program does, and knows nothing of supports or exchanges.
Planted mistakes, those of other programs among them, show that the comparison sees what it should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from acdc_cases import EPOCHS, STEPS, TURNS
from quadratic_cases import PRUNABLE, SPECS

from refimpl.kernels import threads
from refimpl.methods.acdc import ACDC
from refimpl.methods.allocation import Allocation, count_at
from refimpl.methods.phases import Phases
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.testing.quadratic import NOISE, QuadraticModel, trainer_of
from refimpl.training.trainer import Trainer
from refimpl.weights import Exchange, Params, SparseWeight, support_of, values_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = threads.get()
    threads.set_count(1)
    yield
    threads.set_count(before)


State = dict[str, np.ndarray]

DENSITY = 0.5


def select(w: State, masks: State, scope: str) -> State:
    """Return masks of the largest magnitudes."""
    places = [(name, i) for name in PRUNABLE for i in range(w[name].size)]
    size = {place: abs(w[place[0]].reshape(-1)[place[1]]) for place in places}
    parts = [places] if scope == "global" else [[p for p in places if p[0] == name] for name in PRUNABLE]
    out = {name: np.zeros(mask.size) if name in PRUNABLE else mask for name, mask in masks.items()}
    for part in parts:
        for name, i in sorted(part, key=lambda place: -size[place])[: count_at(DENSITY, len(part))]:
            out[name][i] = 1
    return {name: mask.reshape(masks[name].shape) for name, mask in out.items()}


def falling(step: int, epoch: int) -> float:
    """One learning-rate schedule for the whole run."""
    return 0.01 * 0.98**step


def reading(
    phases: Phases, *, optimizer: SGD, scope: str, reset: bool, stale: bool
) -> Iterator[tuple[State, State, State]]:
    """Yield weights, masks and momentum after each step.

    ``stale``: the momentum of masked weights stays where it is and decays, as in the authors' program.
    """
    model = QuadraticModel()
    w: State = {name: values_of(array).copy() for name, array in model.init(0, np.float64).items()}
    m = {name: np.ones(spec.shape) for name, spec in SPECS.items()}
    v = {name: np.zeros(spec.shape) for name, spec in SPECS.items()}
    mu, decay = optimizer.momentum, optimizer.weight_decay
    step = 0
    for epoch in range(EPOCHS):
        forget = False
        if epoch in phases.compress:
            m = select(w, m, scope)
        if epoch in phases.decompress:
            w = {name: np.where(m[name] == 1, w[name], 0) for name in w}
            m = {name: np.ones(spec.shape) for name, spec in SPECS.items()}
            forget = reset
        for batch in range(STEPS):
            eta = falling(step, epoch)
            step += 1
            for name in w:
                w[name] = w[name] * m[name]
                if forget:
                    v[name] = v[name] * 0
                if not stale:
                    v[name] = v[name] * m[name]
                noise = NOISE * generator(6, f"noise/{name}", batch).standard_normal(w[name].shape)
                g = (w[name] - model.target(name) - noise) * m[name]
                g = g + decay * w[name]
                v[name] = mu * v[name] + g
                w[name] = (w[name] - eta * (g + mu * v[name] if optimizer.nesterov else v[name])) * m[name]
            forget = False
            yield {k: a.copy() for k, a in w.items()}, m, {k: a.copy() for k, a in v.items()}


def check_reading(
    make: Callable[..., Any] = ACDC, *, reset: bool = True, scope: str = "global", nesterov: bool = False,
    stale: bool = True, phases: Phases = TURNS, epoch_steps: int = STEPS,
) -> None:  # fmt: skip
    """Compare a run with the reading, step by step: supports, values and momentum, which are the same to the bit.

    The two do the same arithmetic on the same numbers: what is masked is 0 and adds nothing.
    """
    optimizer = SGD(0.9, weight_decay=1e-2, nesterov=nesterov)
    method = make(Allocation(DENSITY), phases, epoch_steps=epoch_steps, scope=scope, reset_momentum=reset)
    trainer = trainer_of(method, optimizer=optimizer, steps_per_epoch=STEPS, lr=falling)
    steps = reading(phases, optimizer=optimizer, scope=scope, reset=reset, stale=stale)
    for number, (w, m, v) in enumerate(steps, 1):
        window = np.array([trainer.state.window])
        trainer.step(window, window)
        where = f"step {number}"
        for name, spec in SPECS.items():
            weight, slots = trainer.state.params[name], trainer.state.slots[name]
            if spec.prunable and phases.compressed((number - 1) // STEPS):
                assert isinstance(weight, SparseWeight), f"{where}: {name} is stored densely in a compressed phase"
                assert np.array_equal(weight.support.mask(), m[name] == 1), f"{where}: {name} has another support"
                assert slots["momentum_buffer"].shape == weight.values.shape, (
                    f"{where}: the slot of {name} is not aligned"
                )
            else:
                assert isinstance(weight, np.ndarray), f"{where}: {name} is stored sparsely in a dense phase"
            flat = support_of(weight).flat
            for what, ours, theirs in (("value", weight, w), ("momentum", slots["momentum_buffer"], v)):
                expected = theirs[name].reshape(-1)[flat]
                error = np.abs(values_of(ours).reshape(-1) - expected).max()
                assert error == 0, f"{where}: {what} of {name} is off by {error}"
        if trainer.state.window == STEPS:
            trainer.end_epoch(triggered=False)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_run_is_the_published_loop(scope: str, nesterov: bool) -> None:
    """With the reset, what the program's masked momentum held plays no part."""
    steps = list(reading(TURNS, optimizer=SGD(0.9, nesterov=nesterov), scope=scope, reset=True, stale=True))
    phases = [steps[epoch * STEPS][1] for epoch in TURNS.compress]
    changed = [sum(np.abs(a[name] - b[name]).sum() for name in PRUNABLE) for a, b in pairwise(phases)]
    assert min(changed) > 0, "the phases of this test have one support, so that little is compared"
    check_reading(scope=scope, nesterov=nesterov)
    check_reading(scope=scope, nesterov=nesterov, stale=False)


def test_without_the_reset_stale_momentum_is_the_difference() -> None:
    """The same loop if nothing is remembered of what is masked; the authors' program differs, at the first return."""
    check_reading(reset=False, stale=False)
    with pytest.raises(AssertionError, match=f"^step {2 * STEPS + 1}: (value|momentum)"):
        check_reading(reset=False, stale=True)


# --- planted mistakes


class NeverForgets(ACDC):
    """As the authors' program under torch 2."""

    def forgets(self, step: int) -> bool:
        return False


class ForgetsAtBoth(ACDC):
    """As another program."""

    def forgets(self, step: int) -> bool:
        return step in self.compress_steps or super().forgets(step)


class Late(ACDC):
    """Begins its phases an epoch late."""

    def __init__(self, allocation: Any, phases: Phases, **options: Any) -> None:
        later = Phases(tuple(e + 1 for e in phases.compress), tuple(e + 1 for e in phases.decompress))
        super().__init__(allocation, later, **options)


class EachAlone(ACDC):
    """Ranks each tensor by itself."""

    def __init__(self, allocation: Any, phases: Phases, **options: Any) -> None:
        super().__init__(allocation, phases, **{**options, "scope": "local"})


class Remembers(ACDC):
    """Gives back what the weights were before compression."""

    kept_values: Params

    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> Any:
        if self.compressed(step):
            self.kept_values = {name: values_of(w).copy() for name, w in params.items()}
        return super().exchange(params, step=step, seed=seed)

    def values_after(self, name: str, weight: Any, exchange: Any, *, step: int, seed: int) -> np.ndarray:
        values = super().values_after(name, weight, exchange, step=step, seed=seed)
        if not self.is_compressed:
            values[exchange.source < 0] = values_of(self.kept_values[name]).reshape(-1)[exchange.grown]
        return values


class OneFewer(ACDC):
    """Compares strictly with the k-th largest."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options, count="strict-threshold")


class Frozen(ACDC):
    """Keeps the first support for good."""

    def exchange(self, params: Params, *, step: int, seed: int, gradients: Any = None) -> Any:
        found = super().exchange(params, step=step, seed=seed)
        if self.compressed(step):
            self.first = getattr(self, "first", {name: e.new for name, e in found.items()})
            for name, e in found.items():
                outside = np.setdiff1d(np.arange(e.new.size), self.first[name].flat)
                found[name] = Exchange.of(e.old, outside, np.empty(0, np.int64))
        return found


@pytest.mark.parametrize(
    ("planted", "match"),
    [
        (NeverForgets, f"step {2 * STEPS + 1}: "),
        (ForgetsAtBoth, f"step {STEPS + 1}: "),
        (Late, f"step {STEPS + 1}: .* stored densely"),
        (EachAlone, f"step {STEPS + 1}: .* another support"),
        (Remembers, f"step {2 * STEPS + 1}: value"),
        (OneFewer, f"step {STEPS + 1}: .* another support"),
        (Frozen, f"step {3 * STEPS + 1}: .* another support"),
    ],
)
def test_catches_planted_mistakes(planted: Any, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        check_reading(planted)


def test_catches_a_reset_of_part_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights and not of biases, as if for what returns; of all, momentum 0 is all that SGD has to forget."""
    end_epoch = Trainer.end_epoch

    def zeroing(names: Any) -> Any:
        def planted(self: Trainer, *, triggered: bool) -> Any:
            found = end_epoch(self, triggered=triggered)
            if self.state.step in self.method.decompress_steps:  # type: ignore[attr-defined]
                for name in names:
                    self.state.slots[name]["momentum_buffer"][...] = 0
            return found

        return planted

    monkeypatch.setattr(Trainer, "end_epoch", zeroing(SPECS))
    check_reading(NeverForgets)
    monkeypatch.setattr(Trainer, "end_epoch", zeroing(PRUNABLE))
    with pytest.raises(AssertionError, match=rf"step {2 * STEPS + 1}: .* of fc\.bias is off"):
        check_reading(NeverForgets)
