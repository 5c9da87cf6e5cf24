"""A generator and a discriminator of images, made of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn


class Generator(nn.Sequential):
    """Noise to images of 16 x 16 in [-1, 1], by transposed convolutions that double the size.

    Args:
        noise: The size of the noise.
        width: Channels before the last layer.
        channels: Of the image.

    Shape: (N, noise) to (N, channels, 16, 16).

    Source: Radford et al. 2016, arXiv 1511.06434.
    """

    def __init__(self, noise: int = 32, width: int = 16, channels: int = 1) -> None:
        sizes = (noise, 4 * width, 2 * width, width)
        layers: list[nn.Module] = [nn.Unflatten(1, (noise, 1, 1))]
        for i, (few, many) in enumerate(pairwise(sizes)):
            step = (1, 0) if i == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(few, many, 4, *step, bias=False), nn.BatchNorm2d(many)]
            layers.append(nn.ReLU())
        super().__init__(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Tanh())


class Discriminator(nn.Sequential):
    """Images of 16 x 16 to a score each.

    Args:
        width: Channels after the first layer.
        channels: Of the image.
        norm: What normalises between layers, made from a number of channels. A gradient penalty
            wants one that does not mix samples, such as `InstanceNorm2d`.

    Shape: (N, channels, 16, 16) to (N,).

    Source: Radford et al. 2016, arXiv 1511.06434.
    """

    def __init__(
        self, width: int = 16, channels: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for few, many in ((width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(few, many, 4, 2, 1, bias=False), norm(many), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 2), nn.Flatten(0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)
