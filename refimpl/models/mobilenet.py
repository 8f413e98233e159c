r"""MobileNetV1: each convolution is split into a depthwise one, within channels, and a pointwise one, across them.

A unit is a convolution, batch norm and a rectifier. After a 3 x 3 unit on the image come 13 *blocks*, each a depthwise
3 x 3 unit and a pointwise 1 x 1 unit,

.. math::
    u = \max(\mathrm{BN}(D *_s h), 0), \quad u_c \text{ of } h_c \text{ alone}, \qquad
    h' = \max(\mathrm{BN}(P\, u), 0),

then the mean of each channel and a linear map to the classes. Of n x n pixels, m channels and m' outputs a block
multiplies :math:`n^2 m\,(9 + m')` times instead of :math:`9\, n^2 m\, m'`. For 224 x 224 pixels, 1000 classes and width
1 there are 28 weights that can be pruned with 4,209,088 entries, and 569 million multiplications.

Source: Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications", 2017
(arXiv:1704.04861), section 3; the width multiplier is section 3.3's.

Deviations
----------
- Names are those of the program of STR (Kusupati et al., "Soft threshold weight reparameterization for learnable
  sparsity", ICML 2020), whose network has the weights that AC/DC's authors count: ``model.0`` is the first unit,
  ``model.1`` to ``model.13`` the blocks, with 0 and 3 the convolutions and 1 and 4 the batch norms, and ``fc`` the last
  map. There ``fc`` is a 1 x 1 convolution without bias; here it is a linear map of as many weights, with a bias.
- The last depthwise convolution has stride 1, as in STR's program; the paper's table, as it is remembered, says 2.
- The mean is that of the whole image, whatever its size; the program's is over 7 x 7 pixels.
- A width multiplier that leaves a fraction of a channel is rounded.
- Convolutions begin with PyTorch's default, whose fan is that of a unit: 9 for a depthwise one. He's by fan-out would
  count the outputs of all channels there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from refimpl.models.conv_net import ConvNet, Stage
from refimpl.models.conv_units import Conv, ConvUnit, Head
from refimpl.models.initial import Initial

STEM = 32
"""Channels of the first unit."""
BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
)  # fmt: skip
"""Channels and stride of each block."""


@dataclass(frozen=True)
class MobileNetV1(ConvNet):
    """The network; see the module.

    Attributes
    ----------
    input_shape : tuple of int
        (channels, height, width) of one image.
    classes : int
    width_multiplier : float
        Every layer has that many times the channels.
    label_smoothing : float
        See :mod:`refimpl.layers.label_smoothing`.
    initial : {"he", "torch"}
        Initial distribution of the convolutions; see :func:`refimpl.models.initial.draw`.

    Raises
    ------
    ValueError
        If an option is outside its range.
    """

    input_shape: tuple[int, ...] = (3, 224, 224)
    classes: int = 1000
    width_multiplier: float = 1.0
    label_smoothing: float = 0.0
    initial: Initial = "torch"

    def __post_init__(self) -> None:
        self._check()
        if not 0 < self.width_multiplier < math.inf:
            raise ValueError(f"the width multiplier is {self.width_multiplier}; give a number above 0, such as 0.5")

    def describe(self) -> str:
        """Return in a few words what it is."""
        return f"MobileNetV1, width {self.width_multiplier:g}"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """From the images to the scores."""
        channels, height, across = self.input_shape
        m = self._channels(STEM)
        stem = Conv("model.0.0", (m, channels, 3, 3), (height, across), stride=2, padding=1, first=True)
        units = [ConvUnit.of(stem, "model.0.1")]
        for k, (outputs, stride) in enumerate(BLOCKS, 1):
            image, own = units[-1].output, self._channels(outputs)
            # The columns of a depthwise convolution are taps of one channel: no layer's units.
            depthwise = Conv(f"model.{k}.0", (m, 1, 3, 3), image, stride=stride, padding=1, groups=m)
            pointwise = Conv(f"model.{k}.3", (own, m, 1, 1), depthwise.output, source=depthwise.name)
            units += [ConvUnit.of(depthwise, f"model.{k}.1"), ConvUnit.of(pointwise, f"model.{k}.4")]
            m = own
        return (*units, Head("fc", m, self.classes, units[-1].conv.name))

    def _channels(self, of_width_one: int) -> int:
        return max(1, round(self.width_multiplier * of_width_one))
