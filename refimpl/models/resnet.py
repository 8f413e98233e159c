r"""Residual networks: each block adds what it computes to what it read.

.. math:: y = \max\bigl(F(x) + S(x),\ 0\bigr)

:math:`F` is two or three units of convolution and batch norm, rectified but for the last: 3x3 and 3x3 (*basic*), or
1x1, 3x3 and 1x1 to four times the channels (*bottleneck*). :math:`S` is the identity where :math:`F` keeps the shape.
Where it does not (the first block of a stage, of stride 2 from the second stage on), it is one of

- A: every second row and column of :math:`x`, and channels of zeros beside its own: no parameters;
- B: a 1x1 convolution of the same stride, and batch norm.

*Backward.* With :math:`g = dy \odot [y > 0]`: :math:`dx = J_F^\top g + J_S^\top g`.

=========  =========================================  ======================================  ============  =========
form       begins with                                stages                                  channels      shortcuts
=========  =========================================  ======================================  ============  =========
cifar      3x3                                        3 of n basic blocks, depth 6 n + 2      w, 2w, 4w     A
imagenet   7x7, stride 2; maximum of 3x3, stride 2    4 of 2-2-2-2 (18) or 3-4-6-3 (34)       w, 2w, 4w,    B
                                                      basic blocks, of 3-4-6-3 (50), 3-4-23-3  8w (x 4)
                                                      (101) or 3-8-36-3 (152) bottlenecks
=========  =========================================  ======================================  ============  =========

Both end with the mean of each channel and a linear map. ResNet-20 with w = 16 has 268,336 weights in 20 tensors, with
shortcuts B 270,896 in 22; ResNet-50 with w = 64 for 1000 classes 25,502,912 in 54. Names are those of torchvision's
state dicts, in the CIFAR form too.

Sources: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, sections 3.3 and 4.2, table 1.

Deviations
----------
A bottleneck has its stride in the 3x3 convolution, as in torchvision and the pruning literature, and not, as in the
paper, in the first 1x1. The zeros of shortcut A are in equal parts before and after the channels, as in the widespread
PyTorch programs for CIFAR; the paper does not say where, and up to the order of channels it is the same network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl.layers.batch_norm import Buffers
from refimpl.layers.padded import image_of
from refimpl.models.conv_net import ConvNet, Stage, is_size
from refimpl.models.conv_units import Conv, ConvUnit, Head, Image, Initial, MaxPool, Pass, UnitCache
from refimpl.weights import Grads, Params, ParamSpec

IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks in each stage by depth; bottlenecks from 50 on."""
EXPANSION = 4
"""Channels that a bottleneck returns, in units of those between its convolutions."""


@dataclass(frozen=True)
class Skip:
    """Shortcut without parameters: the identity; or every ``stride``-th row and column among channels of zeros.

    Attributes
    ----------
    inputs, outputs : int
        Channels read and returned.
    stride : int
    """

    inputs: int
    outputs: int
    stride: int

    def specs(self) -> list[ParamSpec]:
        """Return nothing."""
        return []

    def buffers(self, dtype: Any) -> Buffers:
        """Return nothing."""
        return {}

    def forward(self, params: Params, x: Image, run: Pass) -> tuple[Image, tuple[int, ...]]:
        """Return the shortcut's output, ``x`` itself for the identity, and the shape of ``x``."""
        if self._identity:
            return x, x.shape
        seen = image_of(x)[:, :: self.stride, :: self.stride]
        y = np.zeros((self.outputs, *seen.shape[1:]), x.dtype)
        y[self._place] = seen
        return y, x.shape

    def backward(self, dy: Image, cache: tuple[int, ...], grads: Grads) -> Image:
        """Return ``dx``, ``dy`` itself for the identity."""
        if self._identity:
            return dy
        dx = np.zeros(cache, dy.dtype)
        dx[:, :: self.stride, :: self.stride] = image_of(dy)[self._place]
        return dx

    @property
    def _identity(self) -> bool:
        return self.inputs == self.outputs and self.stride == 1

    @property
    def _place(self) -> slice:
        before = (self.outputs - self.inputs) // 2
        return slice(before, before + self.inputs)


