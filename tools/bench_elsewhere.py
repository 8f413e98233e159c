"""Benchmarks that bring their own tables: ``topology`` and ``latency``."""

from __future__ import annotations

import argparse
from importlib import import_module

from bench_task import Record, Task


def measure(task: Task) -> list[Record]:
    """Call ``bench_topology.bench_topology`` or ``bench_latency.bench_latency``."""
    args = argparse.Namespace(
        threads=[task.threads], sparsity=list(task.sparsity), seconds=task.seconds, peers=task.peers
    )  # fmt: skip
    name = f"bench_{task.benchmark}"
    return getattr(import_module(name), name)(args)
