r"""A model with every kind of weight and a loss of which everything is known, for whole runs in milliseconds.

.. math:: L(W) = \tfrac12 \sum_l \lVert W_l - T_l - N_l(i) \rVert^2, \qquad
    \frac{\partial L}{\partial W_l} = W_l - T_l - N_l(i)

over an embedding, a convolution's four axes, the stacked gates of a recurrent layer and a linear map with its bias;
:math:`T` is fixed, and :math:`N(i)` is a small disturbance of batch :math:`i`. It answers as a model does, and real
gradient promises carry its gradients, so that the trainer, the optimizers and the methods are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.optim import SGD, Optimizer
from refimpl.rng import Draws, generator
from refimpl.training.trainer import Trainer
from refimpl.weights import Grads, LinearGrad, Params, ParamSpec, SparseWeight, Support, draw_uniform

UNITS = 4
"""Width of every layer: four entries in a row at least, so that N:M patterns fit."""

NOISE = 0.05


class QuadraticModel:
    """The model; see the module."""

    def specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters, as a real model does."""
        gates = {gate: slice(k * UNITS, (k + 1) * UNITS) for k, gate in enumerate("ifgo")}
        specs = [
            ParamSpec("encoder.weight", (12, UNITS), "embedding", True, columns_per_sample=0.0, layer="encoder"),
            ParamSpec("conv.weight", (UNITS, 2, 2, 2), "conv", True, columns_per_sample=9.0, layer="conv"),
            ParamSpec("rnn.weight_ih_l0", (16, UNITS), "linear", True, gates, layer="rnn.0", source="encoder"),
            ParamSpec("rnn.weight_hh_l0", (16, UNITS), "recurrent", True, gates, layer="rnn.0", source="rnn.0"),
            ParamSpec("fc.weight", (10, UNITS), "linear", True, layer="fc", source="rnn.0"),
            ParamSpec("fc.bias", (10,), "bias", layer="fc"),
        ]
        return {spec.name: spec for spec in specs}

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the parameters; of a sparse weight only the values that exist."""
        supports = supports or {}
        return {
            name: draw_uniform(generator(seed, f"init/{name}"), spec.shape, 0.5, dtype, supports.get(name))
            for name, spec in self.specs().items()
        }

    def target(self, name: str) -> np.ndarray:
        """Return T of one parameter: half of its entries are a tenth as large as the others."""
        shape = self.specs()[name].shape
        rng = generator(5, f"target/{name}")
        return rng.standard_normal(shape) * rng.choice([0.1, 1.0], shape)

    def begin(self, batch: int, dtype: Any) -> list[Any]:
        """Return no carried state."""
        return []

    def next_epoch(self, carried: list[Any]) -> list[Any]:
        """Return no carried state."""
        return []

    def evaluated(self, params: Params, carried: list[Any]) -> Params:
        """Return the parameters alone."""
        return params

    def loss(self, params: Params) -> float:
        """Return the loss without a disturbance."""
        return sum(0.5 * float(((_dense(params[name]) - self.target(name)) ** 2).sum()) for name in self.specs())

    def loss_and_grads(
        self, params: Params, inputs: np.ndarray, targets: np.ndarray, carried: Any, draws: Draws | None = None
    ) -> tuple[float, Grads, list[Any]]:
        """Return the loss of batch ``inputs[0]``, its gradients, and no carried state."""
        loss, grads = 0.0, {}
        for name in self.specs():
            w = _dense(params[name])
            noise = NOISE * generator(6, f"noise/{name}", int(inputs[0])).standard_normal(w.shape)
            difference = (w - self.target(name) - noise).astype(w.dtype)
            loss += 0.5 * float((difference.astype(np.float64) ** 2).sum())
            grads[name] = difference if w.ndim == 1 else promise(difference)
        return loss, grads, []

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return the sum of all weights, and its gradient, ones."""
        prunable = [name for name, spec in self.specs().items() if spec.prunable]
        total = sum(float(_dense(params[name]).sum()) for name in prunable)
        return total, {name: promise(np.ones(params[name].shape)) for name in prunable}


def promise(gradient: np.ndarray) -> LinearGrad:
    """Return a gradient as the promise of a linear map whose inputs are the unit vectors: exact, whoever evaluates."""
    matrix = np.ascontiguousarray(gradient.reshape(gradient.shape[0], -1))
    return LinearGrad(gradient.shape, matrix, np.eye(matrix.shape[1], dtype=matrix.dtype))


def _dense(weight: Any) -> np.ndarray:
    return weight.dense() if isinstance(weight, SparseWeight) else weight


class QuadraticProbe:
    """What a method may ask before training: the loss and gradients of batch 0, and the flow."""

    def __init__(self, model: QuadraticModel) -> None:
        self.model = model

    def loss_and_grads(self, params: Params, **options: Any) -> tuple[float, Grads]:
        """Return loss and gradients of batch 0."""
        loss, grads, _ = self.model.loss_and_grads(params, np.zeros(1, int), np.zeros(1, int), [])
        return loss, grads

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return the flow of the model."""
        return self.model.flow(params)


def trainer_of(
    method: Any,
    *,
    seed: int = 0,
    steps_per_epoch: int = 6,
    optimizer: Optimizer | None = None,
    lr: Callable[[int, int], float] = lambda step, epoch: 0.05,
    dtype: Any = np.float64,
) -> Trainer:
    """Return a trainer of the model at step 0."""
    model: Any = QuadraticModel()
    return Trainer.begin(
        model, method, optimizer or SGD(0.9), lr, probe=QuadraticProbe(model), batch=1, dtype=dtype, seed=seed,
        steps_per_epoch=steps_per_epoch,
    )  # fmt: skip


def train(trainer: Trainer, steps: int, after: Callable[[Trainer], None] | None = None) -> None:
    """Take steps, epoch ends included; ``after`` is called after each of them, and after each end of an epoch."""
    for _ in range(steps):
        window = np.array([trainer.state.window])
        trainer.step(window, window)
        if after:
            after(trainer)
        if trainer.state.window == trainer.steps_per_epoch:
            trainer.end_epoch(triggered=False)
            if after:
                after(trainer)
