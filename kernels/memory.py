"""A pool of aligned buffers: activations are allocated once and used again at every step.

Fresh pages cost more than the arithmetic done on them: a training step of a large LSTM that asks the operating system
for its activations anew spends a quarter of its time in page faults. Arrays from :func:`empty` return their memory to
the pool when the last view of them is gone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes: one cache line, and one AVX-512 vector
_CLASS_BITS = 3  # sizes are rounded up to 1/8 of a power of two, so that slightly shorter windows reuse the same blocks

_free: defaultdict[int, list[np.ndarray]] = defaultdict(list)


class _Lease:
    """Owner of one block while any array over it lives."""

    def __init__(self, block: np.ndarray, size_class: int) -> None:
        self.block = block
        self.size_class = size_class
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        _free[self.size_class].append(self.block)


def _size_class(nbytes: int) -> int:
    step = max(4096, 1 << max(nbytes.bit_length() - 1 - _CLASS_BITS, 0))
    return -(-nbytes // step) * step


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised C-ordered array whose first byte is 64-byte aligned."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    size_class = _size_class(max(nbytes, 1))
    waiting = _free[size_class]
    if waiting:
        block = waiting.pop()
    else:
        raw = np.empty(size_class + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        block = raw[start : start + size_class]
    return np.asarray(_Lease(block, size_class))[:nbytes].view(dtype).reshape(shape)


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an aligned array of zeros."""
    out = empty(shape, dtype)
    out[...] = 0
    return out


def is_aligned(array: np.ndarray) -> bool:
    """Tell whether an array starts on a cache line."""
    return array.ctypes.data % ALIGNMENT == 0


def trim() -> int:
    """Give all waiting blocks back to the operating system, and return how many bytes they held."""
    held = sum(size * len(blocks) for size, blocks in _free.items())
    _free.clear()
    return held
