"""A sparse training step is the masked dense one, within what rounding allows, each step from a common state.

The comparison is `refimpl.testing.training.Shadow`; here it runs over every optimizer, every method and both tiers of
kernels, and planted mistakes show that it sees what it should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from refimpl import kernels
from refimpl.datasets import batchify, windows
from refimpl.kernels import threads
from refimpl.methods import SET, Allocation, BaseMethod, Conventions, Dense, RigL, Selfish, Static, TopKAST
from refimpl.models.language_model import LanguageModel
from refimpl.optim import ASGD, SGD, SNTASGD, Adam, LeakingASGD
from refimpl.testing.training import Shadow, dense, tiny_corpus
from refimpl.training.build import AnyOptimizer
from refimpl.training.trainer import StepResult, Trainer
from refimpl.weights import Exchange, ParamSpec, SparseWeight, Support, values_of

OPTIMIZERS: dict[str, tuple[AnyOptimizer, float]] = {
    "sgd": (SGD(weight_decay=1e-2), 1.0),
    "momentum": (SGD(momentum=0.9, dampening=0.25), 1.0),
    "nesterov": (SGD(momentum=0.9, nesterov=True, weight_decay=1e-3), 0.5),
    "adam": (Adam(weight_decay=1e-3), 1e-2),
    "adamw": (Adam(weight_decay=1e-2, decoupled=True), 1e-2),
    "asgd": (ASGD(t0=1.0, weight_decay=1e-3), 1.0),
    "nt-asgd": (ASGD(t0=0.0, lambd=0.0), 1.0),
    "nt-asgd-leaking": (LeakingASGD(weight_decay=1e-3), 1.0),
    "snt-asgd": (SNTASGD(weight_decay=1e-3), 1.0),
}
HALF = Allocation(0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small have nothing to share out; determinism over threads has tests of its own."""
    before = threads.get()
    threads.set_count(1)
    yield
    threads.set_count(before)


class Full(Static):
    """Sparse storage of everything: density 1."""

    def supports(self, specs: Mapping[str, ParamSpec], *, seed: int) -> dict[str, Support]:
        """Return full supports."""
        return {name: Support.full(spec.shape) for name, spec in specs.items() if spec.prunable}


METHODS: dict[str, Callable[[], BaseMethod]] = {
    "dense": Dense,
    "full": lambda: Full(HALF),
    "static": lambda: Static(HALF, Conventions(clip_norm="dense")),
    "set": lambda: SET(HALF, 0.3, conventions=Conventions(regrow="reset")),
    "selfish": lambda: Selfish(HALF, 0.5, total_steps=20),
    "rigl": lambda: RigL(HALF, 0.4, interval=2, end_step=20),
    "rigl-after": lambda: RigL(HALF, 0.4, interval=2, end_step=20, conventions=Conventions(exchange_step="after")),
    "topkast": lambda: TopKAST(HALF, exploration=0.2, refresh=2, penalty=0.05),
}


def make_trainer(
    method: str | BaseMethod, optimizer: str | AnyOptimizer, *, clip: float = 0.0, tied: bool = False,
    kind: type[Trainer] = Trainer,
) -> Trainer:  # fmt: skip
    """Return a trainer of a tiny model."""
    lr = 1.0
    if isinstance(optimizer, str):
        optimizer, lr = OPTIMIZERS[optimizer]
    made = METHODS[method]() if isinstance(method, str) else method
    model = LanguageModel(40, 9 if not tied else 8, 8, 2, tied=tied, init_scale=0.5)
    return kind.begin(
        model, made, optimizer, lambda step, epoch: lr * 0.9**step, batch=4, dtype=np.float64, seed=3, clip=clip
    )


def walk(trainer: Trainer, regrown: str = "keep") -> Shadow:
    """Take three short epochs."""
    shadow = Shadow(trainer, regrown)
    text = windows(batchify(tiny_corpus().train, 4), 5)
    for k in (11, 12, None, 0, 1, None, 2):  # window 12 is shorter
        if k is None:
            shadow.end_epoch()
        else:
            shadow.step(*text[k])
    return shadow


@pytest.mark.parametrize("tier", kernels.TIERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, tier: str) -> None:
    with kernels.use(tier):
        walk(make_trainer("selfish", optimizer))
        walk(make_trainer("rigl-after", optimizer))


