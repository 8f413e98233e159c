"""One training step, one exchange, and what is evaluated: the state of a run and what moves it.

A step is: gradient, clip, optimizer, exchange if due. At the end of an epoch the loop validates, asks the trigger,
exchanges, and saves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.methods.base import BaseMethod, Probe, Rewind
from refimpl.models.base import Model
from refimpl.optim import LeakingASGD, clip_scale, global_norm, squared_norm
from refimpl.rng import Draws
from refimpl.training import flop_account, flops, published
from refimpl.training.build import AnyOptimizer, LearningRate
from refimpl.training.state import State, carried_arrays
from refimpl.weights import Exchange, Gradient, Grads, Params, SparseWeight, Support, values_of

EXPLORED_PER_ENTRY = 128
"""Entries of a dense weight for each stored one beyond which no record of explored entries is kept: 16 bytes."""


class StepResult(NamedTuple):
    """What one training step reports."""

    loss: float
    grad_norm: float  # before clipping; NaN where it was not needed
    exchanges: dict[str, Exchange]


class NonFiniteLossError(ArithmeticError):
    """The loss became infinite or NaN."""


class Trainer:
    """Moves a state: a model, a method and an optimizer, none of which knows the others.

    Parameters
    ----------
    model : Model
    method : BaseMethod
    optimizer : Optimizer
        To begin with.
    averaging : Optimizer, optional
        The one that :meth:`start_averaging` switches to.
    learning_rate : callable
        Of the steps and epochs done.
    clip : float
        Largest global norm of the gradient; 0 does not clip.
    seed : int
        Of all draws.
    steps_per_epoch : int
        Needed by methods that rewind.
    state : State
        Moved in place.
    """

    def __init__(
        self,
        model: Model,
        method: BaseMethod,
        optimizer: AnyOptimizer,
        learning_rate: LearningRate,
        state: State,
        *,
        averaging: AnyOptimizer | None = None,
        clip: float = 0.0,
        seed: int = 0,
        steps_per_epoch: int = 1,
    ) -> None:
        self.model = model
        self.method = method
        self.first_optimizer = optimizer
        self.averaging_optimizer = averaging
        self.learning_rate = learning_rate
        self.state = state
        self.clip = clip
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch
        self.specs = model.specs()
        self.counter = flop_account.StepCounter(published.formula_of(method), self.specs)

    @classmethod
    def begin(
        cls, model: Model, method: BaseMethod, optimizer: AnyOptimizer, learning_rate: LearningRate,
        *, probe: Probe | None = None, batch: int, dtype: Any, seed: int, **options: Any,
    ) -> Trainer:  # fmt: skip
        """Return a trainer at step 0: supports chosen, values drawn, slots empty."""
        specs = model.specs()
        params = model.init(seed, dtype, method.supports(specs, seed=seed))
        counted = None if probe is None else flops.CountingProbe(probe, specs)
        params = method.start(params, specs, counted, seed=seed)
        state = State(params, {}, model.begin(batch, dtype))
        trainer = cls(model, method, optimizer, learning_rate, state, seed=seed, **options)
        trainer.fresh_slots()
        if counted is not None:
            flop_account.add_scoring(state.flops, counted.terms)
        return trainer

    @property
    def optimizer(self) -> AnyOptimizer:
        """The optimizer that is active."""
        if self.state.averaging:
            assert self.averaging_optimizer is not None
            return self.averaging_optimizer
        return self.first_optimizer

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> StepResult:
        """Take one training step on a batch: a window of tokens (T, B), or images (C, H, W, B).

        Raises
        ------
        NonFiniteLossError
            If the loss is not finite; parameters and buffers are then still those before the step.
        """
        state, method = self.state, self.method
        number = state.step + 1
        seen = method.view(state.params)
        draws = Draws(self.seed, number - state.origin_step)
        loss, grads, carried = self.model.loss_and_grads(seen, inputs, targets, state.carried, draws)
        if not np.isfinite(loss):
            raise NonFiniteLossError(self._where_not_finite(loss, number))
        exchanges: dict[str, Exchange] = {}
        norm = float("nan")
        self._count(number, seen, targets.size)
        method.observe(state.params, grads, step=number)
        if not method.replaces_step(number):
            norm = self._update(grads, number)
        if method.exchange_due(step=number, epoch_end=False):
            promises = {name: g for name, g in grads.items() if not isinstance(g, np.ndarray)}
            self.explore(seen)
            exchanges = self._exchange(number, promises)
        state.step = number
        state.window += 1
        state.carried = carried
        state.loss_sum += loss * targets.size
        state.loss_count += targets.size
        return StepResult(loss, norm, exchanges)

    def end_epoch(self, *, triggered: bool) -> dict[str, Exchange]:
        """Exchange, if the method does so between epochs, and begin the next epoch."""
        state = self.state
        exchanges = {}
        self.explore(self.method.view(state.params))
        if self.method.exchange_due(step=state.step, epoch_end=True, asgd_triggered=triggered):
            exchanges = self._exchange(state.step, None)
        state.epoch += 1
        state.window = 0
        state.loss_sum, state.loss_count = 0.0, 0
        state.carried = self.model.next_epoch(state.carried)
        return exchanges

    def explore(self, seen: Params) -> None:
        """Take down which entries the forward pass uses, before an exchange moves them.

        The record takes a bit for each entry of the dense weight; of weights so sparse that this would be more than
        four times what their values take (float32), none is kept.
        """
        explored = self.state.explored
        for name, spec in self.specs.items():
            weight = seen.get(name)
            if isinstance(weight, SparseWeight):
                if spec.prunable and weight.nnz * EXPLORED_PER_ENTRY >= spec.size:
                    explored.update(name, weight.support)
            elif spec.prunable and (name not in explored.names or explored.fraction(name) < 1):
                explored.update(name, Support.full(spec.shape))

    def explored(self) -> float:
        """Return the fraction of the entries of sparse weights that were ever used; 1 if none is sparse.

        NaN without a record.
        """
        explored, seen = self.state.explored, self.method.view(self.state.params)
        self.explore(seen)
        sparse = [name for name in explored.names if isinstance(seen[name], SparseWeight)]
        size = sum(self.specs[name].size for name in sparse)
        if not size:
            return 1.0 if explored.names else float("nan")
        return sum(explored.count(name) for name in sparse) / size

    def start_averaging(self) -> None:
        """Switch to the averaging optimizer, with fresh slots."""
        self.state.averaging = True
        self.state.updates = 0
        self.fresh_slots()

    def evaluated(self) -> Params:
        """Return what to evaluate with: averages where there are any, restricted to the forward set; and buffers."""
        averaged: Params = {}
        for name, weight in self.state.params.items():
            slots = self.state.slots[name]
            values = self._optimizer_of(weight).averaged(values_of(weight), slots)
            if isinstance(weight, SparseWeight) and values.shape == weight.values.shape:
                averaged[name] = SparseWeight(weight.support, values)
            else:
                averaged[name] = values  # a leaking average is dense
        return self.model.evaluated(self.method.view(averaged), self.state.carried)

    @property
    def weights(self) -> list[str]:
        """Names of the parameters that are linear maps."""
        return flops.multiplied(self.specs)

    def used(self, seen: Params | None = None) -> dict[str, int]:
        """Return |A| of each weight, of ``seen`` if the method's view is at hand."""
        seen = self.method.view(self.state.params) if seen is None else seen
        return {name: values_of(seen[name]).size for name in self.weights}

    def graded(self) -> dict[str, int]:
        """Return |B| of each weight."""
        counts = {}
        for name in self.weights:
            support = self.method.gradient_support(name, self.state.params)
            counts[name] = values_of(self.state.params[name]).size if support is None else support.nnz
        return counts

    def _count(self, number: int, seen: Params, samples: int) -> None:
        """Enter the operations of a step into the account."""
        used, graded = self.used(seen), self.graded()
        sparse = [name for name in graded if isinstance(self.state.params[name], SparseWeight)]
        clips, leaks = bool(self.clip), isinstance(self.optimizer, LeakingASGD)
        whole = flops.whole_gradients(self.method, number, list(graded), sparse, clips=clips, leaks=leaks)
        self.counter.add(self.state.flops, used, graded, samples, whole)

    def _optimizer_of(self, weight: object) -> AnyOptimizer:
        """A leaking optimizer has nothing to leak into where a parameter is dense."""
        if isinstance(self.optimizer, LeakingASGD) and not isinstance(weight, SparseWeight):
            return self.optimizer.on_dense_arrays
        return self.optimizer

    def fresh_slots(self) -> None:
        """Let the active optimizer begin anew."""
        for name, weight in self.state.params.items():
            optimizer = self._optimizer_of(weight)
            if isinstance(optimizer, LeakingASGD):
                assert isinstance(weight, SparseWeight)
                self.state.slots[name] = optimizer.init(weight.values, weight.support)
            else:
                self.state.slots[name] = optimizer.init(values_of(weight))

    def _update(self, grads: Grads, number: int) -> float:
        """Pull the gradients back, clip them together, and let the optimizer move the values; return the norm."""
        state, method = self.state, self.method
        pulled = method.pull(state.params, grads)
        scale, norm = 1.0, float("nan")
        if self.clip:
            norm = global_norm(self._squared(grads.get(name), gradient) for name, gradient in pulled.items())
            scale = clip_scale(norm, self.clip)
        state.updates += 1
        lr = self.learning_rate(state.step - state.origin_step, state.epoch - state.origin_epoch)
        for name, gradient in pulled.items():
            support = method.update_support(name, state.params)
            self._update_one(name, gradient, support, lr * method.lr_scale(name), grads.get(name), scale)
        method.adjust(state.params, step=number, lr=lr, seed=self.seed)
        return norm

    def _squared(self, promise: np.ndarray | Gradient | None, pulled: np.ndarray) -> float:
        if self.method.conventions.clip_norm == "dense" and not (promise is None or isinstance(promise, np.ndarray)):
            return sum(squared_norm(block) for _, block in promise.blocks())
        return squared_norm(pulled)

    def _update_one(
        self,
        name: str,
        gradient: np.ndarray,
        support: Support | None,
        lr: float,
        promise: np.ndarray | Gradient | None,
        scale: float,
    ) -> None:
        state = self.state
        weight, slots = state.params[name], state.slots[name]
        optimizer, values = self._optimizer_of(weight), values_of(weight)
        if isinstance(optimizer, LeakingASGD):
            assert isinstance(weight, SparseWeight)
            assert promise is not None
            assert not isinstance(promise, np.ndarray)
            optimizer.update(
                values, gradient, slots, lr=lr, step=state.updates, scale=scale,
                support=weight.support, dense_grad=promise.dense(),
            )  # fmt: skip
        elif support is None:
            optimizer.update(values, gradient, slots, lr=lr, step=state.updates, scale=scale)
        else:  # B is a part of what is stored: the rest must not move, neither by momentum nor by decay
            flat = support.flat
            part = {slot: array.reshape(-1)[flat] for slot, array in slots.items()}
            moved = values.reshape(-1)[flat]
            optimizer.update(moved, gradient, part, lr=lr, step=state.updates, scale=scale)
            values.reshape(-1)[flat] = moved
            for slot, array in part.items():
                slots[slot].reshape(-1)[flat] = array

    def _exchange(self, number: int, gradients: dict[str, Gradient] | None) -> dict[str, Exchange]:
        state, method = self.state, self.method
        exchanges = method.exchange(state.params, step=number, seed=self.seed, gradients=gradients)
        rules = self.optimizer.carry_rules
        for name, exchange in exchanges.items():
            values = method.values_after(name, state.params[name], exchange, step=number, seed=self.seed)
            slots = state.slots[name]
            carried = {slot: exchange.carry(slots[slot].reshape(-1), rule) for slot, rule in rules.items()}
            becomes_dense = exchange.old.nnz < exchange.new.nnz == exchange.new.size
            shape = exchange.new.shape if becomes_dense else values.shape
            state.params[name] = values.reshape(shape) if becomes_dense else SparseWeight(exchange.new, values)
            slots |= {slot: array.reshape(shape) for slot, array in carried.items()}
        back = method.rewind(state.params, step=number)
        if back is not None:
            self._rewind(back, number)
        if method.forgets(number):
            state.updates = 0
            self.fresh_slots()
        return exchanges

    def _rewind(self, back: Rewind, number: int) -> None:
        """Go on from an earlier step with other parameters: learning rate, data and draws as they then were.

        What is carried is not brought back: running statistics follow the weights within some tens of batches, and
        training does not depend on them.
        """
        state = self.state
        state.params = back.params
        state.averaging, state.updates, state.history = False, 0, []
        state.origin_epoch = state.epoch + 1 - back.step // self.steps_per_epoch
        state.origin_step = number - back.step
        self.fresh_slots()

    def _where_not_finite(self, loss: float, number: int) -> str:
        broken = [name for name, w in self.state.params.items() if not np.isfinite(values_of(w)).all()]
        if broken:
            where = f"{broken[0]} was the first tensor with a value that is not finite"
        elif not all(np.isfinite(array).all() for array in carried_arrays(self.state.carried).values()):
            where = "what was carried into the batch, hidden state or running statistics, is not finite"
        else:
            where = "all parameters are still finite, so the activations overflowed"
        return f"the loss is {loss} at step {number}: {where}; a smaller lr or a clip above 0 usually helps"
