"""How many threads the kernels use, and keeping BLAS out of their way.

Results do not depend on the number: every output element is computed by one thread in one fixed order. BLAS is held to
one thread while ours run, because two pools of spinning threads on the same cores slow each other down by an order of
magnitude; large dense products are cut into fixed blocks that our threads share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache

from threadpoolctl import ThreadpoolController

_available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_count = int(os.environ.get("REFIMPL_THREADS", "0")) or _available
_blas_held = 0


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


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread; nested uses cost nothing."""
    global _blas_held
    _blas_held += 1
    try:
        if _blas_held > 1:
            yield
        else:
            with _blas().limit(limits=1):
                yield
    finally:
        _blas_held -= 1


@lru_cache(maxsize=4)
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="refimpl")


def share(work: Callable[[int], None], items: Sequence[int] | range) -> None:
    """Call ``work`` on every item, on as many threads as are set. The items must not depend on each other."""
    if get() == 1 or len(items) < 2:
        for item in items:
            work(item)
    else:
        for _ in _pool(get()).map(work, items):
            pass
