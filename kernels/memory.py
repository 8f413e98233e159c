"""A pool of aligned buffers: activations are allocated once and used again at every step.

Fresh pages cost more than the arithmetic done on them: a training step of a large LSTM that asks the operating system
for its activations anew spends a quarter of its time in page faults. Arrays from :func:`empty` return their memory to
the pool when the last view of them is gone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes: one cache line, and one AVX-512 vector
_CLASS_BITS = 3  # sizes are rounded up to 1/8 of a power of two, so that slightly shorter windows reuse the same blocks
_BYTE = np.dtype(np.uint8)

_free: defaultdict[int, list[np.ndarray]] = defaultdict(list)


# NumPy lets a view refer to the owner of its memory instead of the view it was made from, but only past views of its
# own type. Two types of our own end that chain at the lease, which therefore lives as long as any array over it.


class _Block(np.ndarray[Any, Any]):
    """Aligned bytes of one size class."""


class _Lease(np.ndarray[Any, Any]):
    """The bytes of a block that are in use: owner of the block while any array over it lives."""

    def __del__(self) -> None:
        block = self.base
        if type(block) is _Block:
            _free[block.nbytes].append(block)


@lru_cache(maxsize=1 << 12)
def _size_class(nbytes: int) -> int:
    step = max(4096, 1 << max(nbytes.bit_length() - 1 - _CLASS_BITS, 0))
    return -(-nbytes // step) * step


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised C-ordered array whose first byte is 64-byte aligned."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    size_class = _size_class(nbytes or 1)
    waiting = _free[size_class]
    if waiting:
        block = waiting.pop()
    else:
        raw = np.empty(size_class + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        block = raw[start : start + size_class].view(_Block)
    return np.ndarray(shape, dtype, _Lease(nbytes, _BYTE, block))


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an aligned array of zeros."""
    out = empty(shape, dtype)
    out[...] = 0
    return out


def is_aligned(array: np.ndarray) -> bool:
    """Tell whether an array starts on a cache line."""
    base = array.base
    if type(base) is np.ndarray:  # a view of one of ours
        base = base.base
    if type(base) is _Lease and array.nbytes == base.nbytes and array.flags.c_contiguous:
        return True  # all of a lease: true without the address, which takes NumPy a microsecond to tell
    return array.ctypes.data % ALIGNMENT == 0


def trim() -> int:
    """Give all waiting blocks back to the operating system, and return how many bytes they held."""
    held = sum(size * len(blocks) for size, blocks in _free.items())
    _free.clear()
    return held
