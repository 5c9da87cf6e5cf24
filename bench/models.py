"""`python -m bench.models`: a training step of whole models before and after `pydl.replace`.

Forward, loss and backward, interleaved in one process. Before it counts, the gradients of both are
compared with those of a copy in fp64: after may be twice as far off as before. The models, with
random weights: ResNet-18 with Mish and a small ViT of Hugging Face's transformers, ResNet-20 with
Mish for small images, and a language model of characters whose attention sees a window, before with
torch's attention and a mask of the band. Also how long replacing BERT-base takes. Writes
`models.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import pydl
from bench import machine, measure, report
from bench.options import LOCAL
from examples import char_gpt, digits_resnet

BUDGET = measure.Budget(seconds=20.0, rounds=7, sample=0.0, most=40)
Loss = Callable[[nn.Module], Tensor]
Pair = tuple[nn.Module, nn.Module, Loss, str]
"""Before, after, the loss of either, and what was replaced."""
WINDOW = 257


def _twice(model: nn.Module, loss: Loss, backend: str | None) -> Pair:
    after = copy.deepcopy(model)
    found = pydl.replace(after, backend=backend)
    return model, after, loss, f"{len(found)} modules replaced, {len(found.fused)} fused"


def _of_images(images: Tensor, labels: Tensor) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return model(pixel_values=images.to(dtype), labels=labels).loss  # type: ignore[no-any-return]

    return loss


def resnet(backend: str | None, device: str, quick: bool) -> Pair:
    """ResNet-18 with Mish, 16 images of 3 x 112 x 112."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512],
        embedding_size=64, hidden_act="mish", num_labels=100,
    )  # fmt: skip
    model = ResNetForImageClassification(config).to(device).train()
    count, size = (4, 64) if quick else (16, 112)
    images = torch.randn(count, 3, size, size, device=device)
    labels = torch.arange(count, device=device)
    return _twice(model, _of_images(images, labels), backend)


def resnet20(backend: str | None, device: str, quick: bool) -> Pair:
    """ResNet-20 with Mish, 128 images of 32 x 32 (He et al. 2016, arXiv 1512.03385, 4.2)."""
    model = digits_resnet.network(16, 3, 3, nn.Mish).to(device).train()
    count = 8 if quick else 128
    images = torch.randn(count, 3, 32, 32, device=device)
    labels = torch.arange(count, device=device) % 10

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels)

    return _twice(model, loss, backend)


def vit(backend: str | None, device: str, quick: bool) -> Pair:
    """ViT-small (12 layers of 384, 6 heads), 8 images of 3 x 224 x 224."""
    from transformers import ViTConfig, ViTForImageClassification

    from pydl.integrations.transformers import register

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=1 if quick else 12, num_attention_heads=6,
        intermediate_size=1536, num_labels=100, image_size=32 if quick else 224,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = ViTForImageClassification(config).to(device).train()
    images = torch.randn(8, 3, config.image_size, config.image_size, device=device)
    labels = torch.arange(8, device=device)
    made = _twice(model, _of_images(images, labels), backend)
    register()
    made[1].set_attn_implementation("pydl")  # type: ignore[operator]
    return made