class BlockCache(NamedTuple):
    """What backward of a block needs."""

    units: list[UnitCache]
    shortcut: Any


@dataclass(frozen=True)
class Block:
    """A residual block: units, to the last of which the shortcut is added before it is rectified.

    Attributes
    ----------
    units : tuple of ConvUnit
    shortcut : Skip or ConvUnit
        The latter without a rectifier.
    """

    units: tuple[ConvUnit, ...]
    shortcut: Skip | ConvUnit

    @property
    def padding(self) -> int:
        """Zeros around its input."""
        return self.units[0].padding

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of what it returns."""
        return self.units[-1].output

    def specs(self) -> list[ParamSpec]:
        """Describe its parameters."""
        return [spec for part in (*self.units, self.shortcut) for spec in part.specs()]

    def buffers(self, dtype: Any) -> Buffers:
        """Return the running statistics before the first batch."""
        parts = (*self.units, self.shortcut)
        return {name: array for part in parts for name, array in part.buffers(dtype).items()}

    def forward(self, params: Params, x: Image, run: Pass, *, margin: int = 0) -> tuple[Image, BlockCache]:
        """Return the block's output and what backward needs."""
        beside, skipped = self.shortcut.forward(params, x, run)
        caches = []
        for unit, reader in zip(self.units, self.units[1:], strict=False):
            x, cache = unit.forward(params, x, run, margin=reader.padding)
            caches.append(cache)
        y, cache = self.units[-1].forward(params, x, run, add=beside, margin=margin)
        return y, BlockCache([*caches, cache], skipped)

    def backward(self, dy: Image, cache: BlockCache, grads: Grads) -> np.ndarray:
        """Add the gradients of its parameters to ``grads`` and return ``dx``."""
        dx, beside = self.units[-1].backward_both(dy, cache.units[-1], grads)
        for unit, own in zip(self.units[-2::-1], cache.units[-2::-1], strict=True):
            assert dx is not None
            dx = unit.backward(dx, own, grads)
        assert dx is not None
        assert beside is not None
        through = self.shortcut.backward(beside, cache.shortcut, grads)
        assert through is not None
        dx += image_of(through)  # a new array, which nobody else holds
        return dx


