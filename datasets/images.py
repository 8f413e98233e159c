"""Labelled images in memory, standardised batch by batch, and the order and augmentation of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from refimpl.datasets.numbered import Numbered

Pixels = npt.NDArray[np.uint8]
Batch = tuple[np.ndarray, np.ndarray]
PADDING = 4
"""Pixels by which a random crop may move an image, the usual number for images of 32 x 32."""


class Part(NamedTuple):
    """Some of the images.

    Attributes
    ----------
    pixels : array of uint8, shape (n, channels, height, width)
    labels : array of uint8, shape (n,)
    """

    pixels: Pixels
    labels: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images in three parts, as the bytes that the files hold.

    Attributes
    ----------
    name : str
        What they are called in reports.
    train, valid, test : Part
        All of one shape.
    classes : int
        Labels are 0 to ``classes - 1``.
    sha256 : str
        Hexadecimal digest of the files' contents (unpacked, where a file is compressed). It does not depend on how many
        images are set aside for validation.
    """

    name: str
    train: Part
    valid: Part
    test: Part
    classes: int
    sha256: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    @cached_property
    def statistics(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and standard deviation of each channel over the training part, in bytes (0 to 255).

        The validation and test images have no part in them. They come from a count of each byte, so they are the
        same whatever the order of the images, and need no floating-point image.
        """
        values = np.arange(256.0)
        counts = np.array([np.bincount(c.reshape(-1), minlength=256) for c in self.train.pixels.swapaxes(0, 1)])
        mean = counts @ values / counts.sum(axis=1)
        squares = counts * (values - mean[:, None]) ** 2
        return mean, np.sqrt(squares.sum(axis=1) / counts.sum(axis=1))

    def standardised(self, pixels: Pixels, dtype: Any) -> np.ndarray:
        r"""Return images as numbers with mean 0 and variance 1 over the training part, the batch as the last axis.

        .. math:: x = (p - \mu_c) / \sigma_c

        for a byte p of channel c. A channel that is constant over the training part gives zeros there
        (:math:`\sigma_c` counts as 1).

        Parameters
        ----------
        pixels : array of uint8, shape (n, channels, height, width)
        dtype : float32 or float64

        Returns
        -------
        array, shape (channels, height, width, n)
            C-contiguous, so that it reshapes to (features, n) without a copy.
        """
        x = np.empty((*pixels.shape[1:], len(pixels)), dtype)
        for channel, table in enumerate(self._tables.astype(dtype)):  # 256 quotients in place of one for each pixel
            x[channel] = table[pixels[:, channel].transpose(1, 2, 0)]
        return x

    @cached_property
    def _tables(self) -> npt.NDArray[np.float64]:
        """What each byte of each channel becomes: (channels, 256)."""
        mean, deviation = self.statistics
        return (np.arange(256.0) - mean[:, None]) / np.where(deviation > 0, deviation, 1.0)[:, None]


@dataclass(frozen=True, eq=False)
class ImageBatches(Numbered[Batch]):
    """The batches of one pass over a part, as a sequence of (inputs, labels); the last one may be smaller.

    A batch depends on its number alone, whatever was asked for before it, so that the number is all that a run needs to
    remember in order to continue in the middle of an epoch.

    Attributes
    ----------
    images : Images
        Whose statistics standardise.
    part : Part
        What is passed over.
    order : array of int, shape (n,)
        Which images, in which order; a permutation for an epoch of training.
    batch_size : int
        At least 1.
    dtype : float32 or float64
    augment : callable, optional
        Gives the generator that a batch's random crops and flips are drawn from, by the batch's number.
    flip : bool
        Whether augmented images are mirrored, half of them.
    """

    images: Images
    part: Part
    order: np.ndarray
    batch_size: int
    dtype: Any
    augment: Callable[[int], np.random.Generator] | None = None
    flip: bool = True
    noun: ClassVar[str] = "batch"

    def __len__(self) -> int:
        """Count the batches: n / batch_size, rounded up."""
        return -(-len(self.order) // self.batch_size)

    def item(self, k: int) -> Batch:
        """Return batch `k`: inputs of shape (channels, height, width, B), labels of shape (B,)."""
        chosen = self.order[k * self.batch_size : (k + 1) * self.batch_size]
        pixels = self.part.pixels[chosen]
        if self.augment is not None:
            rng = self.augment(k)
            pixels = random_crop(pixels, PADDING, rng=rng)
            if self.flip:
                pixels = random_flip(pixels, rng=rng)
        return self.images.standardised(pixels, self.dtype), self.part.labels[chosen].astype(np.int64)


def random_crop(pixels: Pixels, padding: int, *, rng: np.random.Generator) -> Pixels:
    """Move each image by up to `padding` pixels each way; black (0) moves in from outside.

    Parameters
    ----------
    pixels : array of uint8, shape (n, channels, height, width)
    padding : int
        At least 0. Each image draws its two offsets uniformly from ``-padding`` to ``padding``, rows first.
    rng : numpy.random.Generator

    Returns
    -------
    array of uint8, shape (n, channels, height, width)
        A copy.

    Notes
    -----
    Source: the augmentation of He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2, and
    of most papers on CIFAR. There the padding follows the standardisation; here it comes before, as in torchvision's
    pipelines, so what moves in is black rather than the mean.
    """
    n, _, height, width = pixels.shape
    padded = np.pad(pixels, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    down, right = rng.integers(0, 2 * padding + 1, (2, n))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(n), :, down, right].copy()


def random_flip(pixels: Pixels, *, rng: np.random.Generator) -> Pixels:
    """Mirror each image left to right with probability 1/2; see `random_crop` for shapes."""
    mirrored = rng.random(len(pixels)) < 0.5
    return np.where(mirrored[:, None, None, None], pixels[..., ::-1], pixels)
