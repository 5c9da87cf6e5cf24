"""What the examples share: options, a training loop, curves and how they are drawn.

The loop warms the learning rate up and lets it fall like a cosine, clips gradients, and averages
the parameters, which are what is judged in the end.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pydl
from pydl import backends

try:
    import matplotlib
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"examples: {missing.name} is not installed; remedy: pip install 'pydl[demo]'")

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def parser(name: str, about: str) -> argparse.ArgumentParser:
    """The options that every example has."""
    made = argparse.ArgumentParser(prog=f"python -m examples.{name}", description=about)
    made.add_argument("--short", action="store_true", help="seconds, with less to be reached")
    made.add_argument("--backend", choices=backends.NAMES, help="who computes; default: automatic")
    made.add_argument("--compile", action="store_true", help="by torch.compile")
    made.add_argument("--amp", action="store_true", help="autocast to bf16")
    made.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    made.add_argument(
        "--out",
        type=Path,
        default=Path("build/demo"),
        help="where pictures go; default: %(default)s",
    )
    return made


def options(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, with `device`; seeds torch. Ends the program where the backend is missing."""
    args = made.parse_args(argv)
    if args.backend and (why := backends.unavailable(args.backend)):
        made.error(f"--backend {args.backend} is not available: {why}")
    on_gpu = torch.cuda.is_available() and args.backend != "cpu"
    args.device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(args.seed)
    return args


def replaced(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model after `pydl.replace`, which prints what it did."""
    report = pydl.replace(model.to(args.device), backend=args.backend)
    print(str(report).splitlines()[0])
    return report.model


def warm_cosine(steps: int, warm: int) -> Callable[[int], float]:
    """The factor of the learning rate: up in a line over `warm` steps, then down to 0 like a
    cosine."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


@dataclass
class Curves:
    """Named lines of (step, value)."""

    lines: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, name: str, step: int, value: float) -> None:
        self.lines.setdefault(name, []).append((step, value))

    def draw(self, path: Path, title: str, log: Iterable[str] = ()) -> None:
        """Writes a picture, a panel for each line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        figure, panels = plt.subplots(
            1, len(self.lines), figsize=(4.5 * len(self.lines), 3.4), layout="constrained",
            squeeze=False,
        )  # fmt: skip
        for axes, (name, points) in zip(panels[0], self.lines.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color="#e4572e", linewidth=1.3)
            axes.set_xlabel("step")
            axes.set_title(name, loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            if name in log:
                axes.set_yscale("log")
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=120)
        plt.close(figure)
        print(f"chart: {path.resolve()}")


class Trainer:
    """A model in training.

    Args:
        model: What is trained.
        args: The options.
        steps: How many steps there will be.
        rate: The largest learning rate.
        decay: Of weights of two and more dimensions.
        clip: The largest norm of all gradients.
        betas: Of Adam.
    """

    def __init__(
        self, model: nn.Module, args: argparse.Namespace, steps: int, rate: float,
        decay: float = 0.05, clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:  # fmt: skip
        self.model, self.args, self.clip = model, args, clip
        self.run: Any = torch.compile(model) if args.compile else model
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, rate, betas)
        self.schedule = LambdaLR(self.optimiser, warm_cosine(steps, max(1, steps // 10)))
        # The average looks back over a fifteenth of the training.
        keeps = max(0.5, min(0.999, 1 - 15 / steps))
        self.average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(keeps), use_buffers=True
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp)

    def step(self, loss: Tensor) -> float:
        """One step down a loss; returns it."""
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()


def digits(args: argparse.Namespace, size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits: 1,347 images of (1, size, size) in [0, 1] and labels to
    train with, 450 to test."""
    data = load_digits()
    parts = train_test_split(
        data.images / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    train_x, test_x, train_y, test_y = (torch.tensor(p, device=args.device) for p in parts)
    images = [x[:, None].float() for x in (train_x, test_x)]
    if size != 8:
        images = [nn.functional.interpolate(x, size=size, mode="bilinear") for x in images]
    return images[0], train_y, images[1], test_y


def shifted(x: Tensor) -> Tensor:
    """Each image moved by up to one pixel in each direction."""
    moved = nn.functional.pad(x, (1, 1, 1, 1))
    size, n = x.shape[-1], x.shape[0]
    rows, columns = (torch.randint(0, 3, (n, 1), device=x.device) for _ in range(2))
    span = torch.arange(size, device=x.device)
    index = torch.arange(n, device=x.device)[:, None, None]
    return moved[index, 0, (rows + span)[:, :, None], (columns + span)[:, None, :]][:, None]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def train_digits(
    name: str, model: nn.Module, args: argparse.Namespace, epochs: int, rate: float, bound: float
) -> float:
    """Trains a classifier of digits, of images that are moved about in the full form, draws its
    curves, and returns the accuracy of the averaged model on the test images.

    Raises:
        SystemExit: it is below `bound`.
    """
    train_x, train_y, test_x, test_y = digits(args)
    batch, curves = 64, Curves()
    per_epoch = len(train_x) // batch
    trainer = Trainer(replaced(model, args), args, epochs * per_epoch, rate)
    with tqdm(total=epochs * per_epoch, desc=name, unit="step") as bar:
        for _ in range(epochs):
            trainer.model.train()
            order = torch.randperm(len(train_x), device=args.device)
            for i in range(per_epoch):
                chosen = order[i * batch : (i + 1) * batch]
                images = train_x[chosen] if args.short else shifted(train_x[chosen])
                with trainer.autocast():
                    logits = trainer.run(images)
                loss = nn.functional.cross_entropy(
                    logits.float(), train_y[chosen], label_smoothing=0.05
                )
                curves.add("training loss", bar.n, trainer.step(loss))
                bar.update()
            reached = accuracy(trainer.average.module, test_x, test_y)
            curves.add("test accuracy", bar.n, reached)
            bar.set_postfix(accuracy=f"{reached:.2%}")
    curves.draw(args.out / f"{name}.png", f"{name}: {reached:.2%} of test images are right")
    print(f"test accuracy {reached:.2%}, wants {bound:.0%}")
    if reached < bound:
        sys.exit(f"{name}: test accuracy {reached:.2%} is below {bound:.0%}")
    return reached
