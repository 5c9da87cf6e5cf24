"""Trains a small vision transformer on handwritten digits.

Each image is 16 patches of 3 x 3 pixels that overlap. Written with torch.nn's transformer layers,
for which `pydl.replace` has kernels of attention, layer normalisation and GELU. In the full form
97 % of the test images have to be right, in the short form 85 %.

    python -m examples.digits_vit --backend cpu
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples import training


class ViT(nn.Module):
    """Patches, layers that normalise first, and the mean of their output.

    Shape: (N, 1, 8, 8) to (N, 10).

    Source: Dosovitskiy et al. 2021, arXiv 2010.11929.
    """

    def __init__(self, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 3, 2, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(patches + self.positions)).mean(1))


def main(argv: list[str] | None = None) -> float:
    """Trains; returns the accuracy on the test images."""
    made = training.parser("digits_vit", "Trains a vision transformer on handwritten digits.")
    args = training.options(made, argv)
    model = ViT(32, 2) if args.short else ViT(64, 4)
    epochs, bound = (8, 0.85) if args.short else (60, 0.97)
    rate = 4e-3 if args.short else 2e-3
    return training.train_digits("digits_vit", model, args, epochs, rate, bound)


if __name__ == "__main__":
    main()
