"""What a method may ask of a language model before training: the loss on the first window, and the flow."""

from __future__ import annotations

import numpy as np

from refimpl.models.language_model import LanguageModel
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, values_of


class LanguageProbe:
    """The first training window, with dropout as in a step numbered 0; see `refimpl.methods.base.Probe`.

    Parameters
    ----------
    model : LanguageModel
    tokens, targets : ndarray of int, shape (T, B)
    seed : int
        Of the run.
    """

    def __init__(self, model: LanguageModel, tokens: np.ndarray, targets: np.ndarray, seed: int) -> None:
        self.model = model
        self.tokens = tokens
        self.targets = targets
        self.seed = seed

    def loss_and_grads(self, params: Params) -> tuple[float, Grads]:
        """Return the mean loss over the window and its gradients."""
        states = self.model.zero_states(self.tokens.shape[1], values_of(params["decoder.bias"]).dtype)
        loss, grads, _ = self.model.loss_and_grads(params, self.tokens, self.targets, states, Draws(self.seed, 0))
        return loss, grads

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients."""
        return self.model.flow(params)
