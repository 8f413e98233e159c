"""Checks of a tier's sparse convolutions against their definition, on small integers, whose sums are exact."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from refimpl.kernels import spec_conv
from refimpl.kernels.types import Geometry, Inset
from refimpl.layers.padded import Padded
from refimpl.weights import SparseWeight, Support

Axis = tuple[int, int, int, int]
"""Kernel, stride, padding and pixels along one axis."""


class Convolution(NamedTuple):
    """What the kernels of a convolution are given."""

    w: SparseWeight
    x: Inset
    dy: Inset
    geometry: Geometry
    bias: np.ndarray


@dataclass(frozen=True)
class ConvCase:
    """The sizes of a convolution.

    Attributes
    ----------
    axes : tuple of Axis
        Of the height and the width.
    channels : tuple of int
        Outputs and inputs.
    batch : int
    margins : tuple of int
        Zeros around x beyond its padding, and around dY.
    density : float
    dtype : type
    """

    axes: tuple[Axis, Axis]
    channels: tuple[int, int]
    batch: int
    margins: tuple[int, int] = (0, 0)
    density: float = 0.5
    dtype: Any = np.float64

    def draw(self, seed: int) -> Convolution:
        """Draw weight, images and gradients from the integers −4 to 4."""
        rng = np.random.default_rng(seed)
        (k, s, p, n), (k_, s_, p_, n_) = self.axes
        kernel, padding, image = (k, k_), (p, p_), (n, n_)
        outputs = (n + 2 * p - k) // s + 1, (n_ + 2 * p_ - k_) // s_ + 1
        o, i = self.channels
        mask = rng.random((o, i, *kernel)) < self.density
        w = SparseWeight.from_dense(rng.integers(-4, 5, mask.shape).astype(self.dtype), Support.from_mask(mask))
        x = self._inset(rng, (i, *image), max(padding) + self.margins[0])
        dy = self._inset(rng, (o, *outputs), self.margins[1])
        bias = rng.integers(-4, 5, o).astype(self.dtype)
        return Convolution(w, x, dy, Geometry(kernel, (s, s_), padding, image, outputs), bias)

    def _inset(self, rng: np.random.Generator, shape: tuple[int, ...], margin: int) -> Inset:
        padded = Padded.empty((*shape, self.batch), self.dtype, margin)
        padded.image[...] = rng.integers(-4, 5, padded.shape)
        return Inset(padded.whole, (margin, margin))


def results(tier: ModuleType, c: Convolution) -> list[np.ndarray]:
    """Return all that a tier computes of a convolution: with and without a bias, dW by itself, dX and dW together."""
    dx, grad = tier.convolve_backward(c.w, c.dy, c.x, c.geometry)
    return [
        tier.convolve(c.w, c.x, c.geometry, c.bias),
        tier.convolve(c.w, c.x, c.geometry),
        tier.convolve_dot(c.w.support, c.dy, c.x, c.geometry),
        dx,
        grad,
    ]


def check_convolution(tier: ModuleType, case: ConvCase, seed: int = 0) -> None:
    """Raise AssertionError unless a tier computes what the definition does, exactly."""
    c = case.draw(seed)
    for ours, expected in zip(results(tier, c), results(spec_conv, c), strict=True):
        np.testing.assert_array_equal(ours, expected)
