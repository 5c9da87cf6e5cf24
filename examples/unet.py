"""A small U-Net: images to a map of logits of the same size."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """An encoder that halves the image `depth` times, and a decoder that sees what it had.

    Args:
        channels: Of the image.
        classes: Logits per pixel.
        width: Channels at full size; twice as many at each half.
        depth: How often the size is halved.

    Shape: (N, channels, H, W) to (N, classes, H, W), H and W multiples of `2 ** depth`.

    Source: Ronneberger et al. 2015, arXiv 1505.04597.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        sizes = [width << level for level in range(depth + 1)]
        self.first = DoubleConv(channels, width)
        pairs = list(pairwise(sizes))
        self.down = nn.ModuleList(DoubleConv(few, many) for few, many in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(many, few, 2, 2) for few, many in pairs[::-1])
        self.merge = nn.ModuleList(DoubleConv(2 * few, few) for few, _ in pairs[::-1])
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(self.pool(kept[-1])))
        x = kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((kept.pop(), up(x)), 1))
        return self.last(x)
