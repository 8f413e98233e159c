"""How many images the published data sets hold, and of which size: enough to count operations without the images."""

from __future__ import annotations

from typing import NamedTuple


class ImageSizes(NamedTuple):
    """The size of a data set of labelled images.

    Attributes
    ----------
    train, test : int
        Images of the published training and test parts. Of ImageNet the second is its validation part, as its test
        part has no public labels.
    shape : tuple of int
        Channels, height and width that networks read; ImageNet's own images differ in size and are cropped to this.
    classes : int
    readable : bool
        Whether `refimpl.datasets.load_image_folder` reads its files.
    """

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int
    readable: bool = True


IMAGE_SIZES = {
    "mnist": ImageSizes(60_000, 10_000, (1, 28, 28), 10),
    "fashion-mnist": ImageSizes(60_000, 10_000, (1, 28, 28), 10),
    "cifar-10": ImageSizes(50_000, 10_000, (3, 32, 32), 10),
    "cifar-100": ImageSizes(50_000, 10_000, (3, 32, 32), 100),
    "imagenet": ImageSizes(1_281_167, 50_000, (3, 224, 224), 1000, readable=False),
}
"""The sizes by the names that :data:`refimpl.datasets.CATALOGUE` has, and of ImageNet (ILSVRC 2012)."""
