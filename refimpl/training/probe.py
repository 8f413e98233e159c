"""What a method may ask of a language model before training: the loss on the first window, and the flow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refimpl.models.language_model import LanguageModel
from refimpl.rng import Draws
from refimpl.weights import Grads, LinearGrad, Params, SparseWeight, Weight, add_to, values_of


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

    @property
    def samples(self) -> int:
        """How many tokens a pass reads."""
        return int(self.tokens.size)

    def loss_and_grads(self, params: Params, *, temperature: float = 1.0) -> tuple[float, Grads]:
        r"""Return the mean loss over the window and its gradients, with the logits divided by a temperature.

        .. math:: (W h + b) / T = (W / T)\, h + b / T

        so a decoder that is divided by T stands in for the model's own, and its gradients are divided by T in turn. A
        tied decoder is cut loose for that, and its gradient added to the embedding's.
        """
        model, seen = self.model, params
        if temperature != 1:
            model = replace(model, tied=False)
            seen = dict(params)
            for name, source in (("decoder.weight", self.model.decoder), ("decoder.bias", "decoder.bias")):
                seen[name] = divided(params[source], temperature)
        states = model.zero_states(self.tokens.shape[1], values_of(params["decoder.bias"]).dtype)
        loss, grads, _ = model.loss_and_grads(seen, self.tokens, self.targets, states, Draws(self.seed, 0))
        if temperature != 1:
            decoder, bias = grads.pop("decoder.weight"), grads["decoder.bias"]
            assert isinstance(decoder, LinearGrad)
            assert isinstance(bias, np.ndarray)
            add_to(grads, self.model.decoder, LinearGrad(decoder.shape, decoder.dy, decoder.x / temperature))
            grads["decoder.bias"] = bias / temperature
        return loss, grads

    def flow(self, params: Params) -> tuple[float, Grads]:
        """Return SynFlow's R and its gradients."""
        return self.model.flow(params)


def divided(weight: Weight, divisor: float) -> Weight:
    """Return a weight of which every entry is divided by a number."""
    if isinstance(weight, SparseWeight):
        return SparseWeight(weight.support, weight.values / divisor)
    return weight / divisor
