"""What `pydl.replace` measures on example inputs: how far a model is from fp64 before and after,
how long it takes, and what it keeps for the backward pass.

Only copies run, so that nothing of the model changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydl.example import Arguments, call, copied, generators_kept, kind_of, seed

SECONDS, FEWEST, MOST = 1.0, 5, 30  # of timing, and how many rounds
_SEED = 7
_MIB = 1 << 20


class Pair(NamedTuple):
    """A number of the model before, and of the model after."""

    before: float
    after: float


@dataclass(frozen=True)
class Measured:
    """What came out, of the model before and after.

    Attributes:
        output: The largest absolute difference of an output from that of `judge`; None where
            outputs are random.
        gradient: The same of the gradients of parameters, and of inputs that require one.
        judge: What the differences are taken from: "fp64", a copy of the model before in fp64, or
            "before" where there can be no such copy.
        forward: Seconds of a forward pass without gradients, median.
        both: Seconds of a forward and a backward pass, median; None where nothing has a gradient.
        saved: Bytes that autograd keeps for the backward pass, but for parameters and buffers.
        rounds: How many times both were timed, in turn.
        setting: The device and the mode.
        notes: What else is to be known.
    """

    output: Pair | None
    gradient: Pair | None
    judge: str
    forward: Pair
    both: Pair | None
    saved: Pair | None
    rounds: int
    setting: str
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The table."""

        def row(title: str, pair: Pair | None, show: Callable[[float], str], gain: bool) -> str:
            if pair is None:
                return f"  {title:<40}{'-':>12}{'-':>12}"
            ratio = f"{pair.before / pair.after:>9.2f}x" if gain and pair.after else ""
            return f"  {title:<40}{show(pair.before):>12}{show(pair.after):>12}{ratio}"

        def milliseconds(seconds: float) -> str:
            return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

        def size(count: float) -> str:
            return f"{count / _MIB:.4g} MiB" if count >= _MIB else f"{count / 1024:.4g} KiB"

        apart = "from fp64" if self.judge == "fp64" else "from the model before"
        title = f"measured {self.setting}, medians of {self.rounds}"
        return [
            f"{title:<42}{'before':>12}{'after':>12}",
            row("forward", self.forward, milliseconds, True),
            row("forward and backward", self.both, milliseconds, True),
            row("kept for backward", self.saved, size, True),
            row(f"largest output {apart}", self.output, "{:.2e}".format, False),
            row(f"largest gradient {apart}", self.gradient, "{:.2e}".format, False),
        ]


def measure(before: nn.Module, after: nn.Module, given: Arguments) -> Measured:
    """Measures two models, which are changed by it; the random generators are as before.

    Raises:
        RuntimeError: one of them fails on the inputs, or returns no floating tensor.
    """
    with generators_kept(), torch.inference_mode(False), torch.enable_grad():
        notes: list[str] = []
        output, gradient, judge = _differences(before, after, given, notes)
        learns = any(p.requires_grad for p in (*before.parameters(), *given.tensors()))
        forward, both, rounds = _times(before, after, given, learns)
        saved = Pair(_saved(before, given), _saved(after, given)) if learns else None
    slower = [p for p in (forward, both) if p is not None and p.after > 1.05 * p.before]
    if slower:
        notes.append("on these inputs it is slower than before; report.undo() takes it back")
    where = next((t.device for t in (*before.parameters(), *given.tensors())), "cpu")
    mode = "in training mode" if before.training else "in evaluation mode"
    return Measured(
        output, gradient, judge, forward, both, saved, rounds, f"on {where} {mode}", tuple(notes)
    )


