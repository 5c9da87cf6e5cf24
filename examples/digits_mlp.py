"""Trains a small network on handwritten digits, with torch.nn's modules and after
`pydl.replace(model)`.

Both networks start from one seed and see the same batches; their steps alternate, so that whatever
else the machine does slows both alike. Prints a table and writes a chart with the losses and the
kernels' times.

    python -m examples.digits_mlp --epochs 60 --backend cpu
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import pydl
from pydl import backends
from pydl.replace import Report

try:
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    from examples import digits_chart
except ImportError as missing:
    sys.exit(f"digits_mlp: {missing.name} is not installed; remedy: pip install 'pydl[demo]'")

BATCH, WIDTH, WARM_UP = 256, 512, 12
KERNELS = ("mish", "gelu", "silu", "tanh", "sigmoid", "relu")
KERNEL_SHAPE = (4096, 2048)


def network() -> nn.Sequential:
    """64 pixels to 10 digits by four hidden layers with Mish."""
    layers: list[nn.Module] = [nn.Linear(64, WIDTH), nn.Mish()]
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Mish()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


@dataclass
class Training:
    """A network in training, with what was measured."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=1e-2)

    def step(self, x: Tensor, y: Tensor) -> None:
        started = now(x)
        loss = nn.functional.cross_entropy(self.model(x), y, label_smoothing=0.05)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.seconds.append(now(x) - started)
        self.losses.append(loss.item())

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        return (self.model(x).argmax(1) == y).float().mean().item()

    def per_step(self) -> float:
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)


def now(tensor: Tensor) -> float:
    """Seconds, when all that was asked of the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def digits(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,347 images to train with and 450 to test, and their labels."""
    data = load_digits()
    parts = train_test_split(
        data.data / 16.0, data.target, test_size=0.25, random_state=seed, stratify=data.target
    )
    train_x, test_x, train_y, test_y = (torch.tensor(part, device=device) for part in parts)
    return train_x.float(), train_y, test_x.float(), test_y


def train(
    seed: int, epochs: int, backend: str | None, device: str
) -> tuple[Training, Training, Report, float, float]:
    """Both trainings, what was replaced, and both accuracies on the test images."""
    torch.manual_seed(seed)
    model = network().to(device)
    plain, fused = Training(model), Training(copy.deepcopy(model))
    report = pydl.replace(fused.model, backend=backend)
    train_x, train_y, test_x, test_y = digits(seed, device)
    shuffle = torch.Generator().manual_seed(seed)
    batches = -(-len(train_x) // BATCH)
    with tqdm(total=epochs * batches, desc="training both", unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(train_x), generator=shuffle).to(device).split(BATCH):
                pair = (plain, fused) if bar.n % 2 else (fused, plain)
                for one in pair:
                    one.step(train_x[batch], train_y[batch])
                bar.update()
            bar.set_postfix(loss=f"{fused.losses[-1]:.3f}")
    return plain, fused, report, plain.accuracy(test_x, test_y), fused.accuracy(test_x, test_y)


def kernels(backend: str | None, device: str, rounds: int) -> list[digits_chart.Kernel]:
    """Median times of activations, torch's and ours in turn, forward and backward."""
    x = torch.randn(KERNEL_SHAPE, device=device, requires_grad=True)
    dy = torch.randn(KERNEL_SHAPE, device=device)
    results = []
    for name in tqdm(KERNELS, desc="timing kernels", unit="kernel"):
        native = getattr(torch, name, None) or getattr(nn.functional, name)
        ours = getattr(pydl.functional, name)
        sides: list[Callable[[Tensor], Tensor]] = [native, lambda x, f=ours: f(x, backend=backend)]
        seconds: dict[tuple[int, str], list[float]] = {}
        for turn in range(2 * (rounds + 1)):
            side = turn % 2
            start = now(x)
            y = sides[side](x)
            middle = now(x)
            torch.autograd.grad(y, x, dy)
            end = now(x)
            if turn > 1:  # the first of each is warm-up
                seconds.setdefault((side, "forward"), []).append(middle - start)
                seconds.setdefault((side, "backward"), []).append(end - middle)
        for way in ("forward", "backward"):
            torch_s, pydl_s = (statistics.median(seconds[side, way]) for side in (0, 1))
            results.append(digits_chart.Kernel(name, way, torch_s * 1e3, pydl_s * 1e3))
    return results


def table(
    plain: Training, fused: Training, report: Report, accuracies: tuple[float, float], who: str
) -> Table:
    """What came out, for the terminal."""
    before, after = plain.per_step(), fused.per_step()
    difference = max(abs(a - b) for a, b in zip(plain.losses, fused.losses, strict=True))
    swapped: dict[str, int] = {}
    for one in report:
        swapped[f"{one.old} -> {one.new}"] = swapped.get(f"{one.old} -> {one.new}", 0) + 1
    shown = Table(title="Digits: the same training twice", title_justify="left")
    shown.add_column("")
    shown.add_column("torch.nn", justify="right")
    shown.add_column("pydl.replace", justify="right")
    shown.add_row("test accuracy", *(f"{accuracy:.2%}" for accuracy in accuracies))
    shown.add_row("final loss", f"{plain.losses[-1]:.5f}", f"{fused.losses[-1]:.5f}")
    shown.add_row("largest loss difference", "", f"{difference:.1e} in {len(plain.losses)} steps")
    shown.add_row(
        "time per step", f"{before * 1e3:.2f} ms", f"{after * 1e3:.2f} ms ({before / after:.2f}x)"
    )
    for swap, count in swapped.items() or [("nothing", 0)]:
        shown.add_row("replaced", "", f"{count} {swap}")
    shown.add_row("computed by", "torch", who)
    return shown


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits_mlp",
        description="Trains on handwritten digits with torch.nn and after pydl.replace, and "
        "compares.",
    )
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo/digits.png"), help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=15, help="of timing each kernel; default: %(default)s"
    )
    parser.add_argument(
        "--backend",
        choices=backends.NAMES,
        help="who computes in pydl's modules; default: automatic",
    )
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.rounds < 1:
        parser.error("--epochs and --rounds want 1 or more")
    if args.backend and (why := backends.unavailable(args.backend)):
        parser.error(f"--backend {args.backend} is not available: {why}")
    on_gpu = torch.cuda.is_available() and args.backend != "cpu"
    device = "cuda" if on_gpu else "cpu"

    plain, fused, report, *accuracies = train(args.seed, args.epochs, args.backend, device)
    hidden = torch.empty(BATCH, WIDTH, device=device, requires_grad=True)
    chosen = backends.choose("mish", args.backend, hidden)
    who = f"backend {chosen}" + ("" if args.backend else ", chosen automatically")
    console = Console()
    console.print(table(plain, fused, report, (accuracies[0], accuracies[1]), who))
    timed = kernels(args.backend, device, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    digits_chart.draw(
        args.out, plain.losses, fused.losses, (plain.per_step(), fused.per_step()), timed,
        f"{machine}, {KERNEL_SHAPE[0]}×{KERNEL_SHAPE[1]} fp32",
    )  # fmt: skip
    print(f"chart: {args.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
