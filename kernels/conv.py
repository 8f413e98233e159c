"""Kernels of sparse convolutions: the choice between their definition and the compiled ones, and the checks of both.

See :mod:`refimpl.kernels.spec_conv` for what each returns.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np

from refimpl import kernels
from refimpl.kernels import spec, spec_conv
from refimpl.kernels.types import Geometry, Inset, Pattern, SparseMatrix

_COMPILED = (np.dtype(np.float32), np.dtype(np.float64))


def _tier(*arrays: np.ndarray) -> ModuleType:
    """Return the tier for some arrays: the definition where their types differ, or one is not contiguous."""
    first = arrays[0]
    if kernels.tier() is spec or first.dtype not in _COMPILED or not all(a.size for a in arrays):
        return spec_conv
    if any(a.dtype != first.dtype or not a.flags.c_contiguous for a in arrays):
        return spec_conv
    return import_module("refimpl.kernels.cpu.conv")


def convolve(w: SparseMatrix, x: Inset, geometry: Geometry, bias: np.ndarray | None = None) -> np.ndarray:
    """Return the convolution of images; see :func:`refimpl.kernels.spec_conv.convolve`."""
    _check(w.support, x, geometry)
    arrays = [w.values, x.whole] if bias is None else [w.values, x.whole, bias]
    if bias is not None and bias.shape != w.support.matrix_shape[:1]:
        raise ValueError(f"the bias has shape {bias.shape}; this weight takes {w.support.matrix_shape[:1]}")
    return _tier(*arrays).convolve(w, x, geometry, bias)


def convolve_dot(support: Pattern, dy: Inset, x: Inset, geometry: Geometry) -> np.ndarray:
    """Return the weight's gradient on a support; see :func:`refimpl.kernels.spec_conv.convolve_dot`."""
    _check(support, x, geometry)
    _check_gradient(support, dy, x, geometry)
    return _tier(dy.whole, x.whole).convolve_dot(support, dy, x, geometry)


def convolve_backward(w: SparseMatrix, dy: Inset, x: Inset, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Return the images' and the weight's gradient; see :func:`refimpl.kernels.spec_conv.convolve_backward`."""
    _check(w.support, x, geometry)
    _check_gradient(w.support, dy, x, geometry)
    return _tier(w.values, dy.whole, x.whole).convolve_backward(w, dy, x, geometry)


def _check(support: Pattern, x: Inset, geometry: Geometry) -> None:
    """Raise ValueError unless all windows lie inside an array that has the channels a weight reads."""
    taps = geometry.kernel[0] * geometry.kernel[1]
    if x.whole.ndim != 4 or x.whole.shape[0] * taps != support.matrix_shape[1]:
        raise ValueError(
            f"X has shape {x.whole.shape}; a weight of {support.matrix_shape[1]} columns and {taps} taps takes "
            f"({support.matrix_shape[1] // taps}, H, W, B)"
        )
    for axis in (0, 1):
        first = x.at[axis] - geometry.padding[axis]
        last = first + geometry.stride[axis] * (geometry.outputs[axis] - 1) + geometry.kernel[axis]
        if first < 0 or last > x.whole.shape[axis + 1] or x.at[axis] + geometry.image[axis] > x.whole.shape[axis + 1]:
            raise ValueError(
                f"X has shape {x.whole.shape} with its images at {x.at}; the windows of {geometry} reach beyond it"
            )


def _check_gradient(support: Pattern, dy: Inset, x: Inset, geometry: Geometry) -> None:
    """Raise ValueError unless ``dY`` has the outputs of a convolution."""
    rows, whole = support.matrix_shape[0], dy.whole
    inside = whole.ndim == 4 and all(dy.at[a] + geometry.outputs[a] <= whole.shape[a + 1] for a in (0, 1))
    if not inside or whole.shape[0] != rows or whole.shape[3] != x.whole.shape[3]:
        raise ValueError(
            f"dY has shape {whole.shape} with its images at {dy.at}; this convolution gives "
            f"{(rows, *geometry.outputs, x.whole.shape[3])}"
        )