class Banded(nn.Module):
    """What `char_gpt.Local` computes, by torch's attention and a mask of (L, L)."""

    mask: Tensor

    def __init__(self, local: char_gpt.Local, length: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = local.heads, local.qkv, local.out
        at = torch.arange(length, device=local.qkv.weight.device)
        distance = at - at[:, None]
        self.register_buffer("mask", (distance <= 0) & (distance > -WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, self.mask)
        return self.out(out.transpose(1, 2).flatten(2))


def gpt(backend: str | None, device: str, quick: bool) -> Pair:
    """6 layers of 256, 8 heads, a sequence of 2,048 characters, each seeing 257, without a bias:
    torch's attention has its fast path."""
    length, layers = (600, 1) if quick else (2048, 6)
    after = char_gpt.CharGPT(96, length, 256, 0, "local", 8)
    blocks = [char_gpt.Block(256, char_gpt.Local(256, 8)) for _ in range(layers)]
    for block in blocks:
        block.attention.attention = pydl.nn.LocalAttention((WINDOW - 1, 0), causal=True)  # type: ignore[assignment]
    after.blocks = nn.Sequential(*blocks)
    after = after.to(device).train()
    before = copy.deepcopy(after)
    for block in before.blocks:
        block.attention = Banded(block.attention, length)  # type: ignore[arg-type,union-attr]
    found = pydl.replace(after, backend=backend)
    ids = torch.randint(96, (1, length + 1), device=device)
    what = f"{len(found)} modules replaced, {len(found.fused)} fused, attention in a window"
    return before, after, lambda model: char_gpt.loss_of(model, ids), what


MODELS: dict[str, tuple[str, Callable[[str | None, str, bool], Pair]]] = {
    "resnet": ("ResNet-18 with Mish, 16 x 3 x 112 x 112", resnet),
    "resnet20": ("ResNet-20 with Mish, 128 x 3 x 32 x 32", resnet20),
    "vit": ("ViT-small, 8 x 3 x 224 x 224", vit),
    "gpt": (f"characters, 2,048 in windows of {WINDOW}", gpt),
}


def _step(loss: Loss, model: nn.Module) -> Callable[[], None]:
    def step() -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    return step


def _apart(pair: Pair) -> tuple[float, float]:
    """How far the gradients before and after are from those in fp64, by the norm of all."""
    before, after, loss, _ = pair
    found = []
    for model in (copy.deepcopy(before).double(), before, after):
        loss(model).backward()
        found.append(
            {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        )
        model.zero_grad(set_to_none=True)
    exact = found[0]
    size = sum(g.square().sum().item() for g in exact.values())
    off = (sum((g[n] - exact[n]).square().sum().item() for n in exact) for g in found[1:])
    first, second = ((one / size) ** 0.5 for one in off)
    return first, second


def bert(backend: str | None) -> float:
    """Seconds that replacing BERT-base takes, the first time in a process."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig())
    start = time.perf_counter()
    pydl.replace(model, backend=backend)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes the file; 1 where a model learns something else."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", help="of the replaced; default: automatic")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--out", type=Path, default=LOCAL / "models")
    args = parser.parse_args(argv)
    names = [name for name in args.models.split(",") if name]
    for name in names:
        if name not in MODELS:
            parser.error(f"--models: {name!r} is none, wants some of {', '.join(MODELS)}")
    console = report.console()
    found: dict[str, Any] = {"machine": machine.record(args.device), "models": {}}
    found["replace_bert_base_seconds"] = bert(args.backend)
    table = Table("model", "before, ms", "after, ms", "ratio", "what")
    wrong = False
    for name in names:
        title, make = MODELS[name]
        torch.manual_seed(0)
        pair = make(args.backend, args.device, args.quick)
        off = _apart(pair)
        right = off[1] <= 2 * off[0] + 1e-6
        wrong |= not right
        before, after, loss, what = pair
        times = measure.interleaved(
            {"before": _step(loss, before), "after": _step(loss, after)}, args.device,
            measure.QUICK if args.quick else BUDGET,
        )  # fmt: skip
        ratio = times["before"].median / times["after"].median
        found["models"][name] = {
            "title": title, "what": what, "gradients_from_fp64": off, "ratio": ratio,
            **{key: t.to_json() for key, t in times.items()},
        }  # fmt: skip
        shown = f"{ratio:.2f}x" if right else f"WRONG: {off[1]:.1e}, before {off[0]:.1e}"
        medians = (f"{times[key].median:.1f}" for key in ("before", "after"))
        table.add_row(title, *medians, shown, what)
    console.print(table)
    console.print(f"Replacing BERT-base: {found['replace_bert_base_seconds']:.2f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "models.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"Wrote {args.out / 'models.json'}", soft_wrap=True)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
