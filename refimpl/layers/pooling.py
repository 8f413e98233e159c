r"""Pooling: each channel's windows become one number each, their greatest or their mean.

*Maximum.* :math:`y = \max_{ij} x[i, j]` over the taps of a window (see :mod:`refimpl.layers.windows`); padding counts
for less than any number. All of :math:`dy` goes to the pixel that was chosen: of equal ones the first, row by row.

*Average.* :math:`y = \frac1k \sum_{ij} x[i, j]`, and each pixel gets :math:`dy / k` from every window that sees it.
:math:`k` is the number of taps, padding included, which then counts as zeros; or the number of pixels that are not
padding.

*Global average.* The mean of a whole image, (C, H, W, B) to (C, B); each pixel gets :math:`dy / (HW)`.

Images are (channels, height, width, batch). As in PyTorch the stride is the kernel's size if it is not given, and
padding is half of the kernel's size at most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.kernels import images, memory
from refimpl.layers.padded import Padded, image_of
from refimpl.layers.windows import Padding, Pair, Windows, check_images


class MaxCache(NamedTuple):
    """What backward of the maximum needs."""

    chosen: np.ndarray  # (C, H', W', B): number of the tap that was the greatest
    shape: tuple[int, ...]  # of the input
    windows: Windows


class AverageCache(NamedTuple):
    """What backward of the average needs."""

    counts: np.ndarray  # (H', W', 1): by how much the sum over each window was divided
    shape: tuple[int, ...]  # of the input
    windows: Windows


def max_forward(
    x: np.ndarray | Padded,
    kernel: int | Pair,
    *,
    stride: int | Pair | None = None,
    padding: Padding = 0,
    margin: int = 0,
) -> tuple[Any, MaxCache]:
    """Return the greatest number of each window; a window that sees NaN gives NaN.

    Parameters
    ----------
    x : ndarray or Padded, shape (C, H, W, B)
        Its margin is not looked at.
    kernel, stride : int or (int, int)
        Of height and width.
    padding : int, (int, int) or ((int, int), (int, int))
    margin : int
        Pixels of zeros to write the output into.

    Returns
    -------
    y : ndarray, or Padded with a margin, shape (C, H', W', B)
    cache : MaxCache

    Raises
    ------
    ValueError
        If the kernel is larger than the padded image, or the padding than half of the kernel.
    """
    windows = _windows(image_of(x), kernel, stride, padding)
    framed = Padded.of(x)
    channels, height, width, batch = framed.shape
    shape = (channels, *windows.size((height, width)), batch)
    out = Padded.unfilled(shape, framed.dtype, margin)
    chosen = memory.empty(shape, np.min_scalar_type(len(windows.taps)))
    images.max_pool(framed, out, chosen, windows.kernel, windows.stride, _before(windows))
    return out if margin else out.whole, MaxCache(chosen, framed.shape, windows)


def max_backward(dy: np.ndarray | Padded, cache: MaxCache, *, margin: int = 0) -> Any:
    """Return the gradient of ``x``, an array or, with a margin, a Padded."""
    windows, framed = cache.windows, Padded.of(dy)
    out = Padded.unfilled(cache.shape, framed.dtype, margin)
    images.max_pool_backward(framed, cache.chosen, out, windows.kernel, windows.stride, _before(windows))
    return out if margin else out.whole


def average_forward(
    x: np.ndarray | Padded,
    kernel: int | Pair,
    *,
    stride: int | Pair | None = None,
    padding: Padding = 0,
    count_include_pad: bool = True,
) -> tuple[np.ndarray, AverageCache]:
    """Return the mean of each window.

    Parameters
    ----------
    x : ndarray or Padded, shape (C, H, W, B)
        Its margin is not looked at.
    kernel, stride : int or (int, int)
        Of height and width.
    padding : int, (int, int) or ((int, int), (int, int))
    count_include_pad : bool
        Whether padding counts as zeros; otherwise the mean is that of the pixels.

    Returns
    -------
    y : ndarray, shape (C, H', W', B)
    cache : AverageCache

    Raises
    ------
    ValueError
        If the kernel is larger than the padded image, or the padding than half of the kernel.
    """
    x = image_of(x)
    windows = _windows(x, kernel, stride, padding)
    every = windows.whole(x.shape[1:3])
    # Where padding does not count, each window is divided by what it sees of an image of ones.
    seen = windows.pad(np.ones((1, *x.shape[1:3], 1)), float(count_include_pad))
    counts = _sums(windows, seen, every)[0].astype(x.dtype)
    return _sums(windows, windows.pad(x), every) / counts, AverageCache(counts, x.shape, windows)


def average_backward(dy: np.ndarray | Padded, cache: AverageCache) -> np.ndarray:
    """Return the gradient of ``x``."""
    windows, dy = cache.windows, image_of(dy)
    every = windows.whole(cache.shape[1:3])
    share = dy / cache.counts
    d_padded = windows.zeros(cache.shape, dy.dtype)
    for i, j in windows.taps:
        pixels = windows.tap(d_padded, i, j, *every)
        pixels += share
    return np.ascontiguousarray(windows.crop(d_padded))


def global_average_forward(x: np.ndarray | Padded) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the mean of each image and channel, (C, H, W, B) to (C, B), and the shape that backward needs."""
    x = image_of(x)
    check_images(x)
    return x.mean(axis=(1, 2)), x.shape


def global_average_backward(dy: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the gradient of ``x``, shape (C, H, W, B)."""
    share = dy / (shape[1] * shape[2])
    return np.ascontiguousarray(np.broadcast_to(share[:, None, None], shape))


def _windows(x: np.ndarray, kernel: int | Pair, stride: int | Pair | None, padding: Padding) -> Windows:
    check_images(x)
    windows = Windows.of(kernel, kernel if stride is None else stride, padding)
    if any(2 * n > k for k, around in zip(windows.kernel, windows.padding, strict=True) for n in around):
        raise ValueError(
            f"padding is {padding} and the kernel {kernel}; pooling takes at most half of the kernel's size as "
            "padding, so that no window sees nothing else"
        )
    windows.size(x.shape[1:3])
    return windows


def _sums(windows: Windows, padded: np.ndarray, every: tuple[slice, slice]) -> np.ndarray:
    total = windows.tap(padded, 0, 0, *every).copy()
    for i, j in windows.taps[1:]:
        total += windows.tap(padded, i, j, *every)
    return total


def _before(windows: Windows) -> Pair:
    """Return the padding above and to the left."""
    return windows.padding[0][0], windows.padding[1][0]
