"""The definition of the kernels on whole images: batch normalisation with what usually follows it, and the maximum over
windows.

Images (C, H, W, B) lie inside contiguous arrays (C, H + 2 m, W + 2 m, B) with a margin of m pixels, which may be 0. The
margin of what is read is not looked at; into that of what is written go zeros. No two arrays overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Images(Protocol):
    """Images inside a margin, such as ``refimpl.layers.padded.Padded``."""

    @property
    def whole(self) -> np.ndarray: ...

    @property
    def margin(self) -> int: ...


def inside(x: Images) -> np.ndarray:
    """Return the images without their margin, a view."""
    m = x.margin
    return x.whole[:, m:-m, m:-m] if m else x.whole


def write(images: np.ndarray, out: Images) -> None:
    """Write images, and zeros around them."""
    out.whole[...] = 0
    inside(out)[...] = images


def wide(dtype: Any) -> np.dtype[Any]:
    """Return the type that sums over a channel are formed in: float64, or complex128 where derivatives are checked."""
    return np.result_type(dtype, np.float64)


def scale_of(variance: np.ndarray, eps: float, dtype: Any) -> np.ndarray:
    r"""Return :math:`s = 1 / \sqrt{\sigma^2 + \epsilon}`, rounded once, to ``dtype``."""
    return (1 / np.sqrt(variance.astype(wide(variance.dtype)) + eps)).astype(dtype)


def _per_channel(a: np.ndarray) -> np.ndarray:
    return a[:, None, None, None]


def batch_norm(
    x: Images,
    gamma: np.ndarray,
    beta: np.ndarray,
    eps: float,
    out: Images,
    *,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
    add: Images | None = None,
    rectify: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Write :math:`y = \gamma s (x - \mu) + \beta`, plus what is to be added, and :math:`\max(y, 0)` if rectified.

    Parameters
    ----------
    x : Images
    gamma, beta : ndarray, shape (C,)
    eps : float
        In :math:`s = 1 / \sqrt{\sigma^2 + \epsilon}`.
    out : Images
    statistics : (ndarray, ndarray), optional
        Mean and variance of each channel; by default those of ``x`` itself, the variance without Bessel's correction.
    add : Images, optional
        What is added before the rectifier.
    rectify : bool
        NaN stays NaN, as in :func:`refimpl.kernels.spec.relu`.

    Returns
    -------
    mean, variance : ndarray, shape (C,)
        As given, or those of ``x`` in float64.
    """
    image, dtype = inside(x), out.whole.dtype
    if statistics is None:
        exact = image.astype(wide(image.dtype))
        mean = exact.mean(axis=(1, 2, 3))
        exact -= _per_channel(mean)
        statistics = mean, (exact * exact).mean(axis=(1, 2, 3))
    mean, variance = statistics
    slope = gamma * scale_of(variance, eps, dtype)
    y = (image - _per_channel(mean.astype(dtype))) * _per_channel(slope) + _per_channel(beta)
    if add is not None:
        y += inside(add)
    write(np.where(y.real <= 0, 0, y) if rectify else y, out)
    return statistics


