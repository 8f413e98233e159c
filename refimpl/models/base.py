"""What training asks of a model; it need not know what the model is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Support

Carried = Any
"""What a model hands on from batch to batch and does not train: the hidden states of a language model, a list; the
buffers of a classifier (the running statistics of its batch norms), a dictionary of arrays by their names in a PyTorch
state dict; empty if there is nothing."""


class Model(Protocol):
    """A network and its loss, over a batch whose last axis counts the columns."""

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter, in the order of a PyTorch state dict."""

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters; of a sparse weight only the values that exist are drawn."""

    def begin(self, batch: int, dtype: Any) -> Carried:
        """Return what is carried into the first batch of a run."""

    def next_epoch(self, carried: Carried) -> Carried:
        """Return what is carried into the first batch of an epoch, from what the last batch before it left."""

    def loss_and_grads(
        self, params: Params, inputs: np.ndarray, targets: np.ndarray, carried: Carried, draws: Draws | None = None
    ) -> tuple[float, Grads, Carried]:
        """Return the mean loss in nats for each target, the gradients, and what is carried into the next batch.

        ``carried`` is not changed.
        """

    def evaluated(self, params: Params, carried: Carried) -> Params:
        """Return the parameters together with what else of a training run evaluation needs: the buffers."""

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients; see `refimpl.methods.base.Probe`."""
