"""Benchmark ``memory``: what a training step of one LSTM layer holds, dense and at several sparsities."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
from bench_lstm import STEPS, LSTMStep, params_of
from bench_table import Progress, print_table
from bench_task import Record, Task

from refimpl.kernels import memory
from refimpl.weights import values_of

BATCH = 20
ARRAYS_OF_GATES, ARRAYS_OF_UNITS = 2, 6  # gates, their gradients; x, dx, h, h before, c, dy


def measure(task: Task) -> list[Record]:
    """Measure weights and peak of each density."""
    _, size = (int(part) for part in task.model.split("x"))
    batch = task.batch or BATCH
    x, dy = (np.zeros((STEPS, size, batch), np.float32) for _ in range(2))
    activations = STEPS * batch * size * 4 * (4 * ARRAYS_OF_GATES + ARRAYS_OF_UNITS)
    rows, records = [], []
    with Progress(f"{task.case}, {task.setting}") as progress:
        for sparsity in (0.0, *task.sparsity):
            progress(f"sparsity {sparsity:g}")
            LSTMStep(params_of(size, 1, 1 - sparsity), 1, x, dy)()  # what is imported and compiled is not counted
            gc.collect()
            memory.trim()  # blocks that wait in the pool would be used again without being counted
            tracemalloc.start()
            params = params_of(size, 1, 1 - sparsity)
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            step = LSTMStep(params, 1, x, dy)
            step()
            step()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            stored = sum(values_of(w).size for name, w in params.items() if "weight" in name)
            each = (peak - activations) / stored
            rows.append([f"{sparsity:g}", held / 2**20, peak / 2**20, activations / 2**20, each])
            own = {"case": task.case, "implementation": "refimpl", "sparsity": sparsity, "threads": task.threads}
            records.append({**own, "batch": batch, "nnz": stored, "weights_bytes": held, "peak_bytes": peak})
            del params, step
    print_table(
        f"one LSTM layer of {size} units, batch {batch}, {STEPS} steps, float32, MiB",
        ["sparsity", "weights", "peak", "of which activations", "rest, bytes a non-zero"],
        rows,
    )
    return records
