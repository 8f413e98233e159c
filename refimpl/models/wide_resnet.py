r"""Wide residual networks: few blocks of many channels, whose normalisation comes before each convolution.

With :math:`\rho(x) = \max(N(x), 0)`, batch norm and rectifier, a block is

.. math:: y = W_2 * D\bigl(\rho_2(W_1 * \rho_1(x))\bigr) + S(x)

where the convolutions are 3x3, :math:`D` is dropout, and :math:`S(x) = x` unless the block changes the shape: then
:math:`S(x) = W_s * \rho_1(x)` with a 1x1 convolution. Nothing follows the sum, so that a gradient passes all identities
unchanged.

*Backward.* With :math:`dn_1` the gradient of :math:`\rho_1(x)`, from :math:`W_1` and, if there is one, from
:math:`W_s`: :math:`dx = J_{\rho_1}^\top dn_1`, and :math:`dy` besides where :math:`S` is the identity.

The network has a 3x3 convolution to 16 channels; three stages of n blocks of :math:`16k`, :math:`32k` and :math:`64k`
channels, the second and third of which begin with stride 2; :math:`\rho`; the mean of each channel; a linear map.
Depth is :math:`6 n + 4`, and the widening :math:`k`: WRN-28-10 for 100 classes has 36,518,832 weights in 29 tensors.

Sources: Zagoruyko, Komodakis, "Wide residual networks", BMVC 2016, sections 2 and 2.4; the order within a block: He,
Zhang, Ren, Sun, "Identity mappings in deep residual networks", ECCV 2016.

Deviations
----------
The paper does not say which convolution of a block has its stride: here the first. The network that AC/DC's authors
train is another one, and ``form="acdc"`` gives it: convolutions have biases, the second one has the stride (which makes
the forward pass more expensive), dropout comes before :math:`\rho_2`, :math:`W_s` reads :math:`x` itself, and the last
batch norm has momentum 0.9. Names are those of that program's state dict in both forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.layers import conv2d, dropout
from refimpl.layers.batch_norm import Buffers
from refimpl.layers.padded import image_of
from refimpl.models.conv_net import ConvNet, Stage, is_size
from refimpl.models.conv_units import Conv, Head, Image, Initial, Norm, Pass
from refimpl.weights import Grads, Params, ParamSpec

FIRST = 16
"""Channels of the first convolution, and of a stage before it is widened."""


class BlockCache(NamedTuple):
    """What backward of a block needs."""

    norm1: Any
    conv1: conv2d.Cache
    norm2: Any
    conv2: conv2d.Cache
    shortcut: conv2d.Cache | None
    dropped: dropout.Cache


@dataclass(frozen=True)
class WideBlock:
    """A residual block that normalises before it convolves.

    Attributes
    ----------
    name : str
    norm1, conv1, norm2, conv2 : Norm, Conv
        In the order in which they are applied.
    shortcut : Conv or None
        None for the identity.
    dropout : float
        Share of the numbers between the convolutions that a training step drops.
    form : {"paper", "acdc"}
        Whether dropout comes after or before ``norm2``, and the shortcut's convolution reads what ``norm1`` returns or
        the block's input.
    """

    name: str
    norm1: Norm
    conv1: Conv
    norm2: Norm
    conv2: Conv
    shortcut: Conv | None
    dropout: float
    form: Literal["paper", "acdc"]
    padding = 0

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of what it returns."""
        return self.conv2.output

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        beside = self.shortcut.specs() if self.shortcut is not None else []
        inside = (self.norm1, self.conv1, self.norm2, self.conv2)
        return [*(spec for part in inside for spec in part.specs()), *beside]

    def buffers(self, dtype: Any) -> Buffers:
        """Return the running statistics before the first batch."""
        return self.norm1.buffers(dtype) | self.norm2.buffers(dtype)

    def forward(self, params: Params, x: Image, run: Pass, *, margin: int = 0) -> tuple[np.ndarray, BlockCache]:
        """Return the block's output, without a margin, and what backward needs."""
        rng = run.draws(f"dropout/{self.name}") if run.draws is not None and self.dropout else None
        dropped = None

        first, normed1 = self.norm1.forward(params, x, run, margin=self.conv1.padding)
        h, convolved1 = self.conv1.forward(params, first, run)
        if self.form == "acdc":
            h, dropped = dropout.forward(h, self.dropout, rng=rng)
        after = rng is not None and self.form == "paper"  # dropout makes a new image, which needs no margin before it
        second, normed2 = self.norm2.forward(params, h, run, margin=0 if after else self.conv2.padding)
        if after:
            second, dropped = dropout.forward(image_of(second), self.dropout, rng=rng)
        y, convolved2 = self.conv2.forward(params, second, run)

        beside, convolved = x, None
        if self.shortcut is not None:
            beside, convolved = self.shortcut.forward(params, first if self.form == "paper" else x, run)
        y += image_of(beside)
        return y, BlockCache(normed1, convolved1, normed2, convolved2, convolved, dropped)

    def backward(self, dy: Image, cache: BlockCache, grads: Grads) -> np.ndarray:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        beside: Any = dy
        if self.shortcut is not None and cache.shortcut is not None:
            beside = self.shortcut.backward(dy, cache.shortcut, grads)

        d_second = self.conv2.backward(dy, cache.conv2, grads)
        assert d_second is not None
        if self.form == "paper":
            d_second = dropout.backward(d_second, cache.dropped)
        undropped = self.form == "paper" or cache.dropped is None
        dh, _ = self.norm2.backward_both(
            d_second, cache.norm2, grads, margin=self.conv1.gradient_margin if undropped else 0
        )
        if not undropped:
            dh = dropout.backward(image_of(dh), cache.dropped)
        d_first = self.conv1.backward(dh, cache.conv1, grads)
        assert d_first is not None
        joins_first = self.shortcut is not None and self.form == "paper"
        if joins_first:
            d_first += beside
        dx = image_of(self.norm1.backward(d_first, cache.norm1, grads))
        if not joins_first:
            dx += image_of(beside)  # dx is a new array, which nobody else holds
        return dx


