"""The masked dense shadow of a sparse training run, and what else tests of training need.

`Shadow` takes every step of a trainer again on masked dense arrays, from the state in which the trainer began it, and
checks that the trainer's result lies where rounding allows. Loss, gradients and clipping come with running error bounds
(`refimpl.testing.language_model`); twice the bound is how far two correct programs can be apart, an interval for each
entry of the gradient. What an optimizer makes of an interval follows without any further tolerance, since all rules but
Adam's are compositions of operations that are monotone in the gradient, in exact and in rounded arithmetic alike: the
result lies between the results at the interval's ends. Where nothing was rounded, as in rows of the embedding that no
token has read, this asks for the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.datasets import Corpus
from refimpl.methods import RigL, TopKAST
from refimpl.optim import Adam, LeakingASGD
from refimpl.testing.bounds import gamma
from refimpl.testing.language_model import clipped, loss_and_grads
from refimpl.testing.rounding import Rounded, U, rounded
from refimpl.training.build import AnyOptimizer
from refimpl.training.config import Config
from refimpl.training.trainer import StepResult, Trainer
from refimpl.weights import Exchange, SparseWeight, Weight, support_of

SLACK = 1 + 2.0**-20
"""The bounds are computed themselves, and of first order in the numbers of the pass that computed them."""

Bounds = tuple[np.ndarray, np.ndarray]
Slots = dict[str, np.ndarray]


class Shadow:
    """Takes each step of a trainer again on masked dense arrays, and compares.

    Parameters
    ----------
    trainer : Trainer
        Its model drops nothing out.
    regrown : {"keep", "reset"}
        What the slots of entries that one exchange drops and grows again are expected to hold.
    """

    def __init__(self, trainer: Trainer, regrown: str = "keep") -> None:
        self.trainer = trainer
        self.regrown = regrown
        self.grew_back = 0

    def step(self, tokens: np.ndarray, targets: np.ndarray) -> StepResult:
        """Let the trainer take a step, and check everything that it changed."""
        trainer, state = self.trainer, self.trainer.state
        before = {name: dense(w) for name, w in state.params.items()}
        slots = self._slots()
        stored = {name: support_of(w).mask() for name, w in state.params.items()}
        seen = trainer.method.view(state.params)
        used = {name: support_of(w).mask() for name, w in seen.items()}
        graded = {name: self._graded(name, stored[name]) for name in stored}
        done = loss_and_grads({name: dense(w) for name, w in seen.items()}, tokens, targets, state.carried)
        lr, number = trainer.learning_rate(state.step, state.epoch), state.step + 1
        replaced = trainer.method.replaces_step(number)

        result = trainer.step(tokens, targets)

        _check(np.asarray(result.loss), *_interval(done.loss), what="the loss")
        for k, (own, theirs) in enumerate(zip(state.carried, done.states, strict=True)):
            for part, a, b in zip("hc", own, theirs, strict=True):
                _check(a, *_interval(b), what=f"the carried {part} of layer {k}")
        after: dict[str, Bounds] = {name: (a, a) for name, a in before.items()}
        slots_after = {name: {slot: (a, a) for slot, a in of.items()} for name, of in slots.items()}
        if not replaced:
            grads = self._final(done.grads, before, used, graded)
            for name, g in grads.items():
                rule = trainer._optimizer_of(state.params[name])
                after[name], slots_after[name] = _updated(
                    rule, before[name], g, slots[name], graded[name], lr, state.updates
                )
        self._check_growth(result.exchanges, done.grads)
        self._check_state(after, slots_after, stored, result.exchanges)
        return result

    def end_epoch(self) -> dict[str, Exchange]:
        """Let the trainer end an epoch, and check the exchange: nothing is computed in it, so bit for bit."""
        state = self.trainer.state
        before = {name: (a, a) for name, w in state.params.items() for a in [dense(w)]}
        slots = {name: {slot: (a, a) for slot, a in of.items()} for name, of in self._slots().items()}
        stored = {name: support_of(w).mask() for name, w in state.params.items()}
        exchanges = self.trainer.end_epoch(triggered=False)
        self._check_state(before, slots, stored, exchanges)
        at_rest = all((own.h == 0).all() and (own.c == 0).all() for own in state.carried)
        _require(at_rest, "the hidden state was carried from one epoch into the next")
        return exchanges

    def _graded(self, name: str, stored: np.ndarray) -> np.ndarray:
        support = self.trainer.method.gradient_support(name, self.trainer.state.params)
        return stored if support is None else support.mask()

    def _slots(self) -> dict[str, Slots]:
        state = self.trainer.state
        return {
            name: {slot: _spread(a, state.params[name]) for slot, a in of.items()} for name, of in state.slots.items()
        }

    def _final(self, grads: dict[str, Rounded], params: Slots, used: Slots, graded: Slots) -> dict[str, Rounded]:
        """Mask, add the penalty, clip; a leaking optimizer gets the gradient of every entry."""
        method, masked = self.trainer.method, {}
        for name, g in grads.items():
            masked[name] = _masked(g, graded[name])
            if isinstance(method, TopKAST) and name in method.counts:
                strength = np.where(used[name], method.penalty, method.penalty / method.density[name])
                known = _masked(Rounded(strength, U * strength), graded[name])
                masked[name] = masked[name] + rounded(params[name]) * known
        norm_over = grads if method.conventions.clip_norm == "dense" else masked
        leaks = {
            name for name, w in self.trainer.state.params.items()
            if isinstance(self.trainer._optimizer_of(w), LeakingASGD)
        }  # fmt: skip
        final = {name: grads[name] if name in leaks else g for name, g in masked.items()}
        return clipped(final, norm_over, self.trainer.clip)

    def _check_growth(self, exchanges: dict[str, Exchange], grads: dict[str, Rounded]) -> None:
        """What grew has the largest gradients, as far as rounding lets anyone tell."""
        if isinstance(self.trainer.method, RigL):
            for name, exchange in exchanges.items():
                g = grads[name].reshape(-1)
                free = np.ones(g.shape, bool)
                free[np.setdiff1d(exchange.old.flat, exchange.dropped)] = False
                free[exchange.grown] = False
                if exchange.grown.size and free.any():
                    most = abs(g.value[free]) - 2 * SLACK * g.error[free]
                    least = abs(g.value) + 2 * SLACK * g.error
                    _require(least[exchange.grown].min() >= most.max(), f"{name} did not grow by gradient")

    def _check_state(
        self,
        params: dict[str, Bounds],
        slots: dict[str, dict[str, Bounds]],
        stored: Slots,
        exchanges: dict[str, Exchange],
    ) -> None:
        state = self.trainer.state
        keeps_values = self.trainer.method.conventions.regrow == "keep"
        for name, weight in state.params.items():
            mask = support_of(weight).mask()
            stays, stays_in_slot = np.ones(mask.shape, bool), np.ones(mask.shape, bool)
            if name in exchanges:
                back = np.zeros(mask.size, bool)
                back[np.intersect1d(exchanges[name].dropped, exchanges[name].grown)] = True
                self.grew_back += int(back.sum())
                kept = stored[name] & mask
                stays = kept if keeps_values else kept & ~back.reshape(mask.shape)
                stays_in_slot = kept if self.regrown == "keep" else kept & ~back.reshape(mask.shape)
            else:
                _require(np.array_equal(mask, stored[name]), f"the support of {name} changed without an exchange")
            _check(dense(weight), *(np.where(stays, a, 0) for a in params[name]), what=name)
            for slot, bounds in slots[name].items():
                array = state.slots[name][slot]
                leaked = isinstance(weight, SparseWeight) and array.shape != weight.values.shape
                crosses = np.ones(mask.shape, bool) if leaked else stays_in_slot
                _check(_spread(array, weight), *(np.where(crosses, a, 0) for a in bounds), what=f"{slot} of {name}")


def _masked(g: Rounded, mask: np.ndarray) -> Rounded:
    return Rounded(np.where(mask, g.value, 0), np.where(mask, g.error, 0))


def _spread(slot: np.ndarray, weight: Any) -> np.ndarray:
    """Return a slot as a dense array of its own type."""
    if not isinstance(weight, SparseWeight) or slot.shape != weight.values.shape:
        return slot.copy()
    out = np.zeros(weight.support.size, slot.dtype)
    out[weight.support.flat] = slot
    return out.reshape(weight.shape)


def _interval(x: Rounded) -> Bounds:
    radius = 2 * SLACK * x.error
    return x.value - radius, x.value + radius


def _check(own: np.ndarray, lower: np.ndarray, upper: np.ndarray, *, what: str) -> None:
    outside = ~((lower <= own) & (own <= upper))
    if outside.any():
        raise AssertionError(
            f"{what} leaves its interval in {outside.sum()} entries: {own[outside][0]!r} is not in"
            f" [{lower[outside][0]!r}, {upper[outside][0]!r}]"
        )


def _require(law: bool, message: str) -> None:
    if not law:
        raise AssertionError(message)


def _updated(
    optimizer: AnyOptimizer, w: np.ndarray, g: Rounded, slots: Slots, graded: np.ndarray, lr: float, step: int
) -> tuple[Bounds, dict[str, Bounds]]:
    """Return between what the masked dense step may leave each entry, and each slot."""
    rule: Any = optimizer.on_dense_arrays if isinstance(optimizer, LeakingASGD) else optimizer
    lower, upper = _interval(g)
    # The second moment is monotone in the magnitude of the gradient that it sees, decay included.
    smallest = np.clip(-rule.weight_decay * w, lower, upper)
    values, after = [], []
    for end in (lower, upper, smallest):
        moved, moved_slots = w.copy(), {slot: a.copy() for slot, a in slots.items()}
        rule.update(moved, np.ascontiguousarray(end), moved_slots, lr=lr, step=step)
        values.append(np.where(graded, moved, w))
        if not isinstance(optimizer, LeakingASGD):  # the mask comes too late for a leaking average
            moved_slots = {slot: np.where(graded, a, slots[slot]) for slot, a in moved_slots.items()}
        after.append(moved_slots)
    slot_bounds = {
        slot: (np.min([a[slot] for a in after], axis=0), np.max([a[slot] for a in after], axis=0)) for slot in slots
    }
    if isinstance(rule, Adam):
        low, high = _adam(rule, w, slot_bounds, lr, step)
        return (np.where(graded, low, w), np.where(graded, high, w)), slot_bounds
    return (np.min(values, axis=0), np.max(values, axis=0)), slot_bounds


def _adam(rule: Adam, w: np.ndarray, slots: Mapping[str, Bounds], lr: float, step: int) -> Bounds:
    r"""Return the extremes of :math:`w - \eta m / (\sqrt{v / c_2} + \epsilon) / c_1` over what m and v may be."""
    w = w * (1 - lr * rule.weight_decay) if rule.decoupled else w
    moves = []
    for m in slots["exp_avg"]:
        for v in slots["exp_avg_sq"]:
            root = np.sqrt(v / (1 - rule.betas[1] ** step)) + rule.eps
            moves.append(lr * m / root / (1 - rule.betas[0] ** step))
    operations = 16  # on the way from m and v, at most, in whatever form
    rounding = gamma(operations, np.float64) * (abs(w) + np.max(np.abs(moves), axis=0))
    return w - np.max(moves, axis=0) - rounding, w - np.min(moves, axis=0) + rounding


def dense(weight: Weight) -> np.ndarray:
    """Return a copy of a weight as a dense array, zeros where nothing is stored."""
    return weight.dense() if isinstance(weight, SparseWeight) else weight.copy()


def tiny_corpus(vocabulary: int = 40, train: int = 260, valid: int = 90, seed: int = 0) -> Corpus:
    """Return a synthetic text in which every other word follows from the one before it."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> np.ndarray:
        noise = rng.integers(0, vocabulary, length)
        follows = rng.random(length) < 0.5
        tokens = np.zeros(length, np.int32)
        for n in range(1, length):
            tokens[n] = (tokens[n - 1] * 3 + 1) % vocabulary if follows[n] else noise[n]
        return tokens

    words = tuple(f"w{n}" for n in range(vocabulary))
    digest = f"synthetic-{vocabulary}-{train}-{valid}-{seed}"
    return Corpus("synthetic", text(train), text(valid), text(valid), words, digest)


def tiny_config(**tables: Any) -> Config:
    """Return the configuration of a run that takes milliseconds; keywords are scalars, or tables to merge in."""
    base: dict[str, Any] = {
        "dtype": "float64",
        "seed": 7,
        "data": {"eval_batch_size": 3},
        "model": {"embedding_size": 9, "hidden_size": 8, "layers": 2},
        "method": {"name": "dense", "sparsity": 0.6},
        "optimizer": {"name": "sgd", "lr": 1.0},
        "training": {"epochs": 2, "batch_size": 4, "bptt": 5, "threads": 1},
    }
    for name, given in tables.items():
        base[name] = {**base[name], **given} if isinstance(given, dict) else given
    return Config.from_dict(base)