def _drawn(outs: list[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, the same in every dtype."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
        for out in outs
    ]


def _backward(outs: list[Tensor], dys: list[Tensor]) -> None:
    flowing = [(out, dy) for out, dy in zip(outs, dys, strict=True) if out.requires_grad]
    if flowing:
        torch.autograd.backward([out for out, _ in flowing], [dy for _, dy in flowing])


def _run(
    model: nn.Module, given: Arguments, which: str, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients, in fp64, of one pass from a fixed seed."""
    seed()
    given = given.fresh(dtype)
    outs = call(model, given, which)
    _backward(outs, _drawn(outs))
    leaves = [p for p in (*model.parameters(), *given.tensors()) if p.requires_grad]
    grads = [None if p.grad is None else p.grad.to_dense().double() for p in leaves]
    model.zero_grad(set_to_none=True)
    return [out.detach().double() for out in outs], grads


def _apart(some: list[Any], others: list[Any]) -> float | None:
    """The largest difference; infinite where NaN or shapes differ."""
    worst = None
    for a, b in zip(some, others, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape != b.shape:
            return float("inf")
        off = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).nan_to_num(torch.inf)
        worst = max(worst or 0.0, off.max().item() if off.numel() else 0.0)
    return worst


def _random(model: nn.Module, given: Arguments) -> bool:
    """Whether two passes from different seeds differ."""
    with torch.no_grad():
        scratch = copied(model)
        seed()
        first = call(scratch, given.fresh(), "before")
        second = call(copied(model), given.fresh(), "before")
    return not all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


def _differences(
    before: nn.Module, after: nn.Module, given: Arguments, notes: list[str]
) -> tuple[Pair | None, Pair | None, str]:
    """(of outputs, of gradients, from what)."""
    modes = [(module, module.training) for model in (before, after) for module in model.modules()]
    try:
        if _random(before, given):
            for model in (before, after):
                model.eval()
            if _random(before, given):
                notes.append("outputs are random in evaluation too: no differences are told")
                return None, None, "before"
            notes.append("outputs are random in training: differences are those in evaluation")
        judge, wanted = "fp64", None
        double = copied(before).double()
        try:
            with torch.autocast(kind_of(before, given), enabled=False):
                wanted = _run(double, given, "in fp64", torch.float64)
        except RuntimeError as error:
            notes.append(f"differences are from the model before: {error}")
            judge = "before"
        del double
        old, new = _run(before, given, "before"), _run(after, given, "after")
        wanted = wanted or old
    finally:
        for module, training in modes:
            module.training = training

    def pair(i: int) -> Pair | None:
        a, b = _apart(old[i], wanted[i]), _apart(new[i], wanted[i])
        return None if a is None or b is None else Pair(a, b)

    return pair(0), pair(1), judge


def _times(
    before: nn.Module, after: nn.Module, given: Arguments, learns: bool
) -> tuple[Pair, Pair | None, int]:
    """Medians of seconds, forward and with backward, of both in turn."""
    models, cuda = (before, after), kind_of(before, given) == "cuda"
    seconds: dict[tuple[int, bool], list[float]] = {}
    with torch.no_grad():
        dys = _drawn(call(copied(before), given.fresh(), "before")) if learns else []

    def once(side: int, backward: bool, counts: bool) -> None:
        inputs = given.fresh()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            outs = call(models[side], inputs, ("before", "after")[side])
            if backward:
                _backward(outs, dys)
        if cuda:
            torch.cuda.synchronize()
        if counts:
            seconds.setdefault((side, backward), []).append(time.perf_counter() - start)
        models[side].zero_grad(set_to_none=True)

    began, rounds = 0.0, -2  # the first two warm up
    while rounds < FEWEST or (rounds < MOST and time.perf_counter() - began < SECONDS):
        began = time.perf_counter() if rounds == 0 else began
        for backward in (False, True) if learns else (False,):
            for side in (0, 1) if rounds % 2 else (1, 0):
                once(side, backward, rounds >= 0)
        rounds += 1

    def median(backward: bool) -> Pair:
        return Pair(*(statistics.median(seconds[side, backward]) for side in (0, 1)))

    return median(False), median(True) if learns else None, rounds


def _saved(model: nn.Module, given: Arguments) -> int:
    """Bytes that a forward pass keeps for backward; each memory counts once."""
    known = {_memory(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[Any, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        where, size = _memory(tensor), tensor.numel() * tensor.element_size()
        if where not in known:
            if tensor.layout == torch.strided:
                size = min(size, tensor.untyped_storage().nbytes())
            # With the tensor, so that its memory is not given to another meanwhile.
            kept[where] = max(kept.get(where, (0, tensor)), (size, tensor), key=lambda one: one[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = call(model, given.fresh(), "measured")
    del outs
    return sum(size for size, _ in kept.values())


def _memory(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()
