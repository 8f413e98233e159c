"""A feed-forward network as the model of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refimpl.layers.batch_norm import Buffers
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Support


class Network(Protocol):
    """A feed-forward network that ends in softmax cross-entropy: an MLP, a convolutional network.

    Its parameters are what is trained. Its *buffers* are what it remembers besides: the running statistics of its batch
    norms, by their names in a PyTorch state dict. Whoever calls it with parameters puts the buffers among them.
    """

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (features,), or (channels, height, width)."""

    @property
    def output(self) -> tuple[str, str]:
        """Names of the weight and the bias that give the scores."""

    def describe(self) -> str:
        """Return in a few words what it is, such as ``"MLP, 784-300-100-10"``."""

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter that is trained."""

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters."""

    def buffers(self, dtype: Any) -> Buffers:
        """Return the buffers before the first batch; empty for a network without."""

    def loss_and_grads(
        self, params: Params, x: np.ndarray, labels: np.ndarray, draws: Draws | None = None
    ) -> tuple[float, Grads, Buffers]:
        """Return the mean loss in nats over ``x`` of shape (*input_shape, batch), gradients, and new buffers.

        The gradients are those of the parameters that are trained; the buffers are new arrays.
        """

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients; reads weights alone."""

    def logits(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the scores of the classes, (classes, batch), as in evaluation: by the running statistics."""


@dataclass(frozen=True)
class Classifier:
    """A `refimpl.models.base.Model` that carries its buffers from batch to batch, through all epochs.

    Attributes
    ----------
    network : Network
        It gets images (channels, height, width, batch) in the shape that it asks for: an MLP gets
        (features, batch), features in the order channels, height, width.
    """

    network: Network

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter, as the network does."""
        return self.network.specs()

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters, as the network does."""
        return self.network.init(seed, dtype, supports)

    def begin(self, batch: int, dtype: Any) -> Buffers:
        """Return the network's buffers before the first batch."""
        return self.network.buffers(dtype)

    def next_epoch(self, carried: Buffers) -> Buffers:
        """Return the buffers as they are: running statistics run on."""
        return carried

    def loss_and_grads(
        self, params: Params, inputs: np.ndarray, targets: np.ndarray, carried: Buffers, draws: Draws | None = None
    ) -> tuple[float, Grads, Buffers]:
        """Return the mean loss in nats for each image, the gradients, and the buffers after the batch.

        Parameters
        ----------
        params : Params
        inputs : ndarray, shape (channels, height, width, batch)
        targets : ndarray of int, shape (batch,)
        carried : dict of str to ndarray
            The buffers; not changed.
        draws : Draws, optional
            The step's random draws, for dropout; without them nothing is dropped.

        Raises
        ------
        ValueError
            If the images have another shape than the network takes, or a label is no class.
        """
        return self.network.loss_and_grads({**params, **carried}, self._shaped(inputs), targets, draws)

    def evaluated(self, params: Params, carried: Buffers) -> Params:
        """Return the parameters with the buffers among them."""
        return {**params, **carried}

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients."""
        return self.network.flow(params)

    def logits(self, params: Params, inputs: np.ndarray) -> np.ndarray:
        """Return the scores of the classes (classes, batch); ``params`` are what `evaluated` returns."""
        return self.network.logits(params, self._shaped(inputs))

    def _shaped(self, inputs: np.ndarray) -> np.ndarray:
        """Check the images, and lay them out as features for a network that takes those."""
        shape, wanted = inputs.shape[:-1], self.network.input_shape
        if shape == wanted:
            return inputs
        size = int(np.prod(wanted))
        if len(wanted) > 1 or int(np.prod(shape)) != size:
            raise ValueError(
                f"the images have shape {shape}, {int(np.prod(shape))} numbers, and the network takes {wanted}, {size} "
                "numbers; give the images that it was made for"
            )
        return inputs.reshape(*wanted, inputs.shape[-1])
