r"""A small convolutional network for small images: minutes on a processor for all that AC/DC is about.

Units of a 3 x 3 convolution, batch norm and a rectifier; then the mean of each channel and a linear map:

.. math::
    h_0 = x, \qquad h_{k+1} = \max(\mathrm{BN}(W_k *_{s_k} h_k), 0), \qquad
    z = W\, \mathrm{mean}(h_L) + b

The strides :math:`s_k` take the place of pools. It is no published network. Of an image of 28 x 28 pixels the default
one makes 32 channels of 14 x 14 and 64 of 7 x 7, twice: 56,224 weights, 2.8 million multiplications.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from refimpl.models.conv_net import ConvNet, Stage, is_size
from refimpl.models.conv_units import Conv, ConvUnit, Head
from refimpl.models.initial import Initial


@dataclass(frozen=True)
class SmallConv(ConvNet):
    """The network; see the module. Unit k, from 1, is ``convK`` and ``bnK``; the linear map is ``fc``.

    Attributes
    ----------
    input_shape : tuple of int
        (channels, height, width) of one image.
    widths : tuple of int
        Channels that each unit makes. Kernels do best with multiples of 16.
    strides : tuple of int
        Of each unit's convolution: 2 halves the image.
    classes : int
    label_smoothing : float
        See :mod:`refimpl.layers.label_smoothing`.
    initial : {"he", "torch"}
        Initial distribution of the convolutions; see :func:`refimpl.models.initial.draw`.

    Raises
    ------
    ValueError
        If an option is outside its range, or widths and strides are not as many.
    """

    input_shape: tuple[int, ...] = (1, 28, 28)
    widths: tuple[int, ...] = (32, 64, 64)
    strides: tuple[int, ...] = (2, 2, 1)
    classes: int = 10
    label_smoothing: float = 0.0
    initial: Initial = "he"

    def __post_init__(self) -> None:
        self._check()
        for name in ("widths", "strides"):
            given = tuple(getattr(self, name))
            if not all(is_size(n) for n in given):
                raise ValueError(f"{name} is {given}; give whole numbers above 0, one for each unit")
            object.__setattr__(self, name, given)  # a list, as TOML has it, becomes hashable
        if not self.widths or len(self.widths) != len(self.strides):
            raise ValueError(
                f"there are {len(self.widths)} widths and {len(self.strides)} strides; give one of each for every "
                "unit, and at least one unit"
            )

    def describe(self) -> str:
        """Return in a few words what it is."""
        return f"small conv net, {'-'.join(map(str, self.widths))}"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """From the images to the scores."""
        units: list[ConvUnit] = []
        channels, *size = self.input_shape
        image, source = (size[0], size[1]), ""
        for k, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True), 1):
            conv = Conv(
                f"conv{k}", (width, channels, 3, 3), image, stride=stride, padding=1, source=source, first=k == 1
            )
            units.append(ConvUnit.of(conv, f"bn{k}"))
            channels, image, source = width, conv.output, conv.name
        return (*units, Head("fc", channels, self.classes, source))
