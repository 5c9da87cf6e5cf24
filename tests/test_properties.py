"""Hypothesis draws what the samples of the table do not: shapes, strides, offsets and values."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pydl.backends import takes
from pydl.table import Case, Make, Op
from tests import harness

SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 64, 67])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
HARD = (0.0, -0.0, 1e-8, 1.0, 12.0, -12.0, 88.7, -88.7, 1e4, -1e4, 1e38, float("inf"), float("nan"))
VALUES = st.sampled_from([v for x in HARD for v in (x, -x)])


def _few(count: int) -> Callable:
    """Modest and the same each time; a failure names its call, which need not be the smallest."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[list[int], list[int], int]:
    """(order of the dimensions in memory, steps along them, offset): how a tensor lies."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    return list(order), steps, draw(st.sampled_from([0, 1, 3, 64]))


def _lay(
    tensor: torch.Tensor, layout: tuple[list[int], list[int], int], expand: int | None
) -> torch.Tensor:
    """The values in another layout; along `expand` those of index 0, with stride 0."""
    order, steps, offset = layout
    if expand is not None and tensor.shape[expand] > 1:
        return tensor.narrow(expand, 0, 1).expand(tensor.shape)
    strides, length = [0] * tensor.dim(), 1
    for d in order:
        strides[d] = length * steps[d]
        length *= max(1, tensor.shape[d]) * steps[d]
    held = tensor.new_empty(length + offset)
    return held.as_strided(tensor.shape, strides, offset).copy_(tensor)


@st.composite
def calls(draw: st.DrawFn, op: Op) -> tuple[Case, torch.dtype]:
    """A sample, or a benchmark's call of any shape; laid out anyhow, some values replaced."""
    dtype = draw(DTYPES)
    make = Make(dtype, seed=str(draw(st.integers(0, 7))))
    if draw(st.booleans()):
        shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
        while torch.Size(shape).numel() > 40_000:
            shape = shape[1:]
        case = op.bench(make, shape)
    else:
        samples = [case for case in op.samples(make) if harness.elements(case) < 20_000]
        case = samples[draw(st.integers(0, len(samples) - 1))]
    tensors = []
    # Variances and sums of products are fp32: values whose squares overflow it have none.
    most = 1e18 if op.family in ("batch_norm", *harness.ATTENTION) else float("inf")
    # Attention's backward takes its row sums from the output, rounded to 16 bits. Where one weight
    # is near 1 and dropout scales it, they miss what they are subtracted from by that rounding, and
    # a large query multiplies it; native PyTorch has it too, but not with dropout, where it keeps
    # all weights.
    if op.family == "attention" and dtype.itemsize == 2 and case.kwargs.get("dropout_p"):
        most = 12.0
    # The gradient of its w sums squared distances times what adds up to 0: of large ones the
    # rounding remains, of native PyTorch's by luck less.
    if op.name == "gaussian_attention":
        most = 12.0
    # A function goes first, in 16 bits, where that of a large value is infinite.
    if callable(case.kwargs.get("feature_map")):
        most = 10.0
    # Which products of linear attention come first is free, and what infinite ones add up to.
    infinite = op.family != "linear_attention"
    for i, tensor in enumerate(case.tensors()):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        for value in draw(st.lists(VALUES, max_size=4)) if i == 0 and tensor.numel() else ():
            if not most < abs(value) < float("inf") and (infinite or abs(value) != float("inf")):
                tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
        dims = [None, None, None, *range(tensor.dim())]
        expand = draw(st.sampled_from(dims)) if i == 0 else None
        tensors.append(_lay(tensor, draw(layouts(tuple(tensor.shape))), expand))
    return Case(f"{case.label} {dtype}", harness.bind(case, tensors), case.kwargs), dtype


