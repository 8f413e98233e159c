"""Calling compiled kernels: threads, and the time spent on compiling.

A kernel has two compiled forms. The parallel one hands its ``prange`` loops to threads, which takes two microseconds
even where there is but one; the serial one starts in half of one. A training step of a small network is twenty such
calls, so whatever runs on one thread runs in the serial form. Both give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import numba

from refimpl.kernels import threads
from refimpl.kernels.cpu import cache

_LAUNCHED = numba.get_num_threads()  # Numba launches as many threads as there are processors, and can mask some
threads.note_layer(numba.threading_layer())
_LEAST_COMPILE = 1e-3  # seconds: neither compiling nor loading from the cache takes less

compile_seconds = 0.0
"""Time that this process has spent on compiling kernels, or loading them from the cache."""


class Kernel:
    """A function and its compiled forms, each compiled when it is first called with new types.

    Parameters
    ----------
    function : callable
        What to compile. Its ``prange`` is Numba's.
    parallel : bool
        Whether there is a form for several threads.
    """

    __slots__ = ("_compiled", "name", "parallel", "serial")

    def __init__(self, function: Any, parallel: bool) -> None:
        self.name = function.__name__
        self.serial = _compile(_renamed(function, "serial") if parallel else function, parallel=False)
        self.parallel = _compile(function, parallel=True) if parallel else self.serial
        self._compiled = 0

    def note(self, took: float) -> None:
        """Count a call as compiling if there is more compiled code than before it."""
        global compile_seconds
        count = len(self.serial.overloads)
        if self.parallel is not self.serial:
            count += len(self.parallel.overloads)
        if count == self._compiled:
            return
        self._compiled = count
        compile_seconds += took


def kernel(function: Any = None, *, parallel: bool = True) -> Any:
    """Compile a function when it is first called with new types, and keep the code for later processes.

    Kernels do not raise: a division by zero gives what the processor gives.
    """
    if function is None:
        return partial(kernel, parallel=parallel)
    return Kernel(function, parallel)


def _compile(function: Callable[..., Any], parallel: bool) -> Any:
    return cache.keep(function, parallel=parallel, nogil=True, error_model="numpy")


def _renamed(function: FunctionType, suffix: str) -> FunctionType:
    """Return the same function under another name: compiled code goes by it, and must not be taken for another's."""
    twin = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__module__ = function.__module__
    twin.__qualname__ = f"{function.__qualname__}_{suffix}"
    return twin


def run(function: Kernel, *arguments: Any, alone: bool = False) -> Any:
    """Call a kernel on the threads that are set, and note what compiling it took.

    Parameters
    ----------
    function : Kernel
    *arguments
        The kernel's own.
    alone : bool
        Whether the work is too little, or in too few pieces, for a second thread.

    Returns
    -------
    object
        What the kernel returns.
    """
    if alone or threads.get() == 1:
        form = function.serial
    else:
        form = function.parallel
        count = min(threads.get(), _LAUNCHED)
        if numba.get_num_threads() != count:
            numba.set_num_threads(count)
    start = time.perf_counter()
    result = form(*arguments)
    took = time.perf_counter() - start
    if took > _LEAST_COMPILE:
        function.note(took)
    return result