def batch_norm_backward(
    dy: Images,
    x: Images,
    y: Images | None,
    mean: np.ndarray,
    scale: np.ndarray,
    gamma: np.ndarray,
    dx: Images | None,
    *,
    moving: bool,
    beta: np.ndarray | None = None,
    added: Images | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Write ``dx`` and return :math:`d\gamma` and :math:`d\beta`.

    With :math:`g = dy`, or 0 where a rectifier's output was 0, and :math:`\hat x = s (x - \mu)`,

    .. math:: d\beta = \sum_k g_k, \quad d\gamma = \sum_k g_k \hat x_k, \quad
        dx_k = \gamma s \left( g_k - \frac{d\beta}{n} - \hat x_k \frac{d\gamma}{n} \right),

    of which :math:`dx_k = \gamma s\, g_k` remains where mean and variance did not move with the batch.

    Parameters
    ----------
    dy, x : Images
    y : Images, optional
        The output, if it was rectified and something was added before.
    mean, scale, gamma : ndarray, shape (C,)
        :math:`\mu`, :math:`s` and :math:`\gamma`.
    dx : Images, optional
        None if it is not wanted.
    moving : bool
        Whether mean and variance were those of the batch.
    beta : ndarray, shape (C,), optional
        Of an output that was rectified and nothing added: its sign is then computed again.
    added : Images, optional
        Where :math:`g` is written, the gradient of what was added before the rectifier. Needs ``y``.

    Returns
    -------
    d_gamma, d_beta : ndarray, shape (C,)
    """
    g, image = inside(dy), inside(x)
    if y is not None:
        g = np.where(inside(y) <= 0, 0, g)
    elif beta is not None:
        again = (image - _per_channel(mean)) * _per_channel(gamma * scale) + _per_channel(beta)
        g = np.where(again <= 0, 0, g)
    if added is not None:
        write(g, added)
    exact = g.astype(wide(g.dtype))
    normalised = (image.astype(exact.dtype) - _per_channel(mean)) * _per_channel(scale)
    d_beta, d_gamma = exact.sum(axis=(1, 2, 3)), (exact * normalised).sum(axis=(1, 2, 3))
    if dx is not None:
        n = image[0].size
        if moving:
            exact = exact - _per_channel(d_beta / n) - normalised * _per_channel(d_gamma / n)
        write(_per_channel(gamma * scale) * exact, dx)
    return d_gamma.astype(gamma.dtype), d_beta.astype(gamma.dtype)


def max_pool(
    x: Images,
    out: Images,
    chosen: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    r"""Write the greatest number of each window, and which of its taps that is: of equal ones the first.

    Window :math:`(h, w)` sees the pixels :math:`(s_h h - p_h + i, s_w w - p_w + j)` at its taps :math:`(i, j)`, as far
    as there are such: one for each window at least. NaN counts as greater than all else, the last NaN above all.

    Parameters
    ----------
    x : Images
    out : Images
        Of shape (C, H', W', B).
    chosen : ndarray of unsigned int, shape (C, H', W', B)
        Gets the taps' numbers :math:`i k_w + j`, all below the greatest number of its type.
    kernel, stride, before : (int, int)
        :math:`k`, :math:`s` and :math:`p`, of the height and the width.
    """
    image = inside(x)
    best = np.full(chosen.shape, -np.inf, image.dtype)
    none = np.iinfo(chosen.dtype).max
    chosen[...] = none
    for tap, seen, pixels in _taps(image.shape, chosen.shape, kernel, stride, before):
        value = image[pixels]
        greater = (value > best[seen]) | np.isnan(value) | (chosen[seen] == none)
        best[seen] = np.where(greater, value, best[seen])
        chosen[seen] = np.where(greater, tap, chosen[seen])
    write(best, out)


def max_pool_backward(
    dy: Images,
    chosen: np.ndarray,
    dx: Images,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    r"""Write the gradient of the images: all of ``dy`` goes to the pixel that was chosen.

    Parameters
    ----------
    dy : Images
        Of the shape of ``chosen``.
    chosen : ndarray
    dx : Images
    kernel, stride, before : (int, int)
        As in :func:`max_pool`.
    """
    write(np.zeros((), dx.whole.dtype), dx)
    images, g = inside(dx), inside(dy)
    for tap, seen, pixels in _taps(images.shape, chosen.shape, kernel, stride, before):
        images[pixels] += np.where(chosen[seen] == tap, g[seen], 0)


Cut = tuple[slice, slice, slice]


def _taps(
    shape: tuple[int, ...],
    windows: tuple[int, ...],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> Iterator[tuple[int, Cut, Cut]]:
    """Yield each tap's number, the windows at which it is a pixel, and these pixels."""
    for tap, offsets in enumerate(np.ndindex(*kernel)):
        seen, pixels = [slice(None)], [slice(None)]
        for size, count, step, around, offset in zip(shape[1:3], windows[1:3], stride, before, offsets, strict=True):
            first = max(0, -(-(around - offset) // step))
            end = max(first, min(count, (size - 1 + around - offset) // step + 1))
            at = first * step - around + offset
            seen.append(slice(first, end))
            pixels.append(slice(at, at + (end - first - 1) * step + 1 if end > first else at, step))
        yield tap, (seen[0], seen[1], seen[2]), (pixels[0], pixels[1], pixels[2])
