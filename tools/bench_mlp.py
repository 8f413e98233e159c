"""Benchmark ``mlp``: a full training step of multilayer perceptrons, SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from bench_numpy import MLPStep as NumpyStep
from bench_numpy import dense_arrays
from bench_steps import Key, Updater, measure_steps
from bench_task import Record, Task

from refimpl.methods.random_support import exact_support
from refimpl.models.mlp import MLP
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.weights import Params, Support

LR, MOMENTUM = 1e-3, 0.9


@dataclass(frozen=True)
class Setting:
    """What is usual for a network: its batch, and whether the output layer stays dense."""

    batch: int = 128
    dense_output: bool = False


USUAL = {"3072-4000-1000-4000-10": Setting(128, True), "784-300-100-10": Setting(100)}


def measure(task: Task) -> list[Record]:
    """Time the steps of one network, dense and at several sparsities."""
    sizes = tuple(int(part) for part in task.model.split("-"))
    usual = USUAL.get(task.model, Setting())
    batch = task.batch or usual.batch
    model = MLP(sizes)
    rng = generator(0, "bench")
    x = rng.standard_normal((sizes[0], batch)).astype(np.float32)
    labels = rng.integers(sizes[-1], size=batch)
    rows = np.ascontiguousarray(x.T)
    steps: dict[Key, Any] = {}
    if "torch" in task.peers:
        import bench_torch

        peer = bench_torch.MLPStep(dense_arrays(model.init(0, np.float32)), rows, labels, LR, MOMENTUM)
        steps[bench_torch.name_of(task.allocator), 0.0] = peer
    steps["numpy-dense", 0.0] = NumpyStep(dense_arrays(model.init(0, np.float32)), rows, labels, LR, MOMENTUM)
    for sparsity in task.sparsity:
        params = model.init(0, np.float32, supports_of(model, 1 - sparsity, usual.dense_output))
        steps["refimpl", sparsity] = MLPStep(model, params, x, labels)
    output = "output layer dense" if usual.dense_output else "output layer sparse"
    return measure_steps(task, f"MLP {task.model}, batch {batch}, {output}", steps, batch=batch)


def supports_of(model: MLP, density: float, dense_output: bool = False) -> dict[str, Support]:
    """Draw supports of one density for all weights, the output layer's excepted if it is to stay dense."""
    if density == 1:
        return {}
    weights = [spec for spec in model.specs().values() if spec.prunable]
    sparse = weights[:-1] if dense_output else weights
    return {
        spec.name: exact_support(spec.shape, max(1, round(density * spec.size)), generator(0, f"support/{spec.name}"))
        for spec in sparse
    }


class MLPStep:
    """Our training step of a multilayer perceptron."""

    def __init__(
        self, model: MLP, params: Params, x: np.ndarray, labels: np.ndarray, lr: float = LR, momentum: float = MOMENTUM
    ) -> None:
        self.model, self.params, self.x, self.labels = model, params, x, labels
        self.update = Updater(params, SGD(momentum), lr)

    def __call__(self) -> float:
        """Take one step and return the loss before it."""
        loss, grads, _ = self.model.loss_and_grads(self.params, self.x, self.labels)
        self.update(grads)
        return loss
