"""Trains a small language model of characters on the documentation strings of Python's library.

Attention is within a window of keys (`--attention local`) or linear (`--attention linear`); both
take time that grows with the length of the text alone. The validation loss has to fall below 1.75
nats a character in the full form and below 2.9 in the short one; guessing by frequency gives 3.26.
Prints a sample.

    python -m examples.char_gpt --attention linear --backend cpu
"""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pydl
from examples import training

SOURCES = (
    "argparse", "ast", "asyncio.events", "collections", "configparser", "datetime", "difflib",
    "doctest", "email.message", "functools", "heapq", "inspect", "logging", "os", "pathlib",
    "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading", "typing",
    "unittest.case", "unittest.mock", "urllib.request", "zipfile",
)  # fmt: skip


def text() -> str:
    """The documentation strings, of ASCII alone."""
    parts = []
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                parts.append(ast.get_docstring(node) or "")
    joined = "\n\n".join(part for part in parts if part)
    return "".join(c for c in joined if c == "\n" or " " <= c <= "~")


class Local(nn.Module):
    """Attention to the last `window` characters, with a learnt bias of each head and distance."""

    def __init__(self, width: int, heads: int, window: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.attention = pydl.nn.LocalAttention((window - 1, 0), heads, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + down(gelu(up(norm(x))))`."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), attention
        self.norm2, self.act = nn.LayerNorm(width), nn.GELU(approximate="tanh")
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class CharGPT(nn.Module):
    """Characters before to logits of the next.

    Shape: (B, L) to (B, L, size), L up to `length`.
    """

    def __init__(
        self, size: int, length: int, width: int, layers: int, attention: str, heads: int = 4
    ) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        nn.init.normal_(self.embedding.weight, 0, 0.02)

        def mixing() -> nn.Module:
            if attention == "local":
                return Local(width, heads)
            return pydl.nn.LinearAttention(width, heads, causal=True)

        self.blocks = nn.Sequential(*(Block(width, mixing()) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def sample(self, ids: Tensor, count: int, temperature: float = 0.7) -> Tensor:
        """Goes on from (1, L) characters."""
        for _ in range(count):
            logits = self(ids[:, -self.length :])[:, -1].float() / temperature
            ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1)), 1)
        return ids


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats a character of (B, L + 1)."""
    logits = model(ids[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def main(argv: list[str] | None = None) -> float:
    """Trains; returns the validation loss."""
    made = training.parser("char_gpt", "Trains a language model of characters.")
    made.add_argument(
        "--attention", choices=("local", "linear"), default="local", help="default: %(default)s"
    )
    args = training.options(made, argv)
    corpus = text()
    letters = sorted(set(corpus))
    data = torch.tensor([letters.index(c) for c in corpus], device=args.device)
    cut = len(data) * 9 // 10
    steps, batch, length, width, layers, rate = (
        (160, 32, 32, 64, 2, 6e-3) if args.short else (1200, 32, 96, 96, 3, 4e-3)
    )
    bound = 2.9 if args.short else 1.75
    model = CharGPT(len(letters), length, width, layers, args.attention)
    curves = training.Curves()

    def drawn(part: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        starts = torch.randint(len(part) - length - 1, (count, 1), generator=generator)
        return part[starts.to(part.device) + torch.arange(length + 1, device=part.device)]

    checked = drawn(data[cut:], 64, torch.Generator().manual_seed(1))
    # The model's own attention is no twin, so the backend is told by context.
    with pydl.use_backend(args.backend):
        trainer = training.Trainer(training.replaced(model, args), args, steps, rate)
        with tqdm(total=steps, desc=f"char_gpt {args.attention}", unit="step") as bar:
            for step in range(steps):
                with trainer.autocast():
                    loss = loss_of(trainer.run, drawn(data[:cut], batch))
                curves.add("training loss", step, trainer.step(loss))
                bar.update()
                if (step + 1) % max(1, steps // 20) == 0:
                    with torch.no_grad():
                        reached = loss_of(trainer.average.module, checked).item()
                    curves.add("validation loss", step, reached)
                    bar.set_postfix(loss=f"{reached:.3f}")
        start = torch.tensor([[letters.index(c) for c in "Return "]], device=args.device)
        made_up = trainer.average.module.sample(start, 60 if args.short else 400)
    curves.draw(args.out / f"char_gpt_{args.attention}.png", f"char_gpt: {reached:.3f} nats")
    print("".join(letters[i] for i in made_up[0].tolist()))
    print(
        f"validation loss {reached:.3f}, wants less than {bound}; {math.exp(reached):.1f} choices"
    )
    if not reached < bound:
        sys.exit(f"char_gpt: validation loss {reached:.3f} is not below {bound}")
    return reached


if __name__ == "__main__":
    main()
