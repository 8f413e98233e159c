"""Benchmarks: what a sparse training step costs beside a dense one.

    python tools/bench.py lstm --threads 1,2 --sparsity 0.67,0.9 --json lstm.json
    python tools/bench.py memory

Candidates of a table take turns in one process; medians and ratios are printed. Peers that are not installed are left
out and named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from timing import interleaved, median_ms

from refimpl.kernels import threads
from refimpl.layers import lstm
from refimpl.optim import SGD, clip_scale, global_norm, squared_norm
from refimpl.rng import generator
from refimpl.weights import Grads, Params, SparseWeight, Support, values_of

STEPS, BATCH = 35, 20
SPARSITIES = "0.5,0.67,0.8,0.9,0.95,0.98"
MODELS = "2x1500,2x650,2x200"


def lstm_params(size: int, layers: int, density: float | None) -> Params:
    """Return the weights of a stacked LSTM, dense if ``density`` is None."""
    params: Params = {}
    for k in range(layers):
        for name in lstm.names(k):
            rng = generator(0, name)
            shape = (4 * size, size) if "weight" in name else (4 * size,)
            bound = size**-0.5
            if len(shape) == 1 or density is None:
                params[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
            else:
                flat = np.sort(
                    rng.choice(shape[0] * shape[1], round(density * shape[0] * shape[1]), replace=False, shuffle=False)
                )
                support = Support(shape, flat)
                params[name] = SparseWeight(support, rng.uniform(-bound, bound, support.nnz).astype(np.float32))
    return params


def lstm_step(params: Params, layers: int, x: np.ndarray, dy: np.ndarray) -> Callable[[], None]:
    """Return a full training step: forward, backward, gradients on the support, clipping, SGD."""
    size = dy.shape[1]
    optimizer = SGD()
    zero = lstm.zero_state(size, BATCH, np.float32)

    def step() -> None:
        y, caches, grads = x, [], {}
        for k in range(layers):
            y, _, cache = lstm.forward(params, k, y, zero)
            caches.append(cache)
        back: Any = dy
        for k in reversed(range(layers)):
            back = lstm.backward(back, caches[k], grads)
        update(params, grads, optimizer)

    return step


def update(params: Params, grads: Grads, optimizer: SGD) -> None:
    """Clip the gradients together and take a step."""
    evaluated = {}
    for name, gradient in grads.items():
        weight = params[name]
        if not isinstance(gradient, np.ndarray):
            gradient = gradient.on(weight.support) if isinstance(weight, SparseWeight) else gradient.dense()
        evaluated[name] = gradient
    scale = clip_scale(global_norm(squared_norm(g) for g in evaluated.values()), 0.25)
    for name, gradient in evaluated.items():
        optimizer.update(values_of(params[name]), gradient * np.float32(scale), {}, lr=1e-3, step=1)


def torch_step(size: int, layers: int, x: np.ndarray, dy: np.ndarray, count: int) -> Callable[[], None] | None:
    """Return the same step in PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(count)
    model = torch.nn.LSTM(size, size, layers)
    inputs = torch.tensor(
        np.ascontiguousarray(x.transpose(0, 2, 1)), requires_grad=True
    )  # its gradient goes to the embedding
    outer = torch.tensor(np.ascontiguousarray(dy.transpose(0, 2, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        inputs.grad = None
        model(inputs)[0].backward(outer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def bench_lstm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a full training step of stacked LSTMs (batch 20, 35 steps), dense and at several sparsities."""
    records = []
    for model in args.models.split(","):
        layers, size = (int(part) for part in model.split("x"))
        rng = generator(0, "bench")
        x, dy = (rng.standard_normal((STEPS, size, BATCH)).astype(np.float32) for _ in range(2))
        dy *= np.float32(1e-4)
        for count in args.threads:
            threads.set_count(count)
            steps: dict[tuple[str, float], Callable[[], None]] = {}
            peer = torch_step(size, layers, x, dy, count)
            if peer is None:
                print("torch is not installed and left out (pip install 'refimpl[crosscheck]')")
            else:
                steps["torch-dense", 0.0] = peer
            steps["numpy-dense", 0.0] = lstm_step(lstm_params(size, layers, None), layers, x, dy)
            for sparsity in args.sparsity:
                steps["refimpl", sparsity] = lstm_step(lstm_params(size, layers, 1 - sparsity), layers, x, dy)
            with threads.one_blas_thread():
                samples = interleaved({str(key): call for key, call in steps.items()}, seconds=args.seconds)
            medians = {key: median_ms(samples[str(key)]) for key in steps}
            table = f"LSTM {model}, batch {BATCH}, {STEPS} steps, {count} thread{'s' * (count > 1)}"
            print_table(table, medians, ["torch-dense", "numpy-dense"])
            records += [
                {"case": f"lstm-{model}", "sparsity": sparsity, "threads": count, "implementation": name,
                 "median_ms": medians[name, sparsity], "samples": len(samples[str((name, sparsity))])}
                for name, sparsity in steps
            ]  # fmt: skip
    return records


def print_table(title: str, medians: dict[tuple[str, float], float], peers: list[str]) -> None:
    """Print the medians, and for each sparse step how many times longer the dense ones take."""
    present = [peer for peer in peers if (peer, 0.0) in medians]
    print(f"\n{title}")
    print(f"{'implementation':16}{'sparsity':>9}{'ms':>10}" + "".join(f"{peer + ' /':>16}" for peer in present))
    for (name, sparsity), ms in medians.items():
        ratios = "".join(f"{medians[peer, 0.0] / ms:16.2f}" for peer in present)
        print(f"{name:16}{sparsity:9.2f}{ms:10.2f}{ratios}", flush=True)


MEMORY_CHILD = """
import resource, sys, tracemalloc
import numpy as np
sys.path.insert(0, {folder!r})
import bench
from refimpl.kernels import memory
size, density = {size}, {density}
x, dy = (np.zeros((bench.STEPS, size, bench.BATCH), np.float32) for _ in range(2))
tiny = bench.lstm_step(bench.lstm_params(64, 1, density), 1, x[:, :64], dy[:, :64])
tiny()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tracemalloc.start()
params = bench.lstm_params(size, 1, density)
held = tracemalloc.get_traced_memory()[0]
tracemalloc.reset_peak()
step = bench.lstm_step(params, 1, x, dy)
step(); step()
peak = tracemalloc.get_traced_memory()[1]
print(held, peak, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024)
"""


def bench_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the memory of a training step of one LSTM layer, in a process of its own for each density."""
    size = 1500
    activations = (
        4 * STEPS * BATCH * size * (4 + 4 + 1 + 1 + 1 + 1 + 1 + 1)
    )  # gates, their gradients, x, dx, h, h_prev, c, dy
    print(
        f"one LSTM layer of {size} units, batch {BATCH}, {STEPS} steps, float32; "
        f"a dense weight takes {16 * size * size / 2**20:.0f} MiB"
    )
    print(
        f"{'density':>8}{'weights MiB':>13}{'peak MiB':>10}{'of which activations':>22}{'rest, bytes a non-zero':>24}"
    )
    records = []
    for density in (None, 0.5, 0.33, 0.1, 0.05, 0.02):
        code = MEMORY_CHILD.format(folder=str(Path(__file__).parent), size=size, density=density)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        held, peak, _ = (int(word) for word in out.split())
        nnz = 8 * size * size * (density or 1)
        rest = (peak - activations) / nnz
        print(
            f"{density or 1:8.2f}{held / 2**20:13.1f}{peak / 2**20:10.1f}{activations / 2**20:22.1f}{rest:24.1f}",
            flush=True,
        )
        records.append({"case": "memory-lstm-1500", "density": density or 1, "weights_bytes": held, "peak_bytes": peak})
    return records


def numbers(convert: type) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated numbers."""
    return lambda text: [convert(part) for part in text.split(",")]


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["lstm", "memory"])
    parser.add_argument("--threads", type=numbers(int), default="1,2", help="numbers of threads, such as 1,2")
    parser.add_argument("--sparsity", type=numbers(float), default=SPARSITIES)
    parser.add_argument("--models", default=MODELS, help="layers x units, such as 2x1500,2x650")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long each table is measured")
    parser.add_argument("--json", type=Path, help="write a list with one record a measurement")
    args = parser.parse_args()
    records = {"lstm": bench_lstm, "memory": bench_memory}[args.benchmark](args)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
