"""Timing on a noisy machine: candidates take turns in one process, and medians are compared, never single runs."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)


def interleaved(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    seconds: float = 5.0,
    least: int = 5,
    warm: int = 2,
    turn: float = 0.0,
    around: Callable[[Key], AbstractContextManager[Any]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[Key, list[float]]:
    """Return the seconds of each call: ``A B C A B C …`` for about ``seconds`` in all, ``least`` rounds at least.

    Each candidate is first called ``warm`` times: kernels compile, and caches and allocators settle.

    Parameters
    ----------
    candidates : mapping
        What to call, by name.
    turn : float
        Seconds for which a candidate is called again and again before the next one has its turn. The first call of a
        turn finds the caches full of another candidate's data, and is left out where others follow it.
    around : callable, optional
        Gives the context in which a candidate takes its turn, such as a number of BLAS threads. Not timed.
    progress : callable, optional
        Told what is being done.
    """
    enter: Callable[[Key], AbstractContextManager[Any]] = around or (lambda name: nullcontext())
    tell = progress or (lambda text: None)
    for number, (name, call) in enumerate(candidates.items(), 1):
        tell(f"first calls, {number} of {len(candidates)}: {name}")
        with enter(name):
            for _ in range(warm):
                call()
    samples: dict[Key, list[float]] = {name: [] for name in candidates}
    rounds = 0
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    try:
        while rounds < least or time.perf_counter() - begin < seconds:
            rounds += 1
            for name, call in candidates.items():
                tell(f"round {rounds}, {time.perf_counter() - begin:.0f} of {seconds:.0f} s")
                with enter(name):
                    samples[name] += _turn(call, turn)
    finally:
        gc.enable()
    return samples


def _turn(call: Callable[[], object], seconds: float) -> list[float]:
    took: list[float] = []
    begin = start = time.perf_counter()
    while not took or start - begin < seconds:
        call()
        end = time.perf_counter()
        took.append(end - start)
        start = end
    return took[1:] or took


def median_ms(samples: list[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(samples)
