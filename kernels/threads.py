"""How many threads the kernels use, and keeping BLAS out of their way.

Results do not depend on the number: every output element is computed by one thread in one fixed order. BLAS is held to
one thread while ours run, because two pools of spinning threads on the same cores slow each other down by an order of
magnitude; large dense products are cut into fixed blocks that our threads share.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

log = logging.getLogger("refimpl.kernels")

SETTING = "REFIMPL_THREADS"
SLOW_LAYER = "workqueue"

_available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available() -> int:
    """Return the number of processors that this process may use."""
    return _available


def get() -> int:
    """Return the number of threads that kernels may use."""
    return _count


def set_count(count: int) -> None:
    """Set the number of threads; 0 takes all that the process may use.

    Raises
    ------
    ValueError
        If the number is negative.
    """
    global _count
    if count < 0:
        raise ValueError(f"the number of threads is {count}; give 1 or more, or 0 for all {_available} of this machine")
    _count = count or _available
    _warn_of_slow_layer()


def _count_from_environment() -> int:
    text = os.environ.get(SETTING) or "0"
    if not text.isdecimal():
        raise ValueError(f"{SETTING} is {text!r}; give 1 or more, or 0 for all {_available} of this machine")
    return int(text) or _available


_count = _count_from_environment()
_layer = ""  # not known before Numba has started its threads


def note_layer(name: str) -> None:
    """Take down which of its threading layers Numba has started, and warn once of the one that is slow to start."""
    global _layer
    _layer = name
    _warn_of_slow_layer()


_warned = False


def _warn_of_slow_layer() -> None:
    global _warned
    if _layer != SLOW_LAYER or _count == 1 or _warned:
        return
    _warned = True
    log.warning(
        "Numba found no threading layer but workqueue, which takes fifty times as long as the others to start threads "
        "and must not be used from two threads of Python at once; install GNU OpenMP (libgomp1), or pip install tbb, "
        "or run on one thread (%s=1)",
        SETTING,
    )


@lru_cache(maxsize=1)
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


_held = 0
_held_lock = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread; nested uses cost nothing.

    Of several threads of Python, the first to come holds it for all, until it leaves: what BLAS is told by one thread
    cannot be taken back by another.
    """
    global _held
    with _held_lock:
        _held += 1
        first = _held == 1
    try:
        with _blas().limit(limits=1) if first else nullcontext():
            yield
    finally:
        with _held_lock:
            _held -= 1


@lru_cache(maxsize=4)
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="refimpl")


def share(work: Callable[[int], None], items: Sequence[int] | range) -> None:
    """Call ``work``, which calls BLAS, on every item, on as many threads as are set.

    The items must not depend on each other.
    """

    def alone(item: int) -> None:
        with _blas().limit(limits=1):  # a BLAS on OpenMP has a limit for each thread that calls it
            work(item)

    if get() == 1 or len(items) < 2:
        for item in items:
            work(item)
    else:
        for _ in _pool(get()).map(alone, items):
            pass
