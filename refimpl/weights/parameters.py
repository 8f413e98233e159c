"""What is known about a parameter beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from refimpl.weights.sparse import Weight
from refimpl.weights.support import Shape

Params = dict[str, Weight]
"""All trained arrays of a model by name; names, shapes and gate order as in PyTorch."""

Kind = Literal["embedding", "linear", "recurrent", "conv", "bias", "norm"]


@dataclass(frozen=True)
class ParamSpec:
    """A parameter's place in the model: methods, parametrizations and FLOP counters read this instead of parsing names.

    Attributes
    ----------
    name, shape : str, tuple of int
        As in a PyTorch state dict; rows are output units.
    kind : str
        ``"embedding"``, ``"linear"`` (also the input weights of a recurrent layer), ``"recurrent"``, ``"conv"``,
        ``"bias"`` or ``"norm"``.
    prunable : bool
        Whether sparse methods may act on it.
    blocks : dict of str to slice
        Named groups of rows, such as the gates of an LSTM; empty if there are none.
    fan_in, fan_out : int
        Dense fans of the linear map.
    columns_per_sample : float
        Matrix–vector products for each sample (a token, an image): 0 for an embedding lookup, the number of positions
        for a convolution.
    input_gradient : bool
        Whether backward computes the gradient of this map's input; false for the first layer.
    layer : str
        Parameters that share a layer, such as the input and recurrent weights of one LSTM layer, have the same name
        here.
    source : str
        The layer whose units are this map's columns, that is, whose outputs it reads; empty where they are no layer's
        (the inputs of the model) or the columns are no units. The recurrent weight of a layer reads the layer itself.
    """

    name: str
    shape: Shape
    kind: Kind
    prunable: bool = False
    blocks: dict[str, slice] = field(default_factory=dict)
    fan_in: int = 0
    fan_out: int = 0
    columns_per_sample: float = 1.0
    input_gradient: bool = True
    layer: str = ""
    source: str = ""

    @property
    def size(self) -> int:
        """Number of entries of the dense parameter."""
        return int(np.prod(self.shape))
