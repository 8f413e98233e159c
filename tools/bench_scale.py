"""Benchmark ``scale``: multilayer perceptrons as wide as in the SET papers, with time and memory for each non-zero.

Three hidden layers of n neurons on 3,312 inputs and 5 classes; Erdős–Rényi supports with ε = 20, that is of density
20 (rows + columns) / (rows · columns), at most 1; SGD with momentum; SET's exchange at the end of each epoch. Each size
has a process of its own, whose peak memory is read.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_mlp import LR, MOMENTUM, MLPStep
from bench_table import Progress, print_table
from bench_task import Record, Task
from timing import median_ms

from refimpl.kernels import threads
from refimpl.methods import SET, Allocation
from refimpl.models.mlp import MLP
from refimpl.rng import generator
from refimpl.weights import Params, SparseWeight, values_of

INPUTS, CLASSES, HIDDEN = 3312, 5, 3
EPSILON, DROP_FRACTION = 20, 0.3
STEPS_BETWEEN = 5
NOTE = (
    "For comparison, quoted and not measured here: the SET authors' SciPy and Cython code, in float64, is said to take "
    "4.7 ms and 34 ms a step, 0.31 s and 3.5 s an exchange, at 3,000 and 30,000 neurons on two such cores."
)


def density(rows: int, columns: int) -> float:
    """Return the density of a layer of the Erdős–Rényi graph."""
    return min(1.0, EPSILON * (rows + columns) / (rows * columns))


def measure(task: Task) -> list[Record]:
    """Time steps and exchanges of one size, and read the peak memory."""
    neurons = int(task.model)
    with Progress(f"{task.case}, batch {task.batch}, {task.setting}") as progress, threads.one_blas_thread():
        Training(50, task.batch).epoch()  # what is imported and compiled is not counted
        base = forget_peak()
        progress("drawing supports")
        training = Training(neurons, task.batch)
        took: dict[str, list[float]] = {"step": [], "exchange": [], "step after": []}
        for _ in range(2):
            timed(training.step)
        training_peak = peak_bytes()
        begin = time.perf_counter()
        while not took["step"] or time.perf_counter() - begin < task.seconds:
            progress(f"epoch {len(took['exchange']) + 1}")
            took["step"] += [timed(training.step) for _ in range(STEPS_BETWEEN)]
            took["exchange"].append(timed(training.exchange))
            took["step after"].append(timed(training.step))  # builds the kernels' plans of the new supports
        peak = peak_bytes()
    median = {part: median_ms(samples) for part, samples in took.items()}
    rebuild = max(0.0, median["step after"] - median["step"])
    nnz, size = training.nnz, sum(spec.size for spec in training.model.specs().values() if spec.prunable)
    each = (peak - base) / nnz
    print_table(
        f"MLP {'-'.join(map(str, training.model.sizes))}, ε = {EPSILON}, batch {task.batch}, float32, {task.setting}",
        ["non-zeros", "step, ms", "exchange, ms", "and new plans, ms", "peak, MiB", "of which before exchanges",
         "bytes a non-zero"],
        [[f"{nnz:,}", median["step"], median["exchange"], rebuild, peak / 2**20, training_peak / 2**20, each]],
        NOTE,
    )  # fmt: skip
    median["rebuild"], took["rebuild"] = rebuild, took.pop("step after")
    setting: dict[str, Any] = {"batch": task.batch, "nnz": nnz, "peak_bytes": peak, "bytes_per_nonzero": round(each, 1)}
    return [
        task.record("refimpl", 1 - nnz / size, median[part], len(took[part]), part=part, **setting)
        for part in ("step", "exchange", "rebuild")
    ]


class Training:
    """A network, its method and its optimizer."""

    def __init__(self, neurons: int, batch: int) -> None:
        self.model = MLP((INPUTS, *[neurons] * HIDDEN, CLASSES))
        specs = self.model.specs()
        fixed = {name: density(*spec.shape) for name, spec in specs.items() if spec.prunable}
        self.method = SET(Allocation(1.0, "er", fixed), DROP_FRACTION)
        params: Params = self.model.init(0, np.float32, self.method.supports(specs, seed=0))
        rng = generator(0, "bench")
        x = rng.standard_normal((INPUTS, batch)).astype(np.float32)
        self.step = MLPStep(self.model, params, x, rng.integers(CLASSES, size=batch), LR, MOMENTUM)

    @property
    def nnz(self) -> int:
        """Number of stored weights, without biases."""
        return sum(values_of(w).size for name, w in self.step.params.items() if name.endswith("weight"))

    def exchange(self) -> None:
        """Drop and grow in all layers, and carry values and momentum across."""
        update = self.step.update
        exchanges = self.method.exchange(self.step.params, step=update.done, seed=0)
        rules = update.optimizer.carry_rules
        for name in list(exchanges):
            exchange = exchanges.pop(name)
            weight = self.step.params[name]
            assert isinstance(weight, SparseWeight)
            values = exchange.carry(weight.values, self.method.conventions.value_rule)
            self.step.params[name] = SparseWeight(exchange.new, values)
            for slot, rule in rules.items():
                update.slots[name][slot] = exchange.carry(update.slots[name][slot], rule)

    def epoch(self) -> None:
        """Take a step, exchange, and take another."""
        self.step()
        self.exchange()
        self.step()


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forget_peak() -> int:
    """Forget the peak of what was done so far, where the system can, and return the memory from which to count."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return peak_bytes()
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had.

    Linux keeps it for the process alone; the number of ``getrusage`` may be that of the process that started this one.
    """
    peak = _status("VmHWM")
    if peak or sys.platform == "win32":
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    """Return a number of bytes from the process's status, 0 where there is none."""
    try:
        return int(Path("/proc/self/status").read_text("utf-8").partition(f"{field}:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
