"""Images as the kernels on whole images take them: inside contiguous arrays, with a margin that may have no pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.kernels import memory
from refimpl.layers.padded import Padded


def framed_of(x: np.ndarray | Padded) -> Padded:
    """Return what is in a margin as it is, and other arrays with none, images or not.

    Arrays (C, ..., B) without rows and columns become images of a single one. A copy is made only of an array that is
    not contiguous.
    """
    if isinstance(x, Padded):
        return x
    whole = x if x.flags.c_contiguous else np.ascontiguousarray(x)
    return Padded(whole if x.ndim == 4 else whole.reshape(len(x), 1, 1, -1), 0)


def new_framed(shape: tuple[int, ...], dtype: Any, margin: int) -> Padded:
    """Return images with anything in them, and in the margin: kernels write both."""
    channels, height, width, batch = shape
    return Padded(memory.empty((channels, height + 2 * margin, width + 2 * margin, batch), dtype), margin)
