"""Images with a margin of zeros around them: what a convolution with padding reads, made once and not copied again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.kernels import memory


class Padded(NamedTuple):
    """Images (C, H, W, B) inside an array that has a margin of zeros on each side.

    Whoever makes one with :meth:`empty` fills the images in and leaves the margin alone.

    Attributes
    ----------
    whole : ndarray, shape (C, H + 2 m, W + 2 m, B)
        Contiguous; zeros in the margin.
    margin : int
        m, pixels on each side.
    """

    whole: np.ndarray
    margin: int

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any, margin: int) -> Padded:
        """Return images of a shape (C, H, W, B) with a margin of zeros, anything inside it."""
        padded = cls.unfilled(shape, dtype, margin)
        _, height, width, _ = shape
        for edge in (slice(None, margin), slice(height + margin, None)) if margin else ():
            padded.whole[:, edge] = 0
        for edge in (slice(None, margin), slice(width + margin, None)) if margin else ():
            padded.whole[:, :, edge] = 0
        return padded

    @classmethod
    def unfilled(cls, shape: tuple[int, ...], dtype: Any, margin: int) -> Padded:
        """Return images with anything in them and in the margin, for kernels that write both."""
        channels, height, width, batch = shape
        return cls(memory.empty((channels, height + 2 * margin, width + 2 * margin, batch), dtype), margin)

    @classmethod
    def of(cls, x: np.ndarray | Padded) -> Padded:
        """Return what is in a margin as it is, and other arrays (C, ..., B) with none.

        Arrays without rows and columns become images of a single one. A copy is made only of an array that is not
        contiguous.
        """
        if isinstance(x, Padded):
            return x
        whole = x if x.flags.c_contiguous else np.ascontiguousarray(x)
        return cls(whole if x.ndim == 4 else whole.reshape(len(x), 1, 1, -1), 0)

    @property
    def image(self) -> np.ndarray:
        """The images without their margin, a view (C, H, W, B)."""
        m = self.margin
        return self.whole[:, m : self.whole.shape[1] - m, m : self.whole.shape[2] - m]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the images without their margin."""
        return self.image.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers."""
        return self.whole.dtype


def image_of(x: np.ndarray | Padded) -> np.ndarray:
    """Return the images (C, H, W, B) of either."""
    return x.image if isinstance(x, Padded) else x
