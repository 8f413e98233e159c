"""A feed-forward network as the model of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Support


class Network(Protocol):
    """A feed-forward network that ends in softmax cross-entropy: an MLP, a convolutional network."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (features,), or (channels, height, width)."""

    @property
    def output(self) -> tuple[str, str]:
        """Names of the weight and the bias that give the scores."""

    def describe(self) -> str:
        """Return in a few words what it is, such as ``"MLP, 784-300-100-10"``."""

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter."""

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters."""

    def loss_and_grads(self, params: Params, x: np.ndarray, labels: np.ndarray) -> tuple[float, Grads]:
        """Return the mean loss in nats over ``x`` of shape (*input_shape, batch), and the gradients."""

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients."""

    def logits(self, params: Params, x: np.ndarray) -> np.ndarray:
        """Return the scores of the classes, (classes, batch)."""


@dataclass(frozen=True)
class Classifier:
    """A `refimpl.models.base.Model` that carries nothing from batch to batch.

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

    def zero_states(self, batch: int, dtype: Any) -> list[Any]:
        """Return an empty list."""
        return []

    def loss_and_grads(
        self, params: Params, inputs: np.ndarray, targets: np.ndarray, carried: list[Any], draws: Draws | None = None
    ) -> tuple[float, Grads, list[Any]]:
        """Return the mean loss in nats for each image, the gradients, and an empty list.

        Parameters
        ----------
        params : Params
        inputs : ndarray, shape (channels, height, width, batch)
        targets : ndarray of int, shape (batch,)
        """
        loss, grads = self.network.loss_and_grads(params, self._shaped(inputs), targets)
        return loss, grads, []

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients."""
        return self.network.flow(params)

    def logits(self, params: Params, inputs: np.ndarray) -> np.ndarray:
        """Return the scores of the classes (classes, batch)."""
        return self.network.logits(params, self._shaped(inputs))

    def _shaped(self, inputs: np.ndarray) -> np.ndarray:
        size = int(np.prod(self.network.input_shape))
        if inputs[..., 0].size != size:
            raise ValueError(
                f"the images have shape {inputs.shape[:-1]}, {inputs[..., 0].size} numbers, and the network takes "
                f"{self.network.input_shape}, {size} numbers; give the images that it was made for"
            )
        return inputs.reshape(*self.network.input_shape, inputs.shape[-1])