def _population(op: Op, case: Case, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The definition and native PyTorch, output by output, on many ordinary values, with the call's
    further arguments.

    The judge compares largest errors; a handful of elements say little about native PyTorch's.
    """
    x = Make(dtype, seed="population")(61, 67)
    tensors = [
        x if t.shape == case.args[0].shape else t[:1].reshape(-1)[:1] for t in case.tensors()
    ]
    if not all(t.numel() for t in tensors) or case.kwargs:
        tensors = []
    try:
        many = Case("", harness.bind(case, tensors), {})
        wanted, native = op.reference(*many.to(torch.float64).args), op.native(*many.args)
    except (RuntimeError, ValueError, StopIteration):
        return []
    return [*zip(harness.several(wanted), harness.several(native), strict=True)]


def _judged(op: Op, backend: str, case: Case, dtype: torch.dtype, how: str) -> list[str]:
    got = harness.run(harness.on(op, backend), case, dtype, how)
    native = harness.run(op.native, case, dtype, how)
    wanted = harness.run(op.reference, case.to(torch.float64), dtype, how)
    complaints = [
        f"result {i}: {a.dtype} {tuple(a.shape)}, wants {b.dtype} {tuple(b.shape)}"
        for i, (a, b) in enumerate(zip(got, native, strict=True))
        if a.dtype != b.dtype or a.shape != b.shape
    ]  # fmt: skip
    if complaints:
        return complaints
    complaints = _layouts(op, case, got, native)
    more = _population(op, case, dtype)
    wrong = _wrong(op, case, got, wanted, native, more)
    if wrong:
        # Of one call native PyTorch's error may be small by luck: not of some that hardly differ.
        wrong = _wrong(op, case, got, wanted, native, more, [*_alike(op, case, dtype, how)])
    return complaints + wrong


def _layouts(op: Op, case: Case, got: list[torch.Tensor], native: list[torch.Tensor]) -> list[str]:
    """Outputs that lie otherwise than torch's; otherwise than the queries or the gate, where torch
    has several ways."""
    complaints = []
    for i in range(harness.outputs_of(got, case)):
        like = native[i] if op.family != "gated_act" else torch.empty_like(case.args[0])
        if op.family == "attention":
            query = case.args[0]
            wide = query.shape[-1] > 1 and query.stride(-1) != 1
            like = torch.empty_like(query.contiguous() if wide else query)
            if like.stride(-1) != 1 or case.kwargs.get("dilation", 1) > 1:
                continue
        if got[i].shape == like.shape and harness.strides(got[i]) != harness.strides(like):
            complaints.append(f"output {i} has strides {got[i].stride()}, wants {like.stride()}")
    return complaints


def _alike(
    op: Op, case: Case, dtype: torch.dtype, how: str
) -> Iterator[tuple[Case, list[torch.Tensor], list[torch.Tensor]]]:
    """Calls that hardly differ, rounded anew, with the definition's results and native PyTorch's.

    In fp64 both round, and often alike; how far they are from what is true, fp32 shows.
    """
    if dtype == torch.float64:
        narrow = case.to(torch.float32)
        wide = harness.run(op.reference, narrow.to(torch.float64), torch.float32, how)
        same = harness.run(op.native, narrow, torch.float32, how)
        yield case, wide, [a + (b.double() - a) * 2.0**-29 for a, b in zip(wide, same, strict=True)]
    for k in range(1, 7):
        scaled = [t * (1 + k / 64) if t.is_floating_point() else t for t in case.tensors()]
        other = Case("", harness.bind(case, scaled), case.kwargs)
        wide = harness.run(op.reference, other.to(torch.float64), dtype, how)
        yield other, wide, harness.run(op.native, other, dtype, how)


def _wrong(
    op: Op, case: Case, got: list[torch.Tensor], wanted: list[torch.Tensor],
    native: list[torch.Tensor], many: list, alike: Sequence = (),
) -> list[str]:  # fmt: skip
    """The judge's complaints; native PyTorch's results of further calls stand among both."""
    outs, whole, complaints = harness.outputs_of(got, case), harness.by_rows(op), []

    def flat(first: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([first.reshape(-1), *(other.reshape(-1) for other in others)])

    for i in range(outs):
        wide, same = [a[1][i] for a in alike], [a[2][i] for a in alike]
        if many and many[i][1].dtype == native[i].dtype:
            wide.append(many[i][0])
            same.append(many[i][1])
        complaints += harness.judged(
            f"output {i}", flat(got[i], same), flat(wanted[i], wide), flat(native[i], same),
            whole=whole,
        )  # fmt: skip
    for i, x in enumerate(case.tensors()):
        terms = max(4.0, harness.terms(op, case, got[0], x))
        grad, want, same = got[outs + i], wanted[outs + i], native[outs + i]
        if op.family == "attention":
            # Backward finds the scores again, and what it finds differs by their rounding; the
            # gradient of a key sums products with queries. Both are as large as queries are.
            sizes = case.args[0][case.args[0].isfinite()].abs().double()
            terms *= max(1.0, sizes.max().item() if sizes.numel() else 1.0) ** 2
            # torch's masks let what is not a number through, as a product with 0.
            want = torch.where(same.isfinite(), want, torch.nan)
        wide, others = [a[1][outs + i] for a in alike], [a[2][outs + i] for a in alike]
        xs = [list(a[0].tensors())[i] for a in alike]
        complaints += harness.judged_gradient(
            f"gradient {i}", flat(grad, others), flat(want, wide), flat(same, others),
            flat(x, xs), terms, whole,
        )  # fmt: skip
    return complaints


def _describe(case: Case) -> str:
    lies = ", ".join(
        f"{tuple(t.shape)} strides {t.stride()} offset {t.storage_offset()}" for t in case.tensors()
    )
    further = [a for a in case.args if not isinstance(a, torch.Tensor)]
    return f"{case.label}: {lies}; {further} {case.kwargs}"


NORMS = ("add_norm", "batch_norm", "layer_norm")


def _property(op: Op, backend: str, count: int) -> None:
    @_few(count)
    @given(call=calls(op), how=st.sampled_from(harness.DY))
    def check(call: tuple[Case, torch.dtype], how: str) -> None:
        case, dtype = call
        if not takes(backend, dtype) or (backend != "cpu" and harness.elements(case) > 4000):
            return
        # Of rows whose values are all the same nothing is left but rounding: of two results in fp64
        # the definition's is then no nearer.
        same = any(
            n > 1 and s == 0 for n, s in zip(case.args[0].shape, case.args[0].stride(), strict=True)
        )
        if same and dtype == torch.float64 and op.family in NORMS:
            return
        found = _judged(op, backend, case, dtype, how)
        assert not found, f"{_describe(case)}, dy {how}: {found}"

    check()


def test_any_call(op: Op, backend: str) -> None:
    """Whatever the shape, strides, offset and values: right, and laid out as torch lays it out."""
    _property(op, backend, {"cpu": 50, "cuda": 15}.get(backend, 5))


@_few(40)
@given(data=st.data())
def test_layouts_are_what_they_say(data: st.DataObject) -> None:
    """The strategy lays values out without losing any."""
    shape = tuple(data.draw(st.lists(SIZES, max_size=3)))
    tensor = Make(torch.float32, seed=str(zlib.crc32(repr(shape).encode())))(*shape)
    assert torch.equal(_lay(tensor, data.draw(layouts(shape)), None), tensor)
