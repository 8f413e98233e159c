"""Benchmark ``ptb``: a full training step of the whole Penn Treebank model of the Selfish-RNN experiments.

Embedding, stacked LSTM, decoder, cross-entropy, clipping, SGD; vocabulary 10,000, batch 20, 35 steps, random tokens,
state carried from window to window, no dropout. Embedding and decoder are sparse too. Ours is the training loop's own
step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
from bench_numpy import LanguageModelStep as NumpyStep
from bench_numpy import dense_arrays
from bench_steps import Key, measure_steps
from bench_task import Record, Task

from refimpl.methods import Allocation, Dense, Static
from refimpl.models.language_model import LanguageModel
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.training.trainer import Trainer

VOCABULARY, STEPS, BATCH = 10_000, 35, 20
LR, CLIP = 1e-3, 0.25
WINDOWS = 8

Window = tuple[np.ndarray, np.ndarray]


def measure(task: Task) -> list[Record]:
    """Time the steps of one model, dense and at several sparsities."""
    layers, size = (int(part) for part in task.model.split("x"))
    batch = task.batch or BATCH
    model = LanguageModel(VOCABULARY, size, size, layers)
    tokens = generator(0, "tokens").integers(VOCABULARY, size=(WINDOWS, 2, STEPS, batch))
    windows = [(pair[0], pair[1]) for pair in tokens]
    weights = dense_arrays(model.init(0, np.float32))
    steps: dict[Key, Any] = {}
    if "torch" in task.peers:
        import bench_torch

        peer = bench_torch.LanguageModelStep(weights, layers, batch, LR, CLIP)  # copies the weights
        steps[bench_torch.name_of(task.allocator), 0.0] = on_windows(peer, windows)
    steps["numpy-dense", 0.0] = on_windows(NumpyStep(weights, layers, STEPS, batch, LR, CLIP), windows)
    for sparsity in task.sparsity:
        steps["refimpl", sparsity] = on_windows(trainer(model, batch, 1 - sparsity).step, windows)
    title = f"whole PTB model {task.model}, vocabulary {VOCABULARY:,}, batch {batch}, {STEPS} steps"
    return measure_steps(task, title, steps, batch=batch, bptt=STEPS, vocabulary=VOCABULARY)


def trainer(model: LanguageModel, batch: int, density: float, dtype: Any = np.float32) -> Trainer:
    """Return the trainer of a model all of whose matrices have one density."""
    method = Dense() if density == 1 else Static(Allocation(density))
    return Trainer.begin(model, method, SGD(), lambda step, epoch: LR, batch=batch, dtype=dtype, seed=0, clip=CLIP)


def on_windows(step: Callable[[np.ndarray, np.ndarray], object], windows: list[Window]) -> Callable[[], object]:
    """Return a call that trains on the next window."""
    following = cycle(windows)
    return lambda: step(*next(following))
