"""The shapes of published networks, by hand: a witness of the models and of what counts their operations."""

from __future__ import annotations

import math
from typing import NamedTuple


class Layer(NamedTuple):
    """A linear map: the shape of its weight (OIHW), and the side of the square image that it makes (1 for a matrix)."""

    name: str
    shape: tuple[int, ...]
    side: int

    @property
    def weights(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        """Numbers that the layer makes of one image."""
        return self.shape[0] * self.side**2


def resnet50() -> list[Layer]:
    """ResNet-50 on images of 224 x 224, the stride of a block in its 3 x 3 convolution."""
    table = [Layer("conv1", (64, 3, 7, 7), 112)]
    inputs, side = 64, 56
    for stage, (blocks, channels) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            name, half = f"layer{stage}.{block}", stage > 1 and block == 0
            table.append(Layer(f"{name}.conv1", (channels, inputs, 1, 1), side))
            side //= 2 if half else 1
            table.append(Layer(f"{name}.conv2", (channels, channels, 3, 3), side))
            table.append(Layer(f"{name}.conv3", (4 * channels, channels, 1, 1), side))
            if block == 0:
                table.append(Layer(f"{name}.downsample.0", (4 * channels, inputs, 1, 1), side))
            inputs = 4 * channels
    return [*table, Layer("fc", (1000, 2048), 1)]


def mobilenet() -> list[Layer]:
    """MobileNetV1 on images of 224 x 224: a depthwise and a pointwise convolution in turn."""
    table, inputs, side = [Layer("conv1", (32, 3, 3, 3), 112)], 32, 112
    halved = (2, 4, 6, 12)
    channels = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for number, outputs in enumerate(channels, 1):
        side //= 2 if number in halved else 1
        table.append(Layer(f"depthwise {number}", (inputs, 1, 3, 3), side))
        table.append(Layer(f"pointwise {number}", (outputs, inputs, 1, 1), side))
        inputs = outputs
    return [*table, Layer("fc", (1000, 1024), 1)]


def resnet20(*, convolved_shortcuts: bool) -> list[Layer]:
    """ResNet-20 on images of 32 x 32, its shortcuts with convolutions or without."""
    table, inputs, side = [Layer("conv1", (16, 3, 3, 3), 32)], 16, 32
    for stage, channels in enumerate((16, 32, 64), 1):
        for block in range(3):
            half = stage > 1 and block == 0
            side //= 2 if half else 1
            table.append(Layer(f"layer{stage}.{block}.conv1", (channels, inputs, 3, 3), side))
            table.append(Layer(f"layer{stage}.{block}.conv2", (channels, channels, 3, 3), side))
            if half and convolved_shortcuts:
                table.append(Layer(f"layer{stage}.{block}.downsample.0", (channels, inputs, 1, 1), side))
            inputs = channels
    return [*table, Layer("fc", (10, 64), 1)]


def wide_resnet() -> list[Layer]:
    """Wide ResNet 28-10 as AC/DC's authors have it, the stride of a block in its second convolution."""
    table, inputs, side = [Layer("conv1", (16, 3, 3, 3), 32)], 16, 32
    for stage, channels in enumerate((160, 320, 640), 1):
        for block in range(4):
            name = f"layer{stage}.{block}"
            table.append(Layer(f"{name}.conv1", (channels, inputs, 3, 3), side))
            side //= 2 if stage > 1 and block == 0 else 1
            table.append(Layer(f"{name}.conv2", (channels, channels, 3, 3), side))
            if block == 0:
                table.append(Layer(f"{name}.shortcut.0", (channels, inputs, 1, 1), side))
            inputs = channels
    return [*table, Layer("linear", (100, 640), 1)]


def products(table: list[Layer]) -> int:
    """Return the multiplications and additions of one image's products."""
    return sum(2 * layer.weights * layer.side**2 for layer in table)
