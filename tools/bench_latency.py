"""What starting costs: seconds from the start of a process until something is imported, or a first step is done.

The first step of all, on a machine that has compiled no kernel yet (``cold``: an empty folder for them), and
that of every later process (``warm``). The interpreter's own start is in all of them, and stands beside them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_table import print_table
from timing import median_ms

WARM_SAMPLES = 7

IMPORTS = {
    "python": "",
    "refimpl-import": "import refimpl, refimpl.kernels",
    "refimpl-command-line": "import refimpl.cli.arguments; refimpl.cli.arguments.make_parser()",
    "refimpl-compiled-kernels": "import refimpl.kernels.cpu",
}

MODELS = {
    "language model 2x200, vocabulary 10,000": """
import numpy as np
from refimpl.methods import Allocation, Selfish
from refimpl.models.language_model import LanguageModel
from refimpl.optim import SGD
from refimpl.training.trainer import Trainer
trainer = Trainer.begin(
    LanguageModel(10_000, 200, 200, 2), Selfish(Allocation({density}), 0.5, total_steps=1000), SGD(),
    lambda step, epoch: 1.0, batch=20, dtype=np.float32, seed=0, clip=0.25,
)
trainer.step(*np.random.default_rng(0).integers(0, 10_000, (2, 35, 20)).astype(np.int32))
""",
    "LSTM layer of 650": """
import numpy as np
from refimpl.layers import lstm
from refimpl.rng import generator
from refimpl.weights import SparseWeight, Support, values_of
size, rng, params, grads = 650, generator(0, "latency"), {{}}, {{}}
for name in lstm.names(0):
    if "weight" in name:
        support = Support.from_mask(rng.random((4 * size, size)) < {density})
        params[name] = SparseWeight(support, rng.uniform(-0.04, 0.04, support.nnz).astype(np.float32))
    else:
        params[name] = np.zeros(4 * size, np.float32)
x = rng.standard_normal((35, size, 20)).astype(np.float32)
y, _, cache = lstm.forward(params, 0, x, lstm.zero_state(size, 20, np.float32))
lstm.backward(y, cache, grads)
for name, weight in params.items():
    gradient = grads[name]
    dense = isinstance(gradient, np.ndarray)
    values_of(weight)[...] -= np.float32(0.1) * (gradient if dense else gradient.on(weight.support))
""",
}


def seconds_until_done(code: str, threads: int, cache: Path) -> float:
    """Start a process, and return the seconds until it has run the code; its end does not count."""
    environment = os.environ | {"REFIMPL_THREADS": str(threads), "REFIMPL_CACHE": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint('done', flush=True)"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        took = time.perf_counter() - start
        _, said = process.communicate()
    if line != "done\n":
        raise RuntimeError(f"the process that was to be timed failed: {said}")
    return took


def bench_latency(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time imports and first steps, for each number of threads in ``args.threads``.

    Returns
    -------
    list of dict
        ``case`` ("latency"), ``implementation``, ``model``, ``sparsity``, ``threads``, ``median_ms`` and ``samples``.
    """
    density = 1 - float(args.sparsity[0])
    records = []
    for threads in args.threads:
        samples: dict[tuple[str, str], list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="refimpl-latency-") as folder:
            for number, (model, template) in enumerate(MODELS.items()):
                code, cache = template.format(density=density), Path(folder, str(number))
                samples["refimpl-first-step-cold", model] = [seconds_until_done(code, threads, cache)]
            for _ in range(WARM_SAMPLES):  # in turns: a disturbance hits all alike
                for name, code in IMPORTS.items():
                    took = seconds_until_done(code, threads, Path(folder, "0"))
                    samples.setdefault((name, ""), []).append(took)
                for number, (model, template) in enumerate(MODELS.items()):
                    took = seconds_until_done(template.format(density=density), threads, Path(folder, str(number)))
                    samples.setdefault(("refimpl-first-step-warm", model), []).append(took)
        rows = [(name, model, median_ms(times), len(times)) for (name, model), times in samples.items()]
        title = f"latency, {threads} thread{'s' * (threads > 1)}: from the start of a process"
        print_table(title, ("until", "model", "ms", "samples"), rows)
        records += [
            {"case": "latency", "implementation": name, "model": model, "sparsity": 1 - density if model else None,
             "threads": threads, "median_ms": ms, "samples": count}
            for name, model, ms, count in rows
        ]  # fmt: skip
    return records
