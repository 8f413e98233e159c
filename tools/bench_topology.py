"""What a change of topology costs beside the training of the same layer: updates of RigL and of SET.

A layer of ten million places, 4000 x 2500, batch 128, SGD with momentum; an update drops 30 % of the entries. Counted
is everything that a step without an update does not do: the dense gradient (RigL), drop and growth, the new support,
carrying values and momentum, and what the kernels derive from the new support at the next step.
"""

from __future__ import annotations

import argparse
from time import perf_counter as now
from typing import Any

import numpy as np
from bench_table import print_table
from timing import interleaved, median_ms

from refimpl.kernels import threads
from refimpl.layers import linear
from refimpl.methods import SET, Allocation, RigL
from refimpl.methods.schedule import Constant
from refimpl.optim import SGD
from refimpl.rng import generator
from refimpl.weights import Grads, Params, ParamSpec, SparseWeight

ROWS, COLUMNS, BATCH = 4000, 2500, 128
DROP, INTERVAL, LR = 0.3, 100, 1e-4

Method = RigL | SET


class Layer:
    """A sparse linear layer that trains, with a method that exchanges its connections.

    Attributes
    ----------
    parts : dict of str to list of float
        Seconds that each part of each update took.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        support = method.supports({"w": ParamSpec("w", (ROWS, COLUMNS), "linear", True)}, seed=0)["w"]
        rng = generator(0, "bench")
        self.x = rng.standard_normal((COLUMNS, BATCH), np.float32)
        self.dy = rng.standard_normal((ROWS, BATCH), np.float32)
        self.params: Params = {"w": SparseWeight(support, rng.standard_normal(support.nnz, np.float32))}
        self.optimizer = SGD(0.9)
        self.slots = self.optimizer.init(self.weight.values)
        self.grads: Grads = {}
        self.count = 0
        self.parts: dict[str, list[float]] = {"exchange": [], "carry": [], "first step": []}

    @property
    def weight(self) -> SparseWeight:
        """The weight as it now is."""
        weight = self.params["w"]
        assert isinstance(weight, SparseWeight)
        return weight

    def step(self) -> None:
        """Take a whole training step of the layer."""
        self.count += 1
        _, cache = linear.forward(self.params, "w", None, self.x)
        self.grads = {}
        linear.backward(self.dy, cache, self.grads)
        gradient = self.grads["w"]
        assert not isinstance(gradient, np.ndarray)
        on_support = gradient.on(self.weight.support)
        self.optimizer.update(self.weight.values, on_support, self.slots, lr=LR, step=self.count)

    def gradient(self) -> None:
        """Evaluate the dense gradient block by block, as RigL's update does among other things."""
        gradient = self.grads["w"]
        assert not isinstance(gradient, np.ndarray)
        for _ in gradient.blocks():
            pass

    def update(self) -> None:
        """Exchange connections, and take the first step on the new support."""
        gradient = self.grads["w"]
        assert not isinstance(gradient, np.ndarray)
        times = [now()]
        exchange = self.method.exchange(self.params, step=self.count, seed=0, gradients={"w": gradient})["w"]
        times.append(now())
        values = exchange.carry(self.weight.values)
        rules = self.optimizer.carry_rules
        self.slots = {name: exchange.carry(slot, rules[name]) for name, slot in self.slots.items()}
        self.params["w"] = SparseWeight(exchange.new, values)
        times.append(now())
        self.step()
        times.append(now())
        for name, took in zip(self.parts, np.diff(times), strict=True):
            self.parts[name].append(float(took))


def bench_topology(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time updates beside steps for each number of threads and each sparsity, print a table, and return the records."""
    records = []
    before = threads.get()
    try:
        for count in args.threads:
            threads.set_count(count)
            rows = []
            for sparsity in args.sparsity:
                found = _measure(sparsity, args.seconds / max(1, len(args.sparsity)))
                records += [record | {"sparsity": sparsity, "threads": count} for record in found]
                rows += [_row(sparsity, record) for record in found[1:]]
            head = ["sparsity", "update", "step ms", "update ms", "in steps", "gradient", "drop, grow, support"]
            head += ["carry", "plan", f"% of {INTERVAL} steps"]
            title = f"topology {ROWS} x {COLUMNS}, batch {BATCH}, drop {DROP:g}, {count} threads"
            print_table(title, head, rows)
    finally:
        threads.set_count(before)
    return records


def _measure(sparsity: float, seconds: float) -> list[dict[str, Any]]:
    """Return the records of a step, of RigL's update, and of SET's."""
    layers = {
        "refimpl-rigl": Layer(RigL(Allocation(1 - sparsity), Constant(DROP))),
        "refimpl-set": Layer(SET(Allocation(1 - sparsity), Constant(DROP))),
    }
    trained = Layer(SET(Allocation(1 - sparsity), Constant(DROP)))
    for layer in (trained, *layers.values()):
        layer.step()
    calls = {"refimpl-step": trained.step, "gradient": trained.gradient}
    samples = interleaved({**calls, **{name: layer.update for name, layer in layers.items()}}, seconds=seconds, warm=2)
    step, gradient = median_ms(samples["refimpl-step"]), median_ms(samples["gradient"])
    case = {"case": f"topology-{ROWS}x{COLUMNS}"}
    records = [case | _record("refimpl-step", step, len(samples["refimpl-step"]))]
    for name, layer in layers.items():
        parts = {part: median_ms(took[2:]) for part, took in layer.parts.items()}  # without the warm ones
        parts["plan"] = max(0.0, parts.pop("first step") - step)
        total = sum(parts.values())
        if name == "refimpl-rigl":
            parts["gradient"] = min(gradient, parts["exchange"])
            parts["exchange"] -= parts["gradient"]
        records.append(
            case
            | _record(name, total, len(samples[name]))
            | {f"{part}_ms": ms for part, ms in parts.items()}
            | {"step_ms": step, "percent_of_training": 100 * total / (INTERVAL * step), "interval": INTERVAL}
        )
    return records


def _record(implementation: str, ms: float, samples: int) -> dict[str, Any]:
    return {"implementation": implementation, "median_ms": ms, "samples": samples, "batch": BATCH}


def _row(sparsity: float, record: dict[str, Any]) -> list[object]:
    parts = [record.get(f"{part}_ms") for part in ("gradient", "exchange", "carry", "plan")]
    step, total = record["step_ms"], record["median_ms"]
    name = record["implementation"].removeprefix("refimpl-")
    return [f"{sparsity:g}", name, step, total, total / step, *parts, record["percent_of_training"]]
