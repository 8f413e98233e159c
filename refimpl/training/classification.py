r"""The task of a classifier: to tell the class of an image.

An epoch is a permutation of the training images, drawn for the epoch's number, cut into batches; the last batch is as
small as what is left. With ``data.augment`` each batch draws its own crops and flips, for the epoch and its place in
it.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np

from refimpl.datasets import ImageBatches, Images
from refimpl.models.classifier import Classifier, Network
from refimpl.rng import generator
from refimpl.training.build_network import make_network
from refimpl.training.config import Config
from refimpl.training.probe import divided
from refimpl.training.task import PartName
from refimpl.weights import Grads, LinearGrad, Params, values_of


class ClassificationTask:
    """Shuffled batches of labelled images; see `refimpl.training.task.Task`.

    Parameters
    ----------
    config : Config
    images : Images

    Raises
    ------
    ValueError
        If there are fewer training images than one batch takes.
    """

    kind: ClassVar[str] = "images"
    unit: ClassVar[str] = "images"
    measure: ClassVar[str] = "accuracy"

    def __init__(self, config: Config, images: Images) -> None:
        self.config = config
        self.images = images
        self.count = len(images.train.labels)
        batch = config.training.batch_size
        if batch > self.count:
            raise ValueError(
                f"training.batch_size is {batch}, more than the {self.count} training images; choose a smaller batch"
            )
        self.model = Classifier(make_network(config, images.shape, images.classes))
        self.steps_per_epoch = -(-self.count // batch)
        self._epoch: tuple[int, ImageBatches] | None = None

    def batches(self, epoch: int) -> ImageBatches:
        """Return the batches of an epoch, in its own order."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = generator(self.config.seed, "shuffle", epoch).permutation(self.count)
            first = epoch * self.steps_per_epoch
            made = ImageBatches(
                self.images, self.images.train, order, self.config.training.batch_size, np.dtype(self.config.dtype),
                partial(_augmenter, self.config.seed, first) if self.config.data.augment else None,
                self.config.data.flip,
            )  # fmt: skip
            self._epoch = epoch, made
        return self._epoch[1]

    def probe(self) -> ClassifierProbe:
        """Return what a method may ask about the first batch of the first epoch."""
        return ClassifierProbe(self.model.network, *self.batches(0)[0])

    def samples(self, steps: int) -> int:
        """Return how many images that many steps are trained on."""
        epochs, left = divmod(steps, self.steps_per_epoch)
        return epochs * self.count + min(left * self.config.training.batch_size, self.count)

    def evaluate(self, params: Params, part: PartName) -> dict[str, float]:
        """Return the mean loss, and the fraction of the images whose class has the highest score.

        The parameters are those that `refimpl.models.base.Model.evaluated` returns, with the buffers. The loss is the
        plain cross-entropy, whatever label smoothing the run is trained with.

        Of equal scores the class with the lowest number counts as the highest. The loss is summed in float64.
        """
        held_out = self.images.valid if part == "valid" else self.images.test
        count = len(held_out.labels)
        dtype = values_of(next(iter(params.values()))).dtype
        batches = ImageBatches(
            self.images, held_out, np.arange(count), min(self.config.data.eval_batch_size, count), dtype
        )
        loss, correct = 0.0, 0
        for inputs, labels in batches:
            scores = self.model.logits(params, inputs).astype(np.float64)  # (classes, batch)
            scores -= scores.max(axis=0)
            loss += float((np.log(np.exp(scores).sum(axis=0)) - scores[labels, np.arange(len(labels))]).sum())
            correct += int(np.count_nonzero(scores.argmax(axis=0) == labels))
        return {"loss": loss / count, "accuracy": correct / count}

    def describe(self) -> tuple[str, str]:
        """Return what the images and the model are."""
        images = self.images
        counts = [len(part.labels) for part in (images.train, images.valid, images.test)]
        sizes = " + ".join(f"{count:,}" for count in counts)
        shape = " x ".join(map(str, images.shape))
        return (
            f"images: {images.name}, {sizes} (train, valid, test) of {shape}, {images.classes} classes",
            self.model.network.describe(),
        )


class ClassifierProbe:
    """One batch of images; see `refimpl.methods.base.Probe`.

    Parameters
    ----------
    network : Network
    inputs : ndarray, shape (channels, height, width, batch)
    labels : ndarray of int, shape (batch,)
    """

    def __init__(self, network: Network, inputs: np.ndarray, labels: np.ndarray) -> None:
        self.model = Classifier(network)
        self.inputs = inputs
        self.labels = labels

    @property
    def samples(self) -> int:
        """How many images a pass reads."""
        return int(self.labels.size)

    def loss_and_grads(self, params: Params, *, temperature: float = 1.0) -> tuple[float, Grads]:
        r"""Return the mean loss over the batch and its gradients, with the scores divided by a temperature.

        .. math:: (W h + b) / T = (W / T)\, h + b / T

        so a last layer that is divided by T stands in for the network's own, and its gradients are divided by T in
        turn.
        """
        seen = dict(params)
        if temperature != 1:
            for name in self.model.network.output:
                seen[name] = divided(params[name], temperature)
        dtype = values_of(next(iter(params.values()))).dtype
        inputs, buffers = self.inputs.astype(dtype, copy=False), self.model.begin(self.samples, dtype)
        loss, grads, _ = self.model.loss_and_grads(seen, inputs, self.labels, buffers)
        if temperature != 1:
            weight, bias = self.model.network.output
            promise = grads[weight]
            assert isinstance(promise, LinearGrad)
            grads[weight] = LinearGrad(promise.shape, promise.dy, promise.x / temperature)
            grads[bias] = np.asarray(grads[bias]) / temperature
        return loss, grads

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients."""
        return self.model.flow(params)


def _augmenter(seed: int, first: int, number: int) -> np.random.Generator:
    """Return the generator of the crops and flips of a batch; ``first`` batches were in the epochs before."""
    return generator(seed, "augment", first + number)
