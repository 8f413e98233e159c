"""Benchmark ``lstm``: a full training step of stacked LSTMs, batch 20, 35 steps, without embedding and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from bench_numpy import LSTMStep as NumpyStep
from bench_numpy import dense_arrays
from bench_steps import Key, Updater, measure_steps
from bench_task import Record, Task

from refimpl.layers import lstm
from refimpl.methods.random_support import exact_support
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.weights import Grads, Params, SparseWeight

STEPS, BATCH = 35, 20
LR, CLIP = 1e-3, 0.25


def measure(task: Task) -> list[Record]:
    """Time the steps of one model, dense and at several sparsities."""
    layers, size = (int(part) for part in task.model.split("x"))
    batch = task.batch or BATCH
    rng = generator(0, "bench")
    x, dy = (rng.standard_normal((STEPS, size, batch)).astype(np.float32) for _ in range(2))
    dy *= np.float32(1e-4)
    steps: dict[Key, Any] = {}
    if "torch" in task.peers:
        import bench_torch

        peer = bench_torch.LSTMStep(dense(size, layers), layers, batch_major(x), batch_major(dy), LR, CLIP)
        steps[bench_torch.name_of(task.allocator), 0.0] = peer
    steps["numpy-dense", 0.0] = NumpyStep(dense(size, layers), layers, batch_major(x), batch_major(dy), LR, CLIP)
    for sparsity in task.sparsity:
        steps["refimpl", sparsity] = LSTMStep(params_of(size, layers, 1 - sparsity), layers, x, dy)
    return measure_steps(task, f"LSTM {task.model}, batch {batch}, {STEPS} steps", steps, batch=batch, bptt=STEPS)


def batch_major(x: np.ndarray) -> np.ndarray:
    """Return (time, features, batch) as (time, batch, features), the peers' order."""
    return np.ascontiguousarray(x.transpose(0, 2, 1))


def dense(size: int, layers: int) -> dict[str, np.ndarray]:
    """Return dense weights for the peers."""
    return dense_arrays(params_of(size, layers, 1.0))


def params_of(size: int, layers: int, density: float, dtype: Any = np.float32) -> Params:
    """Return the weights of a stacked LSTM; dense arrays at density 1."""
    params: Params = {}
    bound = size**-0.5
    for k in range(layers):
        for name in lstm.names(k):
            rng = generator(0, name)
            shape = (4 * size, size) if "weight" in name else (4 * size,)
            if len(shape) == 1 or density == 1:
                params[name] = rng.uniform(-bound, bound, shape).astype(dtype)
            else:
                support = exact_support(shape, round(density * shape[0] * shape[1]), rng)
                params[name] = SparseWeight(support, rng.uniform(-bound, bound, support.nnz).astype(dtype))
    return params


class LSTMStep:
    """Our training step of stacked LSTMs whose outputs' gradient (T, H, B) is given."""

    def __init__(
        self, params: Params, layers: int, x: np.ndarray, dy: np.ndarray, lr: float = LR, clip: float = CLIP
    ) -> None:
        self.params, self.layers, self.x, self.dy = params, layers, x, dy
        self.zero = lstm.zero_state(dy.shape[1], dy.shape[2], dy.dtype)
        self.update = Updater(params, SGD(), lr, clip)

    def __call__(self) -> None:
        """Take one step: forward, backward, gradients on the support, clipping, SGD."""
        y, caches = self.x, []
        grads: Grads = {}
        for k in range(self.layers):
            y, _, cache = lstm.forward(self.params, k, y, self.zero)
            caches.append(cache)
        back: Any = self.dy
        for k in reversed(range(self.layers)):
            back = lstm.backward(back, caches[k], grads)  # down to the input's, which would go to the embedding
        self.update(grads)
