"""What training asks of a model; it need not know what the model is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Support


class Model(Protocol):
    """A network and its loss, over a batch whose last axis counts the columns."""

    def specs(self) -> dict[str, ParamSpec]:
        """Describe every parameter, in the order of a PyTorch state dict."""

    def init(self, seed: int, dtype: Any, supports: Mapping[str, Support] | None = None) -> Params:
        """Draw the initial parameters; of a sparse weight only the values that exist are drawn."""

    def zero_states(self, batch: int, dtype: Any) -> list[Any]:
        """Return what is carried into the first batch of an epoch; empty for a model that carries nothing."""

    def loss_and_grads(
        self, params: Params, inputs: np.ndarray, targets: np.ndarray, carried: list[Any], draws: Draws | None = None
    ) -> tuple[float, Grads, list[Any]]:
        """Return the mean loss in nats for each target, the gradients, and what is carried into the next batch."""

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients; see `refimpl.methods.base.Probe`."""
