"""Calling compiled kernels: threads, and the time spent on compiling."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import numba

from refimpl.kernels import threads
from refimpl.kernels.cpu import cache

log = logging.getLogger("refimpl.kernels")

_LAUNCHED = numba.get_num_threads()  # Numba launches as many threads as there are processors, and can mask some

compile_seconds = 0.0
"""Time that this process has spent on compiling kernels, or loading them from the cache."""


def kernel(function: Any = None, *, parallel: bool = True) -> Any:
    """Compile a function when it is first called with new types, and keep the code for later processes."""
    if function is None:
        return partial(kernel, parallel=parallel)
    with cache.in_use():
        return numba.njit(parallel=parallel, nogil=True, cache=True)(function)


def run(function: Any, *arguments: Any) -> None:
    """Call a kernel on the threads that are set, and note what compiling it took."""
    global compile_seconds
    count = threads.get()
    if numba.get_num_threads() != count:
        numba.set_num_threads(min(count, _LAUNCHED))
    known = len(function.overloads)
    start = time.perf_counter()
    function(*arguments)
    if len(function.overloads) != known:
        took = time.perf_counter() - start
        compile_seconds += took
        if took > 0.5:
            log.info("compiled the kernel %s for a new width or type in %.1f s", function.__name__, took)