@dataclass(frozen=True)
class ResNet(ConvNet):
    """A residual network; see the module.

    Attributes
    ----------
    depth : int
        Layers with weights on the longest path: 6 n + 2 in the CIFAR form; 18, 34, 50, 101 or 152 in the other.
    classes : int
        0 for the form's own, 10 or 1000.
    width : int
        Channels w of the first stage; 0 for the form's own, 16 or 64.
    shortcut : {"", "A", "B"}
        Where a block changes the shape; empty for the form's own.
    form : {"", "cifar", "imagenet"}
        Empty for that in which the depth is published: 18, 34, 50, 101 and 152 are for ImageNet, others for CIFAR.
    input_shape : (int, int, int)
        (channels, height, width) of one image; empty for the form's own, (3, 32, 32) or (3, 224, 224).
    label_smoothing : float
    initial : {"he", "torch"}
        Initial distribution of the convolutions; see :func:`refimpl.models.initial.draw`.

    Raises
    ------
    ValueError
        If there is no such depth in the form, or a number or a name is not among those above.
    """

    depth: int = 20
    classes: int = 0
    width: int = 0
    shortcut: Literal["", "A", "B"] = ""
    form: Literal["", "cifar", "imagenet"] = ""
    input_shape: tuple[int, ...] = ()
    label_smoothing: float = 0.0
    initial: Initial = "he"

    def __post_init__(self) -> None:
        form = self.form or ("imagenet" if self.depth in IMAGENET else "cifar")
        own = {"classes": 10, "width": 16, "shortcut": "A", "input_shape": (3, 32, 32)}
        if form == "imagenet":
            own = {"classes": 1000, "width": 64, "shortcut": "B", "input_shape": (3, 224, 224)}
        for name, value in (own | {"form": form}).items():
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.form not in ("cifar", "imagenet"):
            raise ValueError(f"the form of the residual network is {self.form!r}; give 'cifar' or 'imagenet'")
        if self.form == "cifar" and (self.depth < 8 or self.depth % 6 != 2):
            raise ValueError(
                f"the depth is {self.depth}; a residual network in the CIFAR form has 6 n + 2 layers: give 8, 14, 20, "
                "32, 44, 56, 110 ..."
            )
        if self.form == "imagenet" and self.depth not in IMAGENET:
            raise ValueError(
                f"the depth is {self.depth}; a residual network in the ImageNet form has one of {sorted(IMAGENET)}"
            )
        if self.shortcut not in ("A", "B"):
            raise ValueError(f"the shortcut is {self.shortcut!r}; give 'A' (zero channels) or 'B' (1x1 convolutions)")
        if not is_size(self.width):
            raise ValueError(f"width is {self.width!r}; give the channels of the first stage, a whole number above 0")
        self._check()

    def describe(self) -> str:
        """Return in a few words what it is."""
        return f"ResNet-{self.depth} ({self.form}), {self.width} channels, shortcuts {self.shortcut}"

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """From the images to the scores: first convolution, blocks, head."""
        first, height, width = self.input_shape
        stages: list[Any] = []
        if self.form == "cifar":
            counts: tuple[int, ...] = (self.depth // 6,) * 3
            conv = Conv("conv1", (self.width, first, 3, 3), (height, width), padding=1, first=True)
            stages.append(ConvUnit.of(conv, "bn1"))
        else:
            counts = IMAGENET[self.depth]
            conv = Conv("conv1", (self.width, first, 7, 7), (height, width), stride=2, padding=3, first=True)
            stages += [ConvUnit.of(conv, "bn1"), MaxPool(conv.output, 3, stride=2, around=1)]
        channels = self.width
        make = self._bottleneck if self.form == "imagenet" and self.depth >= 50 else self._basic
        for k, count in enumerate(counts):
            for j in range(count):
                block = make(f"layer{k + 1}.{j}", channels, self.width << k, stages[-1].output, 2 if k and not j else 1)
                stages.append(block)
                channels = block.units[-1].conv.shape[0]
        return (*stages, Head("fc", channels, self.classes))

    def _basic(self, name: str, inputs: int, channels: int, image: tuple[int, int], stride: int) -> Block:
        conv1 = Conv(f"{name}.conv1", (channels, inputs, 3, 3), image, stride, padding=1)
        conv2 = Conv(f"{name}.conv2", (channels, channels, 3, 3), conv1.output, padding=1, source=conv1.name)
        units = ConvUnit.of(conv1, f"{name}.bn1"), ConvUnit.of(conv2, f"{name}.bn2")
        return Block(units, self._shortcut(name, inputs, channels, image, stride))

    def _bottleneck(self, name: str, inputs: int, channels: int, image: tuple[int, int], stride: int) -> Block:
        wide = EXPANSION * channels
        conv1 = Conv(f"{name}.conv1", (channels, inputs, 1, 1), image)
        conv2 = Conv(f"{name}.conv2", (channels, channels, 3, 3), image, stride, padding=1, source=conv1.name)
        conv3 = Conv(f"{name}.conv3", (wide, channels, 1, 1), conv2.output, source=conv2.name)
        units = tuple(ConvUnit.of(conv, f"{name}.bn{k + 1}") for k, conv in enumerate((conv1, conv2, conv3)))
        return Block(units, self._shortcut(name, inputs, wide, image, stride))

    def _shortcut(self, name: str, inputs: int, outputs: int, image: tuple[int, int], stride: int) -> Skip | ConvUnit:
        if self.shortcut == "A" or (inputs == outputs and stride == 1):
            return Skip(inputs, outputs, stride)
        conv = Conv(f"{name}.downsample.0", (outputs, inputs, 1, 1), image, stride)
        return ConvUnit.of(conv, f"{name}.downsample.1", rectify=False)
