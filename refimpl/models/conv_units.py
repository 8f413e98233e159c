r"""The pieces that convolutional networks are made of, each with its forward and its backward pass.

=============  ====================================================================================================
`Conv`         a convolution, :math:`W * x + b`
`Norm`         batch norm, an addition and a rectifier, each of the last two if wanted: :math:`\max(N(x) + a, 0)`
`ConvUnit`     both: :math:`\max(N(W * x) + a, 0)`
`MaxPool`      the greatest of each window
`Head`         the mean of each channel and a linear map to the classes
=============  ====================================================================================================

A piece is a frozen dataclass that knows its names and shapes, so that a network is a list of them
(:class:`refimpl.models.conv_net.ConvNet`). All have

``specs()``
    Its trained parameters, a list in the order of a PyTorch state dict.
``buffers(dtype)``
    Its running statistics before the first batch, by name.
``padding``
    Zeros around its input, which it need not copy if it is given them (:class:`refimpl.layers.padded.Padded`).
``forward(params, x, run, *, margin=0)``
    Returns ``y`` (C, H, W, B), with ``margin`` zeros around it where it can, and the cache. ``params`` holds the
    buffers too.
``backward(dy, cache, grads)``
    Adds to ``grads`` and returns ``dx``; None from the first convolution, whose input is no activation.

One forward pass does for all purposes, which ``run`` (:class:`Pass`) tells: *train* normalises by the batch and puts
the new running statistics into ``run.buffers``; *evaluate* normalises by the running ones; *flow* is the linear network
of the weights alone, as SynFlow asks for it: without biases, batch norm, rectifiers and dropout, and with the mean
instead of the maximum. Backward follows from the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.layers import batch_norm, conv2d, linear, pooling
from refimpl.layers.batch_norm import Buffers
from refimpl.layers.padded import Padded, image_of
from refimpl.layers.windows import Windows
from refimpl.models.initial import Initial, draw
from refimpl.rng import Draws
from refimpl.weights import Grads, Params, ParamSpec, Shape

__all__ = ["Conv", "ConvUnit", "Head", "Image", "Initial", "MaxPool", "Norm", "Pass", "UnitCache", "draw"]

Image = np.ndarray | Padded
"""Images (C, H, W, B), with or without a margin of zeros."""


@dataclass(frozen=True)
class Pass:
    """What a forward pass is for, and what comes out of it beside activations.

    Attributes
    ----------
    mode : {"train", "evaluate", "flow"}
    buffers : Buffers
        Training puts the running statistics after the batch in here.
    draws : Draws, optional
        The step's random draws; without them nothing is dropped.
    """

    mode: Literal["train", "evaluate", "flow"]
    buffers: Buffers = field(default_factory=dict)
    draws: Draws | None = None


@dataclass(frozen=True)
class Conv:
    """A convolution of square kernels.

    Attributes
    ----------
    name : str
        Of the layer; its parameters are ``name.weight`` and, with ``bias``, ``name.bias``.
    shape : tuple of int
        Of the weight, (O, I / groups, k, k).
    image : (int, int)
        Height and width of what it reads.
    stride, padding, groups : int
    bias : bool
    source : str
        Layer whose channels it reads; empty if they are no layer's, such as the sum that a residual block reads.
    first : bool
        Whether it reads the network's input, so that no input gradient is needed.
    """

    name: str
    shape: Shape
    image: tuple[int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False
    source: str = ""
    first: bool = False

    @cached_property
    def output(self) -> tuple[int, int]:
        """Height and width of what it returns."""
        return Windows.of((self.shape[2], self.shape[3]), self.stride, self.padding).size(self.image)

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        outputs, inputs, *kernel = self.shape
        taps, positions = math.prod(kernel), math.prod(self.output)
        fan_in = inputs * taps
        specs = [
            ParamSpec(
                f"{self.name}.weight", self.shape, "conv", True, fan_in=fan_in, fan_out=outputs * taps,
                columns_per_sample=positions, input_gradient=not self.first, layer=self.name, source=self.source,
            )
        ]  # fmt: skip
        if self.bias:
            specs.append(
                ParamSpec(
                    f"{self.name}.bias", (outputs,), "bias", fan_in=fan_in, columns_per_sample=positions,
                    layer=self.name,
                )
            )  # fmt: skip
        return specs

    def buffers(self, dtype: Any) -> Buffers:
        """Return nothing."""
        return {}

    def forward(self, params: Params, x: Image, run: Pass, *, margin: int = 0) -> tuple[np.ndarray, conv2d.Cache]:
        """Return the convolution, always without a margin, and what backward needs."""
        bias = f"{self.name}.bias" if self.bias and run.mode != "flow" else None
        return conv2d.forward(
            params, f"{self.name}.weight", bias, x, stride=self.stride, padding=self.padding, groups=self.groups
        )

    def backward(self, dy: Image, cache: conv2d.Cache, grads: Grads) -> np.ndarray | None:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        return conv2d.backward(dy, cache, grads, input_gradient=not self.first)

    @cached_property
    def gradient_margin(self) -> int:
        """Zeros around ``dy`` that spare backward a copy: how far beyond it the taps of the outermost pixels reach."""
        if self.first:
            return 0
        kernel, sizes = self.shape[2], zip(self.image, self.output, strict=True)
        before = (kernel - 1 - self.padding) // self.stride
        after = max((pixels - 1 + self.padding) // self.stride - (outputs - 1) for pixels, outputs in sizes)
        return max(before, after, 0)


@dataclass(frozen=True)
class Norm:
    r"""Batch norm, an addition if one is given, and a rectifier if wanted: :math:`\max(N(x) + a, 0)`.

    Attributes
    ----------
    name : str
        Of the layer; its parameters and buffers have the names of a PyTorch state dict.
    channels : int
    image : (int, int)
        Height and width of what it reads and returns.
    layer : str
        Layer whose channels it normalises; its own name if empty.
    rectify : bool
    momentum : float
        Weight of a batch in the running statistics.
    """

    name: str
    channels: int
    image: tuple[int, int]
    layer: str = ""
    rectify: bool = True
    momentum: float = 0.1
    padding = 0

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of what it returns."""
        return self.image

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        return [
            ParamSpec(
                f"{self.name}.{part}", (self.channels,), "norm", columns_per_sample=math.prod(self.image),
                layer=self.layer or self.name,
            )
            for part in ("weight", "bias")
        ]  # fmt: skip

    def buffers(self, dtype: Any) -> Buffers:
        """Return the running statistics before the first batch."""
        return batch_norm.new_buffers(self.name, self.channels, dtype)

    def forward(
        self, params: Params, x: Image, run: Pass, *, add: Image | None = None, margin: int = 0
    ) -> tuple[Image, batch_norm.Cache | None]:
        """Return what is normalised, added to ``add`` and rectified; and what backward needs."""
        if run.mode == "flow":
            return (x if add is None else image_of(x) + image_of(add)), None
        y, cache, buffers = batch_norm.forward(
            params, self.name, x,
            train=run.mode == "train", momentum=self.momentum, add=add, rectify=self.rectify, margin=margin,
        )  # fmt: skip
        run.buffers.update(buffers)
        return y, cache

    def backward_both(
        self, dy: Image, cache: batch_norm.Cache | None, grads: Grads, *, margin: int = 0
    ) -> tuple[Image, Image | None]:
        """Add the gradients of its parameters to ``grads`` and return those of ``x``, with a margin, and of ``add``.

        The latter is None if batch norm was given nothing to add, and may be ``dy`` itself.
        """
        if cache is None:  # the flow, which passed unchanged
            return dy, dy
        dx, added = batch_norm.backward(dy, cache, grads, margin=margin)
        assert dx is not None
        return dx, added

    def backward(self, dy: Image, cache: batch_norm.Cache | None, grads: Grads) -> Image:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        return self.backward_both(dy, cache, grads)[0]


