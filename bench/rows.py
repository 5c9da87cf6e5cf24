"""The rows: every op, shape and dtype, with its contenders built, judged and timed.

A row is a dict, as `results.json` holds it: `op, family, shape, dtype, device, pass, mode`; `bytes`
and `flops` that the pass must move and compute; `backends` (pydl's) and `peers`; `times` by
contender (see `Timing`); `ceiling` (`ms`, `gb_per_s`, `by`: what bounds the pass); `results` by
backend (`ms, gb_per_s, tflop_per_s, ceiling_share, speedup` by peer, `chose`); `parity` by backend;
`absent`: peer -> why it has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import measure, parity
from bench.measure import Budget, Timing
from bench.options import PASSES, Settings, label, named
from bench.parity import Build, Gate
from bench.peers import PEERS
from bench.steps import Steps, brief
from pydl.backends import MissingKernel
from pydl.table import TABLE, Case, Make, Op

Row = dict[str, Any]
Job = tuple[str, tuple[int, ...], str]
JUDGED = 1 << 20  # elements


class UnfitShape(ValueError):
    """A shape asked for by the user that an op cannot take."""


def ours(op: Op, backend: str) -> Build:
    """Binds the public function; "auto" is the call without a word about backends."""
    options = {} if backend == "auto" else {"backend": backend}
    return lambda case: partial(op.function, *case.args, **case.kwargs, **options)


def draw(
    op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: str, variant: str | None = None
) -> Case:
    """The benchmark's call of an op, or a variant of it.

    Raises:
        UnfitShape: the op has no call of this shape.
    """
    try:
        case = op.bench(Make(dtype, device, op.name), shape)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UnfitShape(f"{op.name} takes no shape {label(shape)}: {error}") from error
    return case if variant is None else op.variants[variant](case)


def call(build: Build, case: Case, dys: Sequence[Tensor], direction: str) -> Callable[[], Any]:
    """One pass of a contender as a call without arguments; `forward` is to be run under no_grad."""
    if direction == "forward":
        return build(case)
    given = parity.leaves(case)
    run, inputs = build(given), parity.wanted(given)
    if direction == "both":
        return lambda: torch.autograd.grad(parity.several(run()), inputs, dys)
    outs = parity.several(run())
    return lambda: torch.autograd.grad(outs, inputs, dys, retain_graph=True)


@dataclass
class Field:
    """The contenders of one call: those that passed the gate, and what is known of the others."""

    op: Op
    shape: str
    case: Case
    dys: list[Tensor]
    builders: dict[str, Build]
    parity: dict[str, dict[str, Any]]
    chose: dict[str, dict[str, str]]
    absent: dict[str, str]


def _choices(op: Op, case: Case) -> dict[str, str]:
    """The backend that the automatic choice takes for each pass."""
    chose = {}
    for direction in PASSES:
        with parity.watched() as seen, torch.set_grad_enabled(direction != "forward"):
            ours(op, "auto")(parity.leaves(case))()
        chose[direction] = seen[-1][1] if seen else "?"
    return chose


def judged_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its first dimensions cut to about a million elements: computing a definition
    in fp64 on more would take longer than all the timing."""
    cut = list(shape)
    for d in range(len(cut) - 1):
        rest = torch.Size(cut[d + 1 :]).numel()
        cut[d] = max(1, min(cut[d], JUDGED // max(1, rest)))
    return tuple(cut)


def gather(
    op: Op, shape: tuple[int, ...], case: Case, settings: Settings, steps: Steps | None = None
) -> Field:
    """Builds all contenders of a call and sends them through the gate."""
    steps = steps or Steps(settings.device)
    steps.begin("")
    small = judged_shape(shape)
    dtype = case.tensors()[0].dtype
    gate = Gate(
        op, case if small == shape else draw(op, small, dtype, settings.device, settings.variant)
    )
    builders: dict[str, Build] = {}
    verdicts, absent = {}, {}
    lost = settings.lost_of(op.name, str(dtype).removeprefix("torch."))
    steps.settle()
    for name in settings.backends:
        if name in lost:
            verdicts[name] = {"ok": False, "checks": [], "message": lost[name]}
            continue
        build = ours(op, name)
        steps.begin(name)
        try:
            verdict = gate.judge(build)
        except MissingKernel as error:
            absent[name] = brief(error)
            continue
        steps.settle()
        verdicts[name] = verdict
        if verdict["ok"]:
            builders[name] = build
    chose = {"auto": _choices(op, case)} if "auto" in builders else {}
    for name in settings.peers_of(op.name, shape):
        steps.begin(name)
        build = lost.get(name) or PEERS[name].builder(name, op, settings.device)
        if isinstance(build, str):
            absent[name] = build
            continue
        try:
            # Native PyTorch, compiled or not, computes what it computes.
            reason = None if PEERS[name].native else gate.differs(build)
        except Exception as error:
            # A peer that fails is told with its reason; it must not end the run.
            reason = brief(error)
        steps.settle()
        if reason is None:
            builders[name] = build
        else:
            absent[name] = reason
    with torch.no_grad():
        dys = parity.upstream(parity.several(op.native(*case.args, **case.kwargs)))
    return Field(op, named(shape, settings.variant), case, dys, builders, verdicts, chose, absent)


def _calls(
    field: Field, direction: str, steps: Steps
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The passes of the contenders, each run once, and why some have none."""
    calls, failed = {}, {}
    for name, build in field.builders.items():
        steps.begin(name)
        try:
            calls[name] = call(build, field.case, field.dys, direction)
            with torch.set_grad_enabled(direction != "forward"):
                calls[name]()
        except Exception as error:
            calls.pop(name, None)
            failed[name] = brief(error)
            if name in field.parity:
                wrong = {"ok": False, "checks": [], "message": f"{direction}: {failed.pop(name)}"}
                field.parity[name] = wrong
        steps.settle()
    return calls, failed


def _cost(op: Op, case: Case, direction: str) -> tuple[int, int]:
    """(bytes, floating-point operations) of a pass."""
    cost = op.cost(case)
    forward = (cost.forward_bytes, cost.forward_flops)
    backward = (cost.backward_bytes, cost.backward_flops)
    if direction == "both":
        return forward[0] + backward[0], forward[1] + backward[1]
    return forward if direction == "forward" else backward


def _ceiling(times: dict[str, Timing], nbytes: int, flops: int, product: float) -> dict[str, Any]:
    """The time that moving the bytes takes, or computing, if that is longer."""
    copying = times["ceiling copy"].median
    found = {"ms": copying, "by": "copy", "gb_per_s": nbytes / copying / 1e6}
    if flops:
        rate = product / times["ceiling matmul"].median
        found["tflop_per_s"] = rate / 1e9
        if flops / rate > copying:
            found |= {"ms": flops / rate, "by": "matmul"}
    return found


def time_pass(
    field: Field, direction: str, settings: Settings, mode: str, budget: Budget, steps: Steps
) -> Row:
    """Times one pass of all contenders and the ceiling, interleaved."""
    op, case = field.op, field.case
    nbytes, flops = _cost(op, case, direction)
    dtype = case.tensors()[0].dtype
    calls, failed = _calls(field, direction, steps)
    steps.begin("")
    calls["ceiling copy"] = measure.copy(nbytes, settings.device)
    product = 0.0
    if flops:
        calls["ceiling matmul"], product = measure.matmul(dtype, settings.device)
    with torch.set_grad_enabled(direction != "forward"):
        times = measure.interleaved(calls, settings.device, budget)
    ceiling = _ceiling(times, nbytes, flops, product)
    results = {}
    for name in settings.backends:
        if name not in times:
            continue
        ms = times[name].median
        results[name] = {
            "ms": ms,
            "gb_per_s": nbytes / ms / 1e6,
            "tflop_per_s": flops / ms / 1e9,
            "ceiling_share": ceiling["ms"] / ms,
            "speedup": {p: times[p].median / ms for p in settings.peers if p in times},
            "chose": field.chose.get(name, {}).get(direction, name),
        }
    return {
        "op": op.name,
        "family": op.family,
        "shape": field.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": settings.device,
        "pass": direction,
        "mode": mode,
        "bytes": nbytes,
        "flops": flops,
        "backends": list(settings.backends),
        "peers": list(settings.peers),
        "times": {n: t.to_json() for n, t in times.items() if not n.startswith("ceiling")},
        "ceiling": ceiling | {"copy_ms": times["ceiling copy"].median},
        "results": results,
        "parity": field.parity,
        "absent": field.absent | failed,
    }


def jobs(settings: Settings) -> list[Job]:
    """(op, shape, dtype) of a run, in the table's order."""
    return [
        (op, shape, dtype)
        for op in settings.ops
        for shape in settings.shapes_of(op)
        for dtype in settings.dtypes_of(op)
    ]


def prepare(settings: Settings, job: Job, steps: Steps) -> None:
    """Runs all of a job's contenders once, which compiles what is compiled."""
    name, shape, dtype = job
    case = draw(TABLE[name], shape, getattr(torch, dtype), settings.device, settings.variant)
    field = gather(TABLE[name], shape, case, settings, steps)
    for direction in settings.passes:
        _calls(field, direction, steps)


def measured(
    settings: Settings, mode: str, wanted: Sequence[Job] | None = None, steps: Steps | None = None
) -> Iterator[Row]:
    """The rows of a run, one after the other; an op that cannot take a shape gives a row with
    `skipped`."""
    budget = measure.budget(settings.device, settings.quick)
    steps = steps or Steps(settings.device)
    for name, shape, dtype in jobs(settings) if wanted is None else wanted:
        op = TABLE[name]
        try:
            case = draw(op, shape, getattr(torch, dtype), settings.device, settings.variant)
        except UnfitShape as error:
            if settings.shapes is None:
                raise
            yield {"op": name, "shape": label(shape), "dtype": dtype, "skipped": str(error)}
            continue
        field = gather(op, shape, case, settings, steps)
        for direction in settings.passes:
            yield time_pass(field, direction, settings, mode, budget, steps)
