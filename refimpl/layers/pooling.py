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

from typing import NamedTuple

import numpy as np

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
    x: np.ndarray, kernel: int | Pair, *, stride: int | Pair | None = None, padding: Padding = 0
) -> tuple[np.ndarray, MaxCache]:
    """Return the greatest number of each window; a window that sees NaN gives NaN.

    Parameters
    ----------
    x : ndarray, shape (C, H, W, B)
    kernel, stride : int or (int, int)
        Of height and width.
    padding : int, (int, int) or ((int, int), (int, int))

    Returns
    -------
    y : ndarray, shape (C, H', W', B)
    cache : MaxCache

    Raises
    ------
    ValueError
        If the kernel is larger than the padded image, or the padding than half of the kernel.
    """
    windows = _windows(x, kernel, stride, padding)
    every = windows.whole(x.shape[1:3])
    padded = windows.pad(x, -np.inf)
    y = windows.tap(padded, 0, 0, *every).copy()
    chosen = np.empty(y.shape, np.min_scalar_type(len(windows.taps)))
    chosen[...] = _first_tap(windows, every)[..., None]  # where all are -inf, padding must not be chosen
    for k, (i, j) in enumerate(windows.taps):
        pixels = windows.tap(padded, i, j, *every)
        greater = (pixels > y) | np.isnan(pixels)
        np.copyto(y, pixels, where=greater)
        chosen[greater] = k
    return y, MaxCache(chosen, x.shape, windows)


def max_backward(dy: np.ndarray, cache: MaxCache) -> np.ndarray:
    """Return the gradient of ``x``."""
    windows = cache.windows
    every = windows.whole(cache.shape[1:3])
    d_padded = windows.zeros(cache.shape, dy.dtype)
    for k, (i, j) in enumerate(windows.taps):
        pixels = windows.tap(d_padded, i, j, *every)
        pixels += np.where(cache.chosen == k, dy, 0)
    return np.ascontiguousarray(windows.crop(d_padded))


def average_forward(
    x: np.ndarray,
    kernel: int | Pair,
    *,
    stride: int | Pair | None = None,
    padding: Padding = 0,
    count_include_pad: bool = True,
) -> tuple[np.ndarray, AverageCache]:
    """Return the mean of each window.

    Parameters
    ----------
    x : ndarray, shape (C, H, W, B)
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
    windows = _windows(x, kernel, stride, padding)
    every = windows.whole(x.shape[1:3])
    # Where padding does not count, each window is divided by what it sees of an image of ones.
    seen = windows.pad(np.ones((1, *x.shape[1:3], 1)), float(count_include_pad))
    counts = _sums(windows, seen, every)[0].astype(x.dtype)
    return _sums(windows, windows.pad(x), every) / counts, AverageCache(counts, x.shape, windows)


def average_backward(dy: np.ndarray, cache: AverageCache) -> np.ndarray:
    """Return the gradient of ``x``."""
    windows = cache.windows
    every = windows.whole(cache.shape[1:3])
    share = dy / cache.counts
    d_padded = windows.zeros(cache.shape, dy.dtype)
    for i, j in windows.taps:
        pixels = windows.tap(d_padded, i, j, *every)
        pixels += share
    return np.ascontiguousarray(windows.crop(d_padded))


def global_average_forward(x: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the mean of each image and channel, (C, H, W, B) to (C, B), and the shape that backward needs."""
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


def _first_tap(windows: Windows, every: tuple[slice, slice]) -> np.ndarray:
    """Return the number of each window's first tap that is not padding, (H', W')."""
    (top, _), (left, _) = windows.padding
    i = np.maximum(0, top - windows.stride[0] * np.arange(every[0].stop))
    j = np.maximum(0, left - windows.stride[1] * np.arange(every[1].stop))
    return i[:, None] * windows.kernel[1] + j
