"""Convolutions and a residual network in PyTorch, in either memory format, written as its users write them. Imported
only where torch is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench_torch import Arrays, load
from torch import nn
from torch.nn import functional

FORMATS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
"""Memory formats by the names in our tables: neither is the faster one for all shapes and threads."""


def images(x: np.ndarray, layout: str) -> torch.Tensor:
    """Return our images (C, H, W, B) as a tensor (B, C, H, W) of a memory format."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 0))).contiguous(memory_format=FORMATS[layout])


class ConvStep:
    """Forward and backward of one 3x3 convolution with padding 1: all gradients, of a ``dy`` that is given."""

    def __init__(self, w: np.ndarray, x: np.ndarray, dy: np.ndarray, layout: str) -> None:
        self.w = torch.tensor(w).contiguous(memory_format=FORMATS[layout]).requires_grad_()
        self.x = images(x, layout).requires_grad_()
        self.dy = images(dy, layout)

    def __call__(self) -> None:
        """Compute."""
        self.w.grad = self.x.grad = None
        functional.conv2d(self.x, self.w, padding=1).backward(self.dy)


class Block(nn.Module):
    """A basic block; where it changes the shape, the shortcut has every second pixel and channels of zeros."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.zeros = stride, (channels - inputs) // 2

    def forward(self, x: Any) -> Any:
        """Return the block's output."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.zeros:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.zeros, self.zeros))
        return functional.relu(y + x, inplace=True)


class ResNet(nn.Module):
    """The CIFAR form with shortcuts A; parameters are named as in ``refimpl.models.resnet``."""

    def __init__(self, depth: int, width: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for k in range(3):
            blocks = []
            for j in range(depth // 6):
                blocks.append(Block(channels, width << k, 2 if k and not j else 1))
                channels = width << k
            setattr(self, f"layer{k + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Any) -> Any:
        """Return the scores (batch, classes)."""
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class ResNetStep:
    """A training step of a residual network: cross-entropy, SGD with momentum."""

    def __init__(
        self, depth: int, width: int, params: Arrays, x: np.ndarray, labels: np.ndarray, lr: float, momentum: float,
        layout: str,
    ) -> None:  # fmt: skip
        self.model: Any = load(ResNet(depth, width), params)
        self.model.to(memory_format=FORMATS[layout])
        self.x, self.labels = images(x, layout), torch.from_numpy(labels)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    def __call__(self) -> float:
        """Take one step and return the loss before it."""
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()
