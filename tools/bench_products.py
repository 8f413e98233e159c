"""Benchmark ``products``: forward, input gradient and weight gradient of one linear layer.

Activations are given to us in our panels, as they are inside a net, and to each peer in the layout that suits it best.
What a peer's layer costs is the sum of its products; ours computes the two backward products at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from bench_csr import PEERS, Calls, dense_products, torch_dense
from bench_steps import blas_kernels, time_candidates
from bench_table import print_table
from bench_task import Record, Task
from timing import median_ms

from refimpl import kernels
from refimpl.methods.random_support import exact_support
from refimpl.rng import generator
from refimpl.weights import SparseWeight

PRODUCTS = ("forward", "input-gradient", "weight-gradient", "backward")
HEAD = ["implementation", "sparsity", "forward", "dX", "dW", "dX and dW", "layer"]

Key = tuple[str, float, str, str]
"""Implementation, sparsity, product, layout."""

Medians = dict[str, tuple[float, int]]
"""Milliseconds and number of samples, by product."""


def measure(task: Task) -> list[Record]:
    """Time the products of one shape and batch."""
    rows, columns = (int(part) for part in task.model.split("x"))
    rng = generator(0, "bench")
    x = rng.standard_normal((columns, task.batch)).astype(np.float32)
    dy = rng.standard_normal((rows, task.batch)).astype(np.float32)
    samples = time_candidates(task, candidates(task, rows, columns, x, dy))

    found: dict[tuple[str, float], Medians] = {}
    for (name, sparsity, product, _), taken in samples.items():
        ms = median_ms(taken)
        products = found.setdefault((name, sparsity), {})
        if product not in products or ms < products[product][0]:  # of two layouts the faster
            products[product] = (ms, len(taken))
    for products in found.values():
        total = layer(products)
        if total is not None:
            products["layer"] = (total, min(count for _, count in products.values()))
    show(task, found)
    setting = {"batch": task.batch, "rows": rows, "columns": columns, "blas": blas_kernels()}
    return [
        {**task.record(name, sparsity, ms, count, product=product, **setting), "case": f"{task.case}-b{task.batch}"}
        for (name, sparsity), products in found.items()
        for product, (ms, count) in products.items()
    ]


def candidates(
    task: Task, rows: int, columns: int, x: np.ndarray, dy: np.ndarray
) -> dict[Key, Callable[[], object]]:  # fmt: skip
    """Return everything that is timed."""
    out: dict[Key, Callable[[], object]] = {}

    def add(name: str, sparsity: float, calls: Calls, layout: str = "") -> None:
        out.update({(name, sparsity, product, layout): call for product, call in calls.items()})

    dense = generator(0, "dense").standard_normal((rows, columns)).astype(np.float32)
    for layout, calls in dense_products(dense, x, dy).items():
        add("numpy-dense", 0.0, calls, layout)
    if "torch" in task.peers:
        add("torch-dense", 0.0, torch_dense(dense, x, dy))
    for sparsity in task.sparsity:
        rng = generator(0, f"support/{sparsity}")
        support = exact_support((rows, columns), max(1, round((1 - sparsity) * rows * columns)), rng)
        w = SparseWeight(support, rng.standard_normal(support.nnz).astype(np.float32))
        add("refimpl", sparsity, ours(w, x, dy))
        for name, (package, products) in PEERS.items():
            if not package or package in task.peers:
                add(name, sparsity, products(w, x, dy))
    return out


def ours(w: SparseWeight, x: np.ndarray, dy: np.ndarray) -> Calls:
    """Return our products, of activations in panels."""
    xp, dyp = kernels.to_panels(x[None]), kernels.to_panels(dy[None])
    return {
        "forward": lambda: kernels.matmul(w, xp),
        "input-gradient": lambda: kernels.matmul_t(w, dyp),
        "weight-gradient": lambda: kernels.sddmm(w.support, dyp, xp),
        "backward": lambda: kernels.matmul_t_sddmm(w, dyp, xp),
    }


def backward(products: Medians) -> list[float]:
    """Return what the backward products cost: one after the other, and both at once, as far as there are such."""
    ms = {name: value for name, (value, _) in products.items()}
    apart = [ms["input-gradient"] + ms["weight-gradient"]] if {"input-gradient", "weight-gradient"} <= set(ms) else []
    return apart + [ms[name] for name in ("backward",) if name in ms]


def layer(products: Medians) -> float | None:
    """Return what a layer costs, both backward products at once where a library has that; None if one is missing."""
    back = backward(products)
    return products["forward"][0] + back[-1] if back and "forward" in products else None


def best(found: Mapping[tuple[str, float], Medians], peers: Iterable[str], sparsity: float) -> float | None:
    """Return the cost of a layer of which each product is taken from the fastest of several peers."""
    fastest: Medians = {}
    for peer in peers:
        for product, value in found.get((peer, sparsity), {}).items():
            if product in PRODUCTS:
                fastest[product] = min(value, fastest.get(product, value))
    back = backward(fastest)
    return fastest["forward"][0] + min(back) if back and "forward" in fastest else None


def show(task: Task, found: Mapping[tuple[str, float], Medians]) -> None:
    """Print milliseconds by product, and how many times longer the best dense and the best CSR products take."""
    rows = []
    for (name, sparsity), products in found.items():
        rows.append([name, f"{sparsity:g}", *(products[p][0] if p in products else None for p in (*PRODUCTS, "layer"))])
    title = f"linear layer {task.model}, batch {task.batch}, {task.setting}, BLAS kernels {blas_kernels()}, ms"
    print_table(title, HEAD, rows)
    ratios: list[list[Any]] = []
    for sparsity in task.sparsity:
        mine = found["refimpl", sparsity]["layer"][0]
        dense, csr = best(found, ("numpy-dense", "torch-dense"), 0.0), best(found, PEERS, sparsity)
        ratios.append([f"{sparsity:g}", *(None if other is None else other / mine for other in (dense, csr))])
    print_table(
        "the layer, times longer than ours (of each product the fastest)",
        ["sparsity", "best dense /", "best CSR /"],
        ratios,
    )