class UnitCache(NamedTuple):
    """What backward of a unit needs."""

    conv: conv2d.Cache
    norm: batch_norm.Cache | None


@dataclass(frozen=True)
class ConvUnit:
    r"""A convolution, then its batch norm, an addition if one is given, and a rectifier: :math:`\max(N(W * x) + a, 0)`.

    Attributes
    ----------
    conv : Conv
    norm : Norm
    """

    conv: Conv
    norm: Norm

    @classmethod
    def of(cls, conv: Conv, norm: str, *, rectify: bool = True) -> ConvUnit:
        """Return a unit of a convolution and a batch norm of that name."""
        return cls(conv, Norm(norm, conv.shape[0], conv.output, conv.name, rectify))

    @property
    def padding(self) -> int:
        """Zeros around its input."""
        return self.conv.padding

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of what it returns."""
        return self.conv.output

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        return [*self.conv.specs(), *self.norm.specs()]

    def buffers(self, dtype: Any) -> Buffers:
        """Return the running statistics before the first batch."""
        return self.norm.buffers(dtype)

    def forward(
        self, params: Params, x: Image, run: Pass, *, add: Image | None = None, margin: int = 0
    ) -> tuple[Image, UnitCache]:
        """Return the unit's output and what backward needs."""
        z, convolved = self.conv.forward(params, x, run)
        y, normed = self.norm.forward(params, z, run, add=add, margin=margin)
        return y, UnitCache(convolved, normed)

    def backward_both(self, dy: Image, cache: UnitCache, grads: Grads) -> tuple[np.ndarray | None, Image | None]:
        """Add the gradients of its parameters to ``grads`` and return those of ``x`` and of ``add``."""
        dz, added = self.norm.backward_both(dy, cache.norm, grads, margin=self.conv.gradient_margin)
        return self.conv.backward(dz, cache.conv, grads), added

    def backward(self, dy: Image, cache: UnitCache, grads: Grads) -> np.ndarray | None:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        return self.backward_both(dy, cache, grads)[0]


