r"""The windows of a convolution or a pooling: which pixels of an image each output position sees.

Output position :math:`(h, w)` sees the pixels :math:`(s_h h + i, s_w w + j)` of the padded image, for the *taps*
:math:`0 \le i < k_h`, :math:`0 \le j < k_w` of the kernel. One tap of all windows is a strided view of the padded
image; the *columns* of an image are all taps of all windows, a matrix :math:`k_h k_w` times as large as the image
where the stride is 1, so that it is made for a block of positions at a time and never as a whole.

Images are (channels, height, width, batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.kernels import memory
from refimpl.kernels.types import Geometry, Inset
from refimpl.layers.padded import Padded

BLOCK_ENTRIES = 1 << 20
"""Numbers of the columns that are held at a time; or those of one position, if they are more."""

Pair = tuple[int, int]
Padding = int | tuple[int | Pair, int | Pair]
"""Pixels around the image: one number for all sides, or one for the height and one for the width, each of them either
a number for both ends or a pair (before, after)."""


@dataclass(frozen=True)
class Windows:
    """The geometry of all windows; make it with :meth:`of`.

    Attributes
    ----------
    kernel, stride : (int, int)
        Height and width.
    padding : ((int, int), (int, int))
        (top, bottom), (left, right).
    """

    kernel: Pair
    stride: Pair
    padding: tuple[Pair, Pair]

    @classmethod
    def of(cls, kernel: int | Pair, stride: int | Pair, padding: Padding) -> Windows:
        """Return the windows, numbers given once standing for height and width.

        Raises
        ------
        ValueError
            If a kernel or a stride is below 1, a padding below 0, or one of them no whole number.
        """
        before_after = (
            _pair("padding", side, 0) for side in (padding if isinstance(padding, tuple) else (padding,) * 2)
        )
        sides = tuple(before_after)
        if len(sides) != 2:
            raise ValueError(f"padding is {padding!r}; give one number, or one or a pair for each of height and width")
        return cls(_pair("kernel", kernel, 1), _pair("stride", stride, 1), sides)

    @cached_property
    def taps(self) -> list[Pair]:
        """All (i, j) of the kernel, row by row."""
        return [(i, j) for i in range(self.kernel[0]) for j in range(self.kernel[1])]

    def size(self, image: tuple[int, ...]) -> Pair:
        r"""Return how many windows an image (height, width) has in each direction:
        :math:`\lfloor (n + p - k) / s \rfloor + 1` for :math:`n` pixels and :math:`p` of padding.

        Raises
        ------
        ValueError
            If the kernel is larger than the padded image.
        """
        padded = [n + sum(around) for n, around in zip(image, self.padding, strict=True)]
        if any(k > n for k, n in zip(self.kernel, padded, strict=True)):
            raise ValueError(
                f"the kernel is {self.kernel[0]} x {self.kernel[1]} and the padded image {padded[0]} x {padded[1]} "
                "pixels; the kernel must fit: take a smaller one, more padding or larger images"
            )
        return _two((n - k) // s + 1 for n, k, s in zip(padded, self.kernel, self.stride, strict=True))

    def pad(self, x: np.ndarray | Padded, value: float = 0) -> np.ndarray:
        """Return the image with ``value`` around it; the image itself where there is no padding, and of padded images
        a view, where their margin is wide enough and zeros are asked for.
        """
        if isinstance(x, Padded):
            if value == 0 and self._fits(x):
                (top, bottom), (left, right), m = *self.padding, x.margin
                height, width = x.whole.shape[1:3]
                return x.whole[:, m - top : height - m + bottom, m - left : width - m + right]
            x = x.image
        if self.padding == ((0, 0), (0, 0)):
            return x
        out = memory.empty(self._padded_shape(x.shape), x.dtype)
        out[...] = value
        self.crop(out)[...] = x
        return out

    def inset(self, x: np.ndarray | Padded) -> Inset:
        """Return an image inside zeros, for the kernels: padded images as they are, if their margin is wide enough."""
        if isinstance(x, Padded) and self._fits(x):
            return Inset(x.whole, (x.margin, x.margin))
        padded = self.pad(x)
        (top, _), (left, _) = self.padding
        return Inset(padded if padded.flags.c_contiguous else np.ascontiguousarray(padded), (top, left))

    def padded(self, inset: Inset, image: tuple[int, ...]) -> np.ndarray:
        """Return images (C, H, W, B) with their padding, a view of what :meth:`inset` returned."""
        (top, bottom), (left, right) = self.padding
        (row, column), (height, width) = inset.at, image[1:3]
        return inset.whole[:, row - top : row + height + bottom, column - left : column + width + right]

    def geometry(self, image: tuple[int, ...]) -> Geometry:
        """Return where the windows of an image (height, width) lie, as the kernels take it."""
        (top, _), (left, _) = self.padding
        return Geometry(self.kernel, self.stride, (top, left), _two(image), self.size(image))

    def _fits(self, x: Padded) -> bool:
        return x.margin >= max(max(side) for side in self.padding)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a padded image of zeros for an image of ``shape``."""
        return memory.zeros(self._padded_shape(shape), dtype)

    def crop(self, padded: np.ndarray) -> np.ndarray:
        """Return a view of a padded image without the padding."""
        (top, bottom), (left, right) = self.padding
        return padded[:, top : padded.shape[1] - bottom, left : padded.shape[2] - right]

    def _padded_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] + sum(self.padding[0]), shape[2] + sum(self.padding[1]), *shape[3:])

    def tap(self, padded: np.ndarray, i: int, j: int, rows: slice, across: slice) -> np.ndarray:
        """Return what the windows at some positions see at tap (i, j): a view (channels, rows, across, batch)."""
        (sh, sw) = self.stride
        down = slice(i + sh * rows.start, i + sh * (rows.stop - 1) + 1, sh)
        return padded[:, down, slice(j + sw * across.start, j + sw * (across.stop - 1) + 1, sw)]

    def whole(self, image: tuple[int, ...]) -> tuple[slice, slice]:
        """Return all positions of an image (height, width) as one block."""
        height, width = self.size(image)
        return slice(0, height), slice(0, width)

    def blocks(self, image: tuple[int, ...], entries: int) -> Iterator[tuple[slice, slice]]:
        """Yield all positions of an image in blocks (rows, across) of about equal size.

        Parameters
        ----------
        image : tuple of int
            (height, width).
        entries : int
            Numbers for each position, of which a block holds `BLOCK_ENTRIES` at most.
        """
        height, width = self.size(image)
        fit = max(1, BLOCK_ENTRIES // max(entries, 1))
        for rows in _parts(height, max(1, fit // width)):
            for across in _parts(width, fit):
                yield rows, across

    def columns(self, padded: np.ndarray, rows: slice, across: slice) -> np.ndarray:
        """Return the columns (channels · taps, positions · batch) of a block: row ``(c, i, j)`` is tap (i, j) of
        channel c. A view of the image where the kernel is a single tap and it can be.
        """
        first = self.tap(padded, 0, 0, rows, across)
        channels = len(padded)
        if len(self.taps) == 1:
            return first.reshape(channels, -1)
        out = memory.empty((channels, len(self.taps), *first.shape[1:]), padded.dtype)
        for k, (i, j) in enumerate(self.taps):
            out[:, k] = self.tap(padded, i, j, rows, across)
        return out.reshape(channels * len(self.taps), -1)

    def add_columns(self, columns: np.ndarray, padded: np.ndarray, rows: slice, across: slice) -> None:
        """Add columns to the pixels that they were read from: the adjoint of :meth:`columns`, in place."""
        shape = self.tap(padded, 0, 0, rows, across).shape
        windows = columns.reshape(shape[0], len(self.taps), *shape[1:])
        for k, (i, j) in enumerate(self.taps):
            pixels = self.tap(padded, i, j, rows, across)  # of different windows: none is there twice
            pixels += windows[:, k]


def check_images(x: np.ndarray) -> None:
    """Raise ValueError unless ``x`` is (channels, height, width, batch)."""
    if x.ndim != 4:
        raise ValueError(f"got an array of shape {x.shape}; give images as (channels, height, width, batch)")


def _pair(name: str, given: Any, least: int) -> Pair:
    both = given if isinstance(given, (tuple, list)) else (given, given)
    if len(both) != 2 or not all(isinstance(n, (int, np.integer)) and n >= least for n in both):
        raise ValueError(f"{name} is {given!r}; give a whole number from {least}, or a pair of them")
    return _two(both)


def _two(numbers: Any) -> Pair:
    first, second = numbers
    return int(first), int(second)


def _parts(size: int, most: int) -> Iterator[slice]:
    """Cut ``range(size)`` into the fewest parts of at most ``most``, as equal as they can be: kernels are compiled for
    each width, and parts of one size have one.
    """
    count = -(-size // most)
    for k in range(count):
        yield slice(size * k // count, size * (k + 1) // count)
