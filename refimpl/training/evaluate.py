"""Loss of a language model on a text."""

from __future__ import annotations

import math

import numpy as np

from refimpl.datasets import batchify, windows
from refimpl.models.language_model import LanguageModel
from refimpl.weights import Params, values_of

WINDOW = 70
"""Time steps that are evaluated together; with carried state the loss does not depend on it."""


def mean_loss(model: LanguageModel, params: Params, tokens: np.ndarray, batch: int) -> float:
    r"""Return the mean loss in nats for each predicted token.

    The text is read in ``batch`` columns with carried state. Tokens beyond a multiple of it are dropped, and the first
    token of each column is not predicted: the mean runs over (rows − 1) · batch tokens.
    """
    rows = batchify(tokens, batch)
    states = model.zero_states(batch, values_of(params["decoder.bias"]).dtype)
    total, count = 0.0, 0
    for inputs, targets in windows(rows, min(WINDOW, len(rows) - 1)):
        loss, states = model.loss(params, inputs, targets, states)
        total += loss * inputs.size
        count += inputs.size
    return total / count


def perplexity(loss: float) -> float:
    """Return :math:`e^{loss}`, infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
