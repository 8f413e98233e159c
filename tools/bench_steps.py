"""Training steps side by side: timing them, and the update that ours ends with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from bench_table import Progress, print_table
from bench_task import Record, Task
from threadpoolctl import threadpool_info, threadpool_limits
from timing import interleaved, median_ms

from refimpl.kernels import threads
from refimpl.optim import SGD, clip_scale, global_norm, squared_norm
from refimpl.weights import Grads, Params, SparseWeight, values_of

Key = tuple[str, float]
"""Implementation and sparsity of a candidate."""

DENSE = ("torch-dense", "torch-dense-tuned", "numpy-dense")

TURN = 0.04
"""Seconds of a candidate's turn: in training, too, a step follows one that used the same data."""

SETTLE = 0.25
"""Seconds after which the threads of a BLAS have stopped waiting actively (OpenBLAS: up to 0.1 s of processor time,
MKL: 0.2 s); until then they slow down every other pool on the same cores, by an order of magnitude. The pools of torch
and Numba need a tenth of it."""

USES_BLAS = ("numpy", "mkl")
"""How the implementations are called that use the threads of a BLAS that others in the process must not use."""


def blas_kernels() -> str:
    """Return which kernels OpenBLAS runs on, as far as it says."""
    return next((i["architecture"] for i in threadpool_info() if i.get("architecture")), "unknown")


@contextmanager
def turn_of(implementation: str, count: int) -> Iterator[None]:
    """Give a candidate its threads, and let them settle after its turn."""
    if count == 1:
        yield
    elif implementation.startswith(USES_BLAS):
        with threadpool_limits(count, user_api="blas"):
            yield
        time.sleep(SETTLE)
    else:
        yield
        time.sleep(SETTLE / 10)


def time_candidates(task: Task, candidates: Mapping[Any, Callable[[], object]]) -> dict[Any, list[float]]:
    """Return the seconds of each candidate's calls; a key's first part names the implementation."""
    with Progress(f"{task.case}, {task.setting}") as progress, threads.one_blas_thread():
        return interleaved(
            candidates,
            seconds=task.seconds,
            turn=TURN,
            around=lambda key: turn_of(key[0], task.threads),
            progress=progress,
        )


def measure_steps(task: Task, title: str, steps: Mapping[Key, Callable[[], object]], **setting: Any) -> list[Record]:
    """Time whole training steps, print how many times longer the dense ones take, and return the records."""
    samples = time_candidates(task, steps)
    median = {key: median_ms(taken) for key, taken in samples.items()}
    peers = [name for name in DENSE if (name, 0.0) in median]
    rows = [
        [name, f"{sparsity:g}", ms, *(median[peer, 0.0] / ms for peer in peers)]
        for (name, sparsity), ms in median.items()
    ]
    head = ["implementation", "sparsity", "ms", *(f"{peer} /" for peer in peers)]
    print_table(f"{title}, {task.setting}, BLAS kernels {blas_kernels()}", head, rows)
    setting["blas"] = blas_kernels()
    return [task.record(*key, median[key], len(samples[key]), **setting) for key in steps]


class Updater:
    """The end of our training step: gradients on the support, clipped together, and SGD.

    Parameters
    ----------
    params : Params
        Moved in place.
    optimizer : SGD
    lr : float
    clip : float
        Largest global norm; 0 does not clip.
    """

    def __init__(self, params: Params, optimizer: SGD, lr: float, clip: float = 0.0) -> None:
        self.params = params
        self.optimizer = optimizer
        self.lr = lr
        self.clip = clip
        self.slots = {name: optimizer.init(values_of(weight)) for name, weight in params.items()}
        self.done = 0

    def __call__(self, grads: Grads) -> None:
        """Take one step."""
        evaluated: dict[str, np.ndarray] = {}
        for name, gradient in grads.items():
            weight = self.params[name]
            if not isinstance(gradient, np.ndarray):
                gradient = gradient.on(weight.support) if isinstance(weight, SparseWeight) else gradient.dense()
            evaluated[name] = gradient
        scale = 1.0
        if self.clip:
            scale = clip_scale(global_norm(squared_norm(g) for g in evaluated.values()), self.clip)
        self.done += 1
        for name, gradient in evaluated.items():
            values, slots = values_of(self.params[name]), self.slots[name]
            self.optimizer.update(values, gradient, slots, lr=self.lr, step=self.done, scale=scale)