@pytest.mark.parametrize("tier", kernels.TIERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_clipping(method: str, tier: str) -> None:
    with kernels.use(tier):
        walk(make_trainer(method, "momentum", clip=0.1))
        walk(make_trainer(method, "nt-asgd-leaking", clip=0.1, tied=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_density_1_is_dense(optimizer: str) -> None:
    """Both start from the same numbers, and are compared with the same witness."""
    sparse, whole = (walk(make_trainer(method, optimizer, clip=0.1)).trainer for method in ("full", "dense"))
    at_start = [make_trainer(method, optimizer) for method in ("full", "dense")]
    assert all(isinstance(w, SparseWeight) for name, w in sparse.state.params.items() if sparse.specs[name].prunable)
    assert all(isinstance(w, np.ndarray) for w in whole.state.params.values())
    for name in sparse.specs:
        one, other = (dense(t.state.params[name]) for t in at_start)
        assert np.array_equal(one, other), name


@pytest.mark.parametrize("regrow", ["keep", "reset"])
def test_what_grows_back(regrow: str) -> None:
    """Entries dropped and grown back keep their average and age, or start anew, as the conventions say."""
    method = Selfish(HALF, 0.9, total_steps=20, conventions=Conventions(regrow=regrow))  # type: ignore[arg-type]
    shadow = walk(make_trainer(method, SNTASGD(regrown=regrow)), regrown=regrow)  # type: ignore[arg-type]
    assert shadow.grew_back > 100


# --- planted mistakes: the shadow must notice each ---


class SlotsNotCarried(Trainer):
    """Leaves the slots where they are: the counts agree, and the entries do not."""

    def _exchange(self, number: int, gradients: Any) -> dict[str, Exchange]:
        held = {name: dict(of) for name, of in self.state.slots.items()}
        exchanges = super()._exchange(number, gradients)
        self.state.slots = held
        return exchanges


class StateNotCarried(Trainer):
    """Begins every window from zero."""

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> StepResult:
        result = super().step(tokens, targets)
        self.state.carried = self.model.zero_states(tokens.shape[1], np.float64)
        return result


class StateCrossesEpochs(Trainer):
    """Begins an epoch with the state in which the last one ended."""

    def end_epoch(self, *, triggered: bool) -> dict[str, Exchange]:
        carried = self.state.carried
        exchanges = super().end_epoch(triggered=triggered)
        self.state.carried = carried
        return exchanges


class ClippedBeforePenalty(Trainer):
    """Clips the loss's gradient, and adds the method's own one afterwards."""

    def _update(self, grads: Any, number: int) -> float:
        penalty, self.method.penalty = self.method.penalty, 0.0
        self._late = penalty
        try:
            return super()._update(grads, number)
        finally:
            self.method.penalty = penalty

    def _update_one(self, name: str, gradient: np.ndarray, *rest: Any) -> None:
        if name in self.method.counts:
            self.method.penalty = self._late
            gradient = gradient + self.method._penalty_gradient(name, self.state.params)
            self.method.penalty = 0.0
        super()._update_one(name, gradient, *rest)


class NormAfterMask(Trainer):
    """Clips by the support's norm where the convention says the dense one."""

    def _squared(self, promise: Any, evaluated: np.ndarray) -> float:
        return float((evaluated**2).sum())


@pytest.mark.parametrize(
    ("kind", "method", "optimizer"),
    [
        (SlotsNotCarried, "selfish", "momentum"),
        (SlotsNotCarried, "rigl", "adam"),
        (SlotsNotCarried, "selfish", "snt-asgd"),
        (StateNotCarried, "static", "sgd"),
        (StateCrossesEpochs, "dense", "sgd"),
        (ClippedBeforePenalty, "topkast", "sgd"),
        (NormAfterMask, "static", "sgd"),
    ],
)
def test_catches(kind: type[Trainer], method: str, optimizer: str) -> None:
    walk(make_trainer(method, optimizer, clip=0.1))
    with pytest.raises(AssertionError):
        walk(make_trainer(method, optimizer, clip=0.1, kind=kind))


def test_catches_an_average_that_is_not_reset_on_regrowth() -> None:
    method = Selfish(HALF, 0.9, total_steps=20)
    with pytest.raises(AssertionError, match="average"):
        walk(make_trainer(method, SNTASGD(regrown="keep")), regrown="reset")


@pytest.mark.parametrize(
    ("name", "times"), [("rnn.weight_hh_l0", 1 + 1e-9), ("encoder.weight", 1 + 1e-9), ("rnn.bias_ih_l1", 1 + 1e-9)]
)
def test_catches_a_gradient_that_is_off_in_the_ninth_digit(name: str, times: float, monkeypatch: Any) -> None:
    trainer = make_trainer("static", "sgd")
    update = trainer._update_one

    def off(given: str, gradient: np.ndarray, *rest: Any) -> None:
        update(given, gradient * times if given == name else gradient, *rest)

    monkeypatch.setattr(trainer, "_update_one", off)
    with pytest.raises(AssertionError, match=name):
        walk(trainer)


def test_the_values_that_train_are_those_that_are_stored() -> None:
    """A guard of this file itself: the walk moves every stored value of every tensor that a token reaches."""
    trainer = make_trainer("selfish", "momentum")
    before = {name: values_of(w).copy() for name, w in trainer.state.params.items()}
    walk(trainer)
    moved = {name: np.mean(values_of(w) != before[name]) for name, w in trainer.state.params.items()}
    assert all(share > 0.5 for share in moved.values()), moved
