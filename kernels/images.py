"""Kernels on whole images: the choice between their definition and the compiled ones, and the checks of both.

See :mod:`refimpl.kernels.spec_images` for what each does.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np

from refimpl import kernels
from refimpl.kernels import spec, spec_images
from refimpl.kernels.spec_images import Images, scale_of

_COMPILED = (np.dtype(np.float32), np.dtype(np.float64))
_BYTE = np.dtype(np.uint8)


def _tier(name: str, arrays: list[np.ndarray]) -> ModuleType:
    """Return the module that computes something of some arrays: the definition where their types differ."""
    dtype = arrays[0].dtype
    if kernels.tier() is spec or dtype not in _COMPILED or not arrays[0].size:
        return spec_images
    for array in arrays:
        if array.dtype != dtype:
            return spec_images
    return import_module(f"refimpl.kernels.cpu.{name}")


def _wholes(shape: tuple[int, ...], *images: Images | None) -> list[np.ndarray]:
    """Return the arrays around images, checked: ValueError unless they are contiguous and the images of one shape."""
    out = []
    for each in images:
        if each is None:
            continue
        whole, around = each.whole, 2 * each.margin
        channels, height, width, batch = shape
        expected = (channels, height + around, width + around, batch)
        if whole.shape != expected or not whole.flags.c_contiguous or around < 0:
            raise ValueError(
                f"got an array of shape {whole.shape} for images of shape {shape} with a margin of {each.margin}; it "
                f"must be contiguous, of shape {expected}"
            )
        out.append(whole)
    return out


def _shape(x: Images) -> tuple[int, int, int, int]:
    """Return the shape of images without their margin."""
    if x.whole.ndim != 4:
        raise ValueError(f"got an array of shape {x.whole.shape}; images are (channels, height, width, batch)")
    channels, height, width, batch = x.whole.shape
    return channels, height - 2 * x.margin, width - 2 * x.margin, batch


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
    """Normalise each channel; see :func:`refimpl.kernels.spec_images.batch_norm`."""
    shape = _shape(x)
    _check_channels(shape[0], gamma, beta, *(statistics or ()))
    chosen = _tier("batch_norm", [*_wholes(shape, x, out, add), gamma, beta])
    return chosen.batch_norm(x, gamma, beta, eps, out, statistics=statistics, add=add, rectify=rectify)


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
    """Return the gradients; see :func:`refimpl.kernels.spec_images.batch_norm_backward`."""
    shape = _shape(x)
    channels = [mean, scale, gamma] if beta is None else [mean, scale, gamma, beta]
    _check_channels(shape[0], *channels)
    if added is not None and y is None:
        raise ValueError("the gradient of what was added is asked for, without the output; give both or neither")
    chosen = _tier("batch_norm", [*_wholes(shape, dy, x, y, dx, added), *channels])
    return chosen.batch_norm_backward(dy, x, y, mean, scale, gamma, dx, moving=moving, beta=beta, added=added)


def max_pool(
    x: Images,
    out: Images,
    chosen: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    """Write the greatest numbers of windows; see :func:`refimpl.kernels.spec_images.max_pool`."""
    shape = _shape(x)
    _check_windows(shape, chosen, kernel, stride, before)
    arrays = [*_wholes(shape, x), *_wholes(chosen.shape, out)]
    tier = _tier("pooling", arrays) if chosen.dtype == _BYTE else spec_images
    tier.max_pool(x, out, chosen, kernel, stride, before)


def max_pool_backward(
    dy: Images,
    chosen: np.ndarray,
    dx: Images,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    """Write the gradient of images; see :func:`refimpl.kernels.spec_images.max_pool_backward`."""
    shape = _shape(dx)
    _check_windows(shape, chosen, kernel, stride, before)
    arrays = [*_wholes(shape, dx), *_wholes(chosen.shape, dy)]
    tier = _tier("pooling", arrays) if chosen.dtype == _BYTE else spec_images
    tier.max_pool_backward(dy, chosen, dx, kernel, stride, before)


def _check_channels(count: int, *arrays: np.ndarray) -> None:
    """Raise ValueError unless arrays have a number for each channel."""
    for array in arrays:
        if array.shape != (count,):
            raise ValueError(f"got an array of shape {array.shape}; images of {count} channels take ({count},)")


def _check_windows(
    shape: tuple[int, ...],
    chosen: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    before: tuple[int, int],
) -> None:
    """Raise ValueError unless there are as many windows as fit, and each sees a pixel."""
    if chosen.dtype.kind != "u" or not chosen.flags.c_contiguous or kernel[0] * kernel[1] > np.iinfo(chosen.dtype).max:
        raise ValueError(
            f"the taps of a {kernel[0]} x {kernel[1]} kernel are to be noted as {chosen.dtype}; give a contiguous "
            "array of an unsigned type that holds them and one number more"
        )
    fit = chosen.ndim == 4 and shape[0] == chosen.shape[0] and shape[3] == chosen.shape[3]
    for n, count, k, step, around in zip(shape[1:3], chosen.shape[1:3], kernel, stride, before, strict=True):
        fit &= 0 <= around < k and step >= 1 and (count - 1) * step - around < n
    if not fit:
        raise ValueError(
            f"images of shape {shape} have no windows of shape {chosen.shape} with kernel {kernel}, stride {stride} "
            f"and {before} pixels before them"
        )


__all__ = ["Images", "batch_norm", "batch_norm_backward", "max_pool", "max_pool_backward", "scale_of"]
