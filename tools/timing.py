"""Timing on a noisy machine: candidates take turns in one process, and medians are compared, never single runs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 5.0, least: int = 5, warm: int = 2
) -> dict[str, list[float]]:
    """Return the seconds of each call: ``A B C A B C …`` for about ``seconds`` in all, ``least`` rounds at least.

    Each candidate is first called ``warm`` times: kernels compile, and caches and allocators settle.
    """
    for call in candidates.values():
        for _ in range(warm):
            call()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        while len(next(iter(samples.values()))) < least or time.perf_counter() - begin < seconds:
            for name, call in candidates.items():
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return samples


def median_ms(samples: list[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(samples)
