r"""LeNet-5, in the form that pruning is tried on: two convolutions, two pools, two linear maps, rectifiers.

.. math::
    h_1 = \max(P(W_1 * x + b_1), 0), \quad h_2 = \max(P(W_2 * h_1 + b_2), 0), \quad
    h_3 = \max(W_3 h_2 + b_3, 0), \quad z = W_4 h_3 + b_4

with :math:`P` the maximum of each 2 x 2 pixels. Of an image of 28 x 28 pixels: 20 channels of 12 x 12, 50 of 4 x 4, 500
units, the classes; 430,500 weights and 580 biases for ten of them.

Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proceedings of the
IEEE 1998. That network is another one: smaller, with trained subsampling, squashing units and a distance at its end.
What pruning papers call LeNet-5 has the shapes of Caffe's example. LeNet-300-100 is an
:class:`~refimpl.models.mlp.MLP`.

Deviations
----------
- Caffe's example has a rectifier after the third map alone; here there is one after each.
- It follows the pool, which is the same as before it, gradients included, at a quarter of the work.
- SynFlow's flow has the mean for the maximum: of an image of ones each channel is as large everywhere, since no image
  is padded, so that the two are the same, and so are the gradients of all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.layers import linear, relu
from refimpl.layers.batch_norm import Buffers
from refimpl.models.conv_net import ConvNet, Stage
from refimpl.models.conv_units import Conv, MaxPool, Pass
from refimpl.models.initial import Initial
from refimpl.weights import Grads, Params, ParamSpec

SIZE = 28
"""Height and width of an image."""


@dataclass(frozen=True)
class LeNet5(ConvNet):
    """The network; see the module. Its maps are ``conv1``, ``conv2``, ``fc1``, ``fc2``, with biases.

    Attributes
    ----------
    classes : int
    label_smoothing : float
        See :mod:`refimpl.layers.label_smoothing`.
    initial : {"he", "torch"}
        Initial distribution of the convolutions; see :func:`refimpl.models.initial.draw`.

    Raises
    ------
    ValueError
        If an option is outside its range.
    """

    classes: int = 10
    label_smoothing: float = 0.0
    initial: Initial = "torch"
    input_shape = (1, SIZE, SIZE)

    def __post_init__(self) -> None:
        self._check()

    def describe(self) -> str:
        """Return in a few words what it is."""
        return "LeNet-5"

    @property
    def output(self) -> tuple[str, str]:
        """Names of the weight and the bias that give the scores."""
        return "fc2.weight", "fc2.bias"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """From the images to the scores."""
        conv1 = Conv("conv1", (20, 1, 5, 5), (SIZE, SIZE), bias=True, first=True)
        pool1 = MaxPool(conv1.output, 2, 2)
        conv2 = Conv("conv2", (50, 20, 5, 5), pool1.output, bias=True, source="conv1")
        pool2 = MaxPool(conv2.output, 2, 2)
        fc1 = Linear("fc1", 50 * pool2.output[0] * pool2.output[1], 500, "conv2")
        fc2 = Linear("fc2", 500, self.classes, "fc1")
        return (conv1, pool1, Rectifier(), conv2, pool2, Rectifier(), fc1, Rectifier(), fc2)


@dataclass(frozen=True)
class Linear:
    """A linear map of all that it reads, (features, batch) or images with their features in the order C, H, W.

    Attributes
    ----------
    name : str
    inputs, outputs : int
    source : str
        Layer whose units it reads.
    """

    name: str
    inputs: int
    outputs: int
    source: str
    padding = 0

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        return [
            ParamSpec(
                f"{self.name}.weight", (self.outputs, self.inputs), "linear", True,
                fan_in=self.inputs, fan_out=self.outputs, layer=self.name, source=self.source,
            ),
            ParamSpec(f"{self.name}.bias", (self.outputs,), "bias", fan_in=self.inputs, layer=self.name),
        ]  # fmt: skip

    def buffers(self, dtype: Any) -> Buffers:
        """Return nothing."""
        return {}

    def forward(
        self, params: Params, x: Any, run: Pass, *, margin: int = 0
    ) -> tuple[np.ndarray, tuple[linear.Cache, tuple[int, ...]]]:
        """Return (outputs, batch), and what backward needs: the map's cache, and the shape of ``x``."""
        bias = None if run.mode == "flow" else f"{self.name}.bias"
        y, cache = linear.forward(params, f"{self.name}.weight", bias, x.reshape(self.inputs, -1))
        return y, (cache, x.shape)

    def backward(self, dy: np.ndarray, cache: tuple[linear.Cache, tuple[int, ...]], grads: Grads) -> np.ndarray:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        dx = linear.backward(dy, cache[0], grads)
        assert dx is not None
        return dx.reshape(cache[1])


@dataclass(frozen=True)
class Rectifier:
    r""":math:`\max(x, 0)`, and in a flow x itself. It overwrites what it is given, in both directions: the map or the
    pool around it needs that no more.
    """

    padding = 0

    def specs(self) -> list[ParamSpec]:
        """Return nothing."""
        return []

    def buffers(self, dtype: Any) -> Buffers:
        """Return nothing."""
        return {}

    def forward(self, params: Params, x: Any, run: Pass, *, margin: int = 0) -> tuple[np.ndarray, relu.Cache | None]:
        """Return the rectified array, which is also what backward needs."""
        return (x, None) if run.mode == "flow" else relu.forward(x, in_place=True)

    def backward(self, dy: np.ndarray, cache: relu.Cache | None, grads: Grads) -> np.ndarray:
        """Return ``dx``."""
        return dy if cache is None else relu.backward(dy, cache, in_place=True)[0]