@dataclass(frozen=True)
class WideResNet(ConvNet):
    """A wide residual network; see the module.

    Attributes
    ----------
    depth : int
        6 n + 4.
    widen : int
        k.
    classes : int
    dropout : float
        Share of the numbers that a training step drops between the convolutions of each block; 0.3 in the experiments
        that use it.
    form : {"paper", "acdc"}
        The second is the network of AC/DC's authors.
    input_shape : (int, int, int)
        (channels, height, width) of one image.
    label_smoothing : float
    initial : {"he", "torch"}
        Initial distribution of the convolutions; see :func:`refimpl.models.initial.draw`.

    Raises
    ------
    ValueError
        If the depth is not 6 n + 4, or an option not among those above.
    """

    depth: int = 28
    widen: int = 10
    classes: int = 100
    dropout: float = 0.0
    form: Literal["paper", "acdc"] = "paper"
    input_shape: tuple[int, ...] = (3, 32, 32)
    label_smoothing: float = 0.0
    initial: Initial = "he"

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(
                f"the depth is {self.depth}; a wide residual network has 6 n + 4 layers: 10, 16, 22, 28 ..."
            )
        if not is_size(self.widen):
            raise ValueError(f"widen is {self.widen!r}; give a whole number above 0, by which channels are multiplied")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the dropout is {self.dropout}; give a number from 0, and below 1")
        if self.form not in ("paper", "acdc"):
            raise ValueError(f"the form of the wide residual network is {self.form!r}; give 'paper' or 'acdc'")
        self._check()

    def describe(self) -> str:
        """Return in a few words what it is."""
        form = "" if self.form == "paper" else ", AC/DC's form"
        return f"WRN-{self.depth}-{self.widen}{form}, dropout {self.dropout:g}"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """From the images to the scores: first convolution, blocks, batch norm, head."""
        first, height, width = self.input_shape
        bias = self.form == "acdc"
        stem = Conv("conv1", (FIRST, first, 3, 3), (height, width), padding=1, bias=bias, first=True)
        stages: list[Any] = [stem]
        channels, image = FIRST, stem.output
        for k in range(3):
            for j in range((self.depth - 4) // 6):
                outputs, stride = FIRST * self.widen << k, 2 if k and not j else 1
                block = self._block(f"layer{k + 1}.{j}", channels, outputs, image, stride)
                stages.append(block)
                channels, image = outputs, block.output
        last = Norm("bn1", channels, image, momentum=0.9 if self.form == "acdc" else 0.1)
        return (*stages, last, Head("linear", channels, self.classes))

    def _block(self, name: str, inputs: int, channels: int, image: tuple[int, int], stride: int) -> WideBlock:
        bias = self.form == "acdc"
        strides = (1, stride) if self.form == "acdc" else (stride, 1)
        conv1 = Conv(f"{name}.conv1", (channels, inputs, 3, 3), image, strides[0], padding=1, bias=bias)
        conv2 = Conv(
            f"{name}.conv2", (channels, channels, 3, 3), conv1.output, strides[1], padding=1, bias=bias,
            source=conv1.name,
        )  # fmt: skip
        shortcut = None
        if inputs != channels or stride != 1:
            shortcut = Conv(f"{name}.shortcut.0", (channels, inputs, 1, 1), image, stride, bias=bias)
        norms = Norm(f"{name}.bn1", inputs, image), Norm(f"{name}.bn2", channels, conv1.output, conv1.name)
        return WideBlock(name, norms[0], conv1, norms[1], conv2, shortcut, self.dropout, self.form)