@dataclass(frozen=True)
class MaxPool:
    """The greatest number of each window; in a flow, their mean, of the pixels that are no padding.

    Attributes
    ----------
    image : (int, int)
        Height and width of what it reads.
    kernel, stride, around : int
        Size of a window, the step between them, and the padding.
    """

    image: tuple[int, int]
    kernel: int
    stride: int
    around: int = 0
    padding = 0  # what lies around an image here is less than any number, not zero

    @cached_property
    def output(self) -> tuple[int, int]:
        """Height and width of what it returns."""
        return Windows.of(self.kernel, self.stride, self.around).size(self.image)

    def specs(self) -> list[ParamSpec]:
        """Return nothing."""
        return []

    def buffers(self, dtype: Any) -> Buffers:
        """Return nothing."""
        return {}

    def forward(
        self, params: Params, x: Image, run: Pass, *, margin: int = 0
    ) -> tuple[Image, pooling.MaxCache | pooling.AverageCache]:
        """Return the pooled image, in a flow without a margin, and what backward needs."""
        sizes = {"stride": self.stride, "padding": self.around}
        if run.mode == "flow":
            return pooling.average_forward(x, self.kernel, **sizes, count_include_pad=False)
        return pooling.max_forward(x, self.kernel, **sizes, margin=margin)

    def backward(self, dy: Image, cache: pooling.MaxCache | pooling.AverageCache, grads: Grads) -> np.ndarray:
        """Return ``dx``."""
        if isinstance(cache, pooling.AverageCache):
            return pooling.average_backward(dy, cache)
        return pooling.max_backward(dy, cache)


class HeadCache(NamedTuple):
    """What backward of the head needs."""

    linear: linear.Cache
    image: tuple[int, ...]  # shape of the input


@dataclass(frozen=True)
class Head:
    """The mean of each channel over the image, and a linear map from the channels to scores of the classes.

    Attributes
    ----------
    name : str
        Of the linear map; its parameters are ``name.weight`` and ``name.bias``.
    channels, classes : int
    source : str
        Layer whose channels it reads, as in `Conv`.
    """

    name: str
    channels: int
    classes: int
    source: str = ""
    padding = 0

    @property
    def names(self) -> tuple[str, str]:
        """Names of the weight and the bias."""
        return f"{self.name}.weight", f"{self.name}.bias"

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        (weight, bias), fan_in, fan_out = self.names, self.channels, self.classes
        return [
            ParamSpec(
                weight, (fan_out, fan_in), "linear", True,
                fan_in=fan_in, fan_out=fan_out, layer=self.name, source=self.source,
            ),
            ParamSpec(bias, (fan_out,), "bias", fan_in=fan_in, layer=self.name),
        ]  # fmt: skip

    def buffers(self, dtype: Any) -> Buffers:
        """Return nothing."""
        return {}

    def forward(self, params: Params, x: Image, run: Pass, *, margin: int = 0) -> tuple[np.ndarray, HeadCache]:
        """Return the scores (classes, batch) of images (C, H, W, B), and what backward needs."""
        means, shape = pooling.global_average_forward(image_of(x))  # (C, B)
        weight, bias = self.names
        scores, cache = linear.forward(params, weight, None if run.mode == "flow" else bias, means)
        return scores, HeadCache(cache, shape)

    def backward(self, dy: np.ndarray, cache: HeadCache, grads: Grads) -> np.ndarray:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        d_means = linear.backward(dy, cache.linear, grads)
        assert d_means is not None
        return pooling.global_average_backward(d_means, cache.image)
