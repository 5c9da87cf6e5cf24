"""Trains a generator of handwritten digits against a critic whose gradient is held near 1.

The penalty differentiates the critic's gradient, so that activations and normalisations are
differentiated twice. Judged by the sliced Wasserstein distance of 1,024 generated images from the
real ones, as a share of that before training: it has to fall below 0.15 in the full form, and below
0.6 in the short one.

    python -m examples.wgan_gp --backend cpu
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples import training
from examples.dcgan import Discriminator, Generator

NOISE, WEIGHT, CRITIC_STEPS = 32, 10.0, 3


def norm(channels: int) -> nn.Module:
    """Of each sample by itself, as the penalty wants it."""
    return nn.InstanceNorm2d(channels, affine=True)


def penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """`(|gradient| - 1)^2` at points between real and generated images.

    Source: Gulrajani et al. 2017, arXiv 1704.00028.
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def distance(some: Tensor, others: Tensor, directions: int = 128) -> float:
    """Sliced Wasserstein distance: the mean over random directions of how far sorted projections
    are apart."""
    generator = torch.Generator().manual_seed(0)
    onto = torch.randn(some[0].numel(), directions, generator=generator).to(some.device)
    a, b = ((x.flatten(1) @ (onto / onto.norm(dim=0))).sort(0).values for x in (some, others))
    return (a - b).abs().mean().item()


def train(args: Namespace) -> tuple[training.Curves, Tensor, float]:
    """(the curves, generated images, their distance by that before training)."""
    steps, width, batch, rate = (40, 6, 32, 5e-3) if args.short else (700, 16, 64, 2e-3)
    real = 2 * training.digits(args, 16)[0] - 1
    generator = training.replaced(Generator(NOISE, width), args)
    critic = training.replaced(Discriminator(width, norm=norm), args)
    betas = (0.0, 0.9)
    makes = training.Trainer(generator, args, steps, rate, 0.0, 10.0, betas)
    judges = training.Trainer(critic, args, CRITIC_STEPS * steps, rate, 0.0, 10.0, betas)
    curves = training.Curves()

    def noise(count: int) -> Tensor:
        return torch.randn(count, NOISE, device=args.device)

    wanted = real[torch.randperm(len(real), device=args.device)[:1024]]
    fixed = noise(1024)
    with torch.no_grad():
        far = distance(generator(fixed), wanted)
    with tqdm(total=steps, desc="wgan_gp", unit="step") as bar:
        for step in range(steps):
            for _ in range(CRITIC_STEPS):
                images = real[torch.randint(len(real), (batch,), device=args.device)]
                with torch.no_grad(), makes.autocast():
                    fake = makes.run(noise(batch)).float()
                with judges.autocast():
                    apart = judges.run(fake).float().mean() - judges.run(images).float().mean()
                # By the plain module: torch.compile has no double backward.
                judges.step(apart + WEIGHT * penalty(judges.model, images, fake))
            with makes.autocast():
                loss = -judges.run(makes.run(noise(batch))).float().mean()
            makes.step(loss)
            curves.add("the critic's distance", step, -apart.item())
            bar.update()
            if (step + 1) % max(1, steps // 10) == 0:
                with torch.no_grad():
                    made = makes.average.module.eval()(fixed)
                share = distance(made, wanted) / far
                curves.add("sliced distance", step, share)
                bar.set_postfix(distance=f"{share:.3f}")
    return curves, made, share


def show(images: Tensor, path: Path) -> None:
    """Writes the first 64 images."""
    rows = images[:64, 0].cpu().unflatten(0, (8, 8)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.imsave(path, rows.numpy(), cmap="gray", vmin=-1, vmax=1)
    print(f"images: {path.resolve()}")


def main(argv: list[str] | None = None) -> float:
    """Trains; returns the distance as a share of that before training."""
    args = training.options(
        training.parser("wgan_gp", "Trains a generator of digits with a gradient penalty."), argv
    )
    curves, made, share = train(args)
    curves.draw(args.out / "wgan_gp.png", f"wgan_gp: distance {share:.3f} of that before training")
    show(made, args.out / "wgan_gp_images.png")
    bound = 0.6 if args.short else 0.15
    print(f"distance {share:.3f} of that before training, wants less than {bound}")
    if not share < bound:
        sys.exit(f"wgan_gp: distance {share:.3f} of that before training is not below {bound}")
    return share


if __name__ == "__main__":
    main()
