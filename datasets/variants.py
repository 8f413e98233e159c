"""Variants of a data set: fewer training images, or random labels on some of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from refimpl.datasets.images import Images, Part


def first_images(images: Images, count: int) -> Images:
    """Return images of which the first ``count`` alone are trained on; the held-out parts stay.

    Raises
    ------
    ValueError
        If there are fewer, or ``count`` is below 1.
    """
    train = images.train
    if not 1 <= count <= len(train.labels):
        raise ValueError(f"{count} training images are asked for; give from 1 to {len(train.labels)}")
    if count == len(train.labels):
        return images
    fewer = Part(train.pixels[:count], train.labels[:count])
    return replace(images, train=fewer, sha256=_digest(images, f"first {count}".encode()))


@dataclass(frozen=True, eq=False)
class RandomLabels:
    """Images of which some have random labels.

    Attributes
    ----------
    images : Images
        To train on; held-out labels are the true ones.
    chosen : array of int, shape (k,)
        Which training images have a random label, ascending.
    true : array of uint8, shape (k,)
        Their own labels.
    """

    images: Images
    chosen: npt.NDArray[np.int64]
    true: npt.NDArray[np.uint8]

    @property
    def random(self) -> npt.NDArray[np.uint8]:
        """The labels that the chosen images are trained with, shape (k,)."""
        return self.images.train.labels[self.chosen]

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """The chosen images, shape (k, channels, height, width)."""
        return self.images.train.pixels[self.chosen]


def random_labels(images: Images, count: int, *, rng: np.random.Generator) -> RandomLabels:
    """Draw new labels for some training images, uniformly over all classes.

    About one in as many as there are classes keeps its own label, for it is drawn like the others.

    Parameters
    ----------
    images : Images
    count : int
        How many images, drawn without replacement.
    rng : numpy.random.Generator

    Raises
    ------
    ValueError
        If there are fewer training images, or ``count`` is below 1.

    Notes
    -----
    Source: the experiment of Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires rethinking
    generalization", ICLR 2017, in the partial form of Peste, Iofinova, Vladu, Alistarh, "AC/DC", NeurIPS 2021.
    """
    total = len(images.train.labels)
    if not 1 <= count <= total:
        raise ValueError(f"{count} training images are to have random labels; give from 1 to {total}")
    chosen = np.sort(rng.choice(total, count, replace=False))
    labels = images.train.labels.copy()
    labels[chosen] = rng.integers(images.classes, size=count)
    changed = replace(
        images, train=Part(images.train.pixels, labels), sha256=_digest(images, b"labels", labels.tobytes())
    )
    return RandomLabels(changed, chosen, images.train.labels[chosen])


def _digest(images: Images, *changes: bytes) -> str:
    """Return a digest of what the images were and what became of them, so that a run can tell them apart."""
    found = hashlib.sha256(images.sha256.encode())
    for change in changes:
        found.update(change)
    return found.hexdigest()
