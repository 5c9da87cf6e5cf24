"""Linear attention beyond the table: state, decay, padding, hard values, steps and modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import pydl.nn as P
from pydl.functional import linear_attention, linear_attention_step
from pydl.ops.linear_attention import features
from pydl.table import TABLE, judge
from tests import harness

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FEATURES = {"identity": 0, "elu": 1, "relu": 2, "softmax": 3}


class Call:
    """Tensors of a call with state and, where causal, decay; drawn alike each time."""

    def __init__(
        self, lengths: tuple[int, int], *, heads: tuple[int, int] = (4, 2), width: int = 9,
        values: int = 7, causal: bool = True, dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        make = torch.Generator().manual_seed(lengths[0])
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=make, dtype=torch.float64).to(device, dtype)

        self.query = draw(2, heads[0], lengths[0], width)
        self.key = draw(2, heads[1], lengths[1], width)
        self.value = draw(2, heads[1], lengths[1], values)
        self.state = draw(2, heads[0], width, values).to(wide)
        self.total = draw(2, heads[0], width).abs().to(wide)
        decay = torch.linspace(0.7, 1, heads[0], dtype=wide, device=device)
        self.decay = decay if causal else None
        self.causal = causal

    def tensors(self) -> list[Tensor]:
        every = (self.query, self.key, self.value, self.state, self.total, self.decay)
        return [t for t in every if t is not None]

    def run(self, *tensors: Tensor, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, state, total, *decay = tensors or self.tensors()
        out, (after, after_total) = linear_attention(
            q, k, v, causal=self.causal, initial_state=(state, total), return_state=True,
            decay=decay[0] if decay else None, **named,
        )  # fmt: skip
        return out, after, after_total

    def gradients(self, of: torch.dtype | None = None, **named: Any) -> list[Tensor]:
        """Outputs, then the gradients of all tensors; upstream gradients have values of `of`."""
        given = [t.detach().clone().requires_grad_() for t in self.tensors()]
        outs = self.run(*given, **named)
        dys = [harness.upstream(out.detach(), of or self.query.dtype) for out in outs]
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, given, dys)]

    def to(self, dtype: torch.dtype) -> Call:
        moved = copy.copy(self)
        for name in ("query", "key", "value", "state", "total", "decay"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(dtype))
        return moved


def _by_hand(call: Call, feature_map: str, normalize: bool, eps: float, scale: float) -> list:
    """The recurrence, a token at a time."""
    q, k = (features(t, FEATURES[feature_map]) for t in (call.query, call.key))
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], call.value.shape[3], dtype=q.dtype)
    state, total = call.state.clone(), call.total.clone()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            base = 1 if call.decay is None else call.decay[h]
            keys, values = k[b, h // group], call.value[b, h // group]

            def see(i: int, b: int = b, h: int = h) -> None:
                u = q[b, h, i] @ state[b, h] * scale
                below = (q[b, h, i] @ total[b, h]) * scale + eps
                out[b, h, i] = u / below if normalize else u

            for j in range(keys.shape[0]):
                state[b, h] = base * state[b, h] + torch.outer(keys[j], values[j])
                total[b, h] = base * total[b, h] + keys[j]
                if call.causal:
                    see(j)
            for i in range(0 if call.causal else q.shape[2]):
                see(i)
    return [out, state, total]


@pytest.mark.parametrize("by", ["torch", "reference", "cpu"])
@pytest.mark.parametrize("feature_map", list(FEATURES))
@pytest.mark.parametrize("causal", [False, True])
def test_by_hand(causal: bool, feature_map: str, by: str) -> None:
    """Every way to compute it gives what a loop over tokens gives, the state too."""
    normalize = feature_map != "identity"
    call = Call((137, 137 if causal else 90), causal=causal)
    named = {"feature_map": feature_map, "normalize": normalize, "eps": 0.1, "scale": 0.7}
    for got, want in zip(
        call.run(**named, backend=by), _by_hand(call, **named), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, want)


@pytest.fixture
def kernels(backend: str) -> str:
    """A backend that has linear attention."""
    if reason := harness.lacks(TABLE["linear_attention"], backend):
        pytest.skip(f"backend {backend}: {reason}")
    return backend


def _judge_all(
    got: list[Tensor], wanted: list[Tensor], native: list[Tensor], length: int, dtype: torch.dtype
) -> None:
    """Three outputs, and the gradients of all tensors."""
    for i, (a, b, c) in enumerate(zip(got, wanted, native, strict=True)):
        if i >= 7:
            # z and decay: what flows through the divisor is taken from the output, as it was
            # rounded to the inputs' dtype.
            a, c = a.to(dtype), c.to(dtype)
        right, error, allowed = judge(a, b, c, 0 if i < 3 else length)
        assert right, f"result {i}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 64, 65, 200, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_everything(
    length: int, dtype: torch.dtype, causal: bool, kernels: str
) -> None:
    """State and decay, as inputs and outputs, and all gradients pass the judge."""
    # 300 is long enough for two pieces of a sequence on a GPU.
    few = length == 5 or (length == 300 and dtype == torch.float32)
    if harness.kind(kernels) == "triton, interpreted" and not few:
        pytest.skip("too slow in the interpreter")
    lengths = (length, length if causal else length // 2 + 1)
    call = Call(lengths, dtype=dtype, causal=causal, device=harness.device(kernels))
    got, native = call.gradients(backend=kernels), call.gradients(backend="torch")
    wanted = call.to(torch.float64).gradients(dtype, backend="reference")
    _judge_all(got, wanted, native, length, dtype)


@pytest.mark.parametrize("width", [100, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_wide_heads(causal: bool, width: int, kernels: str) -> None:
    """Heads of every width that kernels are compiled for, and values of another."""
    if harness.kind(kernels) == "triton, interpreted" and width != 100:
        pytest.skip("too slow in the interpreter")
    dtype = torch.float32
    call = Call(
        (70, 70), heads=(2, 1), width=width, values=width // 2 + 3, causal=causal, dtype=dtype,
        device=harness.device(kernels),
    )  # fmt: skip
    got, native = call.gradients(backend=kernels), call.gradients(backend="torch")
    wanted = call.to(torch.float64).gradients(dtype, backend="reference")
    _judge_all(got, wanted, native, 70, dtype)


def test_blocks_in_any_order(kernels: str) -> None:
    """The same bits, however blocks and threads follow each other."""
    if harness.kind(kernels) == "triton, interpreted":
        pytest.skip("the interpreter has one order")
    call = Call((300, 300), dtype=torch.float32, device=harness.device(kernels))
    results = []
    for seed in (1, 2):
        harness.reorder(seed)
        results.append(call.gradients(backend=kernels))
    assert all(map(harness.same_bits, *results))


@pytest.mark.parametrize("causal", [False, True])
def test_differences(causal: bool) -> None:
    """First and second derivatives by every tensor equal differences."""
    call = Call((3, 3), heads=(2, 1), width=2, values=2, causal=causal)
    call.decay = call.decay * 0.9 if causal else None  # above 1 is refused
    given = [t.detach().clone().requires_grad_() for t in call.tensors()]
    assert torch.autograd.gradcheck(lambda *t: call.run(*t, backend="cpu"), given)
    assert torch.autograd.gradgradcheck(lambda *t: call.run(*t, backend="cpu"), given)
    call = Call((70, 70), causal=causal)
    call.decay = call.decay * 0.99 if causal else None
    given = [t.detach().clone().requires_grad_() for t in call.tensors()]
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(lambda *t: call.run(*t, backend="cpu"), given, **fast)
    assert torch.autograd.gradgradcheck(lambda *t: call.run(*t, backend="cpu"), given, **fast)


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_in_any_number_of_threads(causal: bool, length: int) -> None:
    """However the work is shared out."""
    call = Call((length, length), causal=causal, dtype=torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(call.gradients(backend="cpu"))
    for other in results[1:]:
        assert all(map(harness.same_bits, results[0], other))


def test_each_gradient_alone() -> None:
    """A tensor that alone requires grad gets what it gets among others."""
    call = Call((90, 90), dtype=torch.float32)
    everything = call.gradients(backend="cpu")[3:]
    for i, wanted in enumerate(everything):
        given = [t.detach().clone().requires_grad_(k == i) for k, t in enumerate(call.tensors())]
        outs = call.run(*given, backend="cpu")
        dys = [harness.upstream(out.detach(), torch.float32) for out in outs]
        pairs = [(out, dy) for out, dy in zip(outs, dys, strict=True) if out.requires_grad]
        (got,) = torch.autograd.grad([o for o, _ in pairs], given[i], [d for _, d in pairs])
        assert harness.same_bits(got, wanted), i


WAYS = ["torch", "reference", "cpu", "cuda", "triton"]


def _or_skip(by: str) -> None:
    if by in harness.BACKENDS and (why := harness.missing(by)):
        pytest.skip(why)


@pytest.mark.parametrize("feature", ["elu", "relu", "softmax"])
def test_many_steps(feature: str) -> None:
    """One token after the other, as exact as native PyTorch's steps: by the judge."""
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, 600, 8, generator=draw) for _ in range(3))
    found = {}
    for by in ("cpu", "torch"):
        tokens, now = [], None
        for i in range(q.shape[2]):
            given = (t[:, :, i] for t in (q, k, v))
            token, now = linear_attention_step(*given, now, feature_map=feature, backend=by)
            tokens.append(token)
        found[by] = [torch.stack(tokens, 2), *now]
    out, state = linear_attention(
        *(t.double() for t in (q, k, v)), causal=True, feature_map=feature, return_state=True,
        backend="reference",
    )  # fmt: skip
    for one, want, same in zip(found["cpu"], (out, *state), found["torch"], strict=True):
        right, error, allowed = judge(one, want, same)
        assert right, (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [None, 0.9])
def test_in_parts_and_in_steps(dtype: torch.dtype, decay: float | None, kernels: str) -> None:
    """A sequence in two parts, or token by token, gives what it gives whole."""
    length, part = (75, 31) if harness.kind(kernels) == kernels else (9, 4)
    call = Call((length, length), dtype=dtype, device=harness.device(kernels))
    q, k, v = call.query, call.key, call.value
    named: dict[str, Any] = {"decay": decay, "backend": kernels}
    whole, state = linear_attention(q, k, v, causal=True, return_state=True, **named)
    first, between = linear_attention(
        q[:, :, :part], k[:, :, :part], v[:, :, :part], causal=True, return_state=True, **named
    )
    second, after = linear_attention(
        q[:, :, part:], k[:, :, part:], v[:, :, part:], causal=True, return_state=True,
        initial_state=between, **named,
    )  # fmt: skip
    tokens, now = [], None
    for i in range(length):
        token, now = linear_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], now, **named)
        tokens.append(token)
    close = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for parts in (torch.cat([first, second], 2), torch.stack(tokens, 2)):
        torch.testing.assert_close(parts, whole, rtol=close, atol=close)
    for other in (after, now):
        for a, b in zip(other, state, strict=True):
            torch.testing.assert_close(a, b, rtol=min(close, 1e-5), atol=min(close, 1e-4))


@pytest.mark.parametrize("by", ["torch", "cpu", "cuda", "triton"])
@pytest.mark.parametrize("causal", [False, True])
def test_long_in_half_precision(causal: bool, by: str) -> None:
    """Sums far beyond what fp16 holds do not overflow."""
    _or_skip(by)
    where = harness.device(by) if by in harness.BACKENDS else "cpu"
    # Fewer, but of larger features, where a kernel is interpreted.
    few = by != "cpu" and where == "cpu"
    n, size = (300, 200.0) if few else (30_000, 20.0)
    q, k = (torch.full((1, 1, n, 8), size, device=where).half().requires_grad_() for _ in range(2))
    v = torch.ones(1, 1, n, 8, device=where).half().requires_grad_()
    out = linear_attention(q, k, v, causal=causal, backend=by)
    torch.testing.assert_close(out, torch.ones_like(out))
    for grad in torch.autograd.grad(out.float().sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_divide_by(causal: bool, by: str) -> None:
    """A divisor of 0 gives 0, and gradients of 0."""
    _or_skip(by)
    where = harness.device(by) if by in harness.BACKENDS else "cpu"
    given = [-torch.rand(1, 2, 70, 4, device=where).sub(2).abs() for _ in range(3)]
    given = [t.requires_grad_() for t in given]
    out = linear_attention(*given, causal=causal, feature_map="relu", eps=0, backend=by)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), given))


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("causal", [False, True])
def test_hardly_anything_to_divide_by(causal: bool, by: str) -> None:
    """A divisor whose inverse overflows."""
    _or_skip(by)
    where = harness.device(by) if by in harness.BACKENDS else "cpu"
    q, k = torch.full((1, 1, 6, 4), -95.0, device=where), torch.zeros(1, 1, 6, 4, device=where)
    v = torch.arange(24.0, device=where).view(1, 1, 6, 4) / 24
    wanted = linear_attention(
        q.double(), k.double(), v.double(), causal=causal, eps=0, backend="reference"
    )
    out = linear_attention(q, k, v, causal=causal, eps=0, backend=by)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-3, atol=1e-4)  # of subnormal numbers


@pytest.mark.parametrize("feature", ["elu", "softmax", "relu", "identity", "a function"])
@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_ignored_may_be_anything(causal: bool, by: str, feature: str) -> None:
    """NaN in keys and values that are ignored reaches nothing, and they get no gradient."""
    _or_skip(by)
    where = harness.device(by) if by in harness.BACKENDS else "cpu"
    q, k, v = (torch.randn(2, 2, 80, 8, device=where) for _ in range(3))
    hidden = torch.zeros(2, 80, dtype=torch.bool, device=where)
    hidden[0, 50:] = hidden[1, 3:70] = True
    bad = hidden[:, None, :, None].expand_as(k)
    named: dict[str, Any] = {"causal": causal, "key_padding_mask": hidden, "backend": by}
    named["feature_map"] = torch.exp if feature == "a function" else feature
    results = []
    for fill in (0.0, float("nan")):
        given = [q, k.masked_fill(bad, fill), v.masked_fill(bad, fill)]
        given = [t.detach().requires_grad_() for t in given]
        out = linear_attention(*given, **named)
        results.append([out, *torch.autograd.grad(out.sum(), given)])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and b.isfinite().all()
        torch.testing.assert_close(a, b)
    assert not results[0][2][bad].any() and not results[0][3][bad].any()
    torch.testing.assert_close(results[0][0], results[1][0])


def test_a_function_is_differentiated() -> None:
    """Through a feature map of one's own, of other width, to its parameters too."""
    weight = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 70, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = []
    for backend in ("cpu", "reference"):
        out = linear_attention(
            q, k, v, causal=True, feature_map=lambda x: torch.exp(x @ weight / 4), backend=backend
        )
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, weight))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_state_and_decay() -> None:
    """One graph, for any length."""
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()

    def call(*t: Tensor) -> Any:
        return linear_attention(
            *t[:3], causal=True, initial_state=t[3:5], decay=t[5], return_state=True, backend="cpu"
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for length in (70, 130, 9):
        given = Call((length, length), dtype=torch.float32).tensors()
        for a, b in zip(
            torch.utils._pytree.tree_leaves(compiled(*given)),
            torch.utils._pytree.tree_leaves(call(*given)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_errors() -> None:
    """What does not fit is named."""
    x = torch.randn(1, 4, 6, 8)
    state = (torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8))
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    wrong: list[tuple[tuple, dict, str]] = [
        ((x[0], x, x), {}, "four dimensions"),
        ((x, x[..., :3], x), {}, "one width"),
        ((x, x[:, :, :3], x), {}, "as many values as keys"),
        ((x, x[:, :3], x[:, :3]), {}, "divide"),
        ((x, x[:, :, :3], x[:, :, :3]), {"causal": True}, "as many keys as queries"),
        ((x, x, x), {"decay": 0.5}, "without causal"),
        ((x, x, x), {"causal": True, "decay": torch.ones(3)}, r"decay has shape \(3,\)"),
        ((x, x, x), {"causal": True, "decay": torch.ones(4).double()}, "decay is torch.float64"),
        ((x, x, x), {"key_padding_mask": hidden[:, 1:]}, "key_padding_mask"),
        ((x, x, x), {"key_padding_mask": hidden.float()}, "key_padding_mask"),
        ((x, x, x), {"initial_state": (state[0], state[1][..., 1:])}, r"initial_state\[1\]"),
        ((x, x, x), {"initial_state": (state[0].half(), state[1])}, r"initial_state\[0\]"),
    ]
    for args, named, message in wrong:
        with pytest.raises(RuntimeError, match=f"pydl: linear_attention: .*{message}"):
            linear_attention(*args, **named, backend="cpu")
    with pytest.raises(ValueError, match="feature_map is 'exp', wants one of identity, elu"):
        linear_attention(x, x, x, feature_map="exp")
    for decay in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match="decay is"):
            linear_attention(x, x, x, causal=True, decay=decay, backend="cpu")
    with pytest.raises(RuntimeError, match=r"linear_attention_step.*three dimensions"):
        linear_attention_step(x, x, x, state)
    with pytest.raises(RuntimeError, match=r"linear_attention_step: state\[1\] has shape"):
        linear_attention_step(x[:, :, 0], x[:, :, 0], x[:, :, 0], (state[0], state[1][..., 1:]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by", [None, "reference", "cpu"])
def test_no_heads_of_queries(by: str | None, causal: bool) -> None:
    q, *more = (torch.randn(2, h, 5, 8, requires_grad=True) for h in (0, 2, 2))
    out = linear_attention(q, *more, causal=causal, backend=by)
    assert out.shape == q.shape
    for grad in torch.autograd.grad(out.sum(), more):
        assert torch.equal(grad, torch.zeros(2, 2, 5, 8))


@pytest.mark.parametrize("by", [None, "cpu"])
def test_other_kinds_of_arguments(by: str | None) -> None:
    """They are named too, whoever computes."""
    x = torch.randn(1, 4, 6, 8)
    wrong: list[tuple[tuple, dict, str]] = [
        (([1.0], x, x), {}, "query is a list, wants a Tensor"),
        ((x, None, x), {}, "key is a NoneType, wants a Tensor"),
        ((x.long(), x.long(), x.long()), {}, "query is torch.int64 on cpu, wants one floating"),
        ((x, x.half(), x), {}, "key is torch.float16 on cpu, wants one floating"),
        ((x, x, x.to("meta")), {}, "value is torch.float32 on meta, wants one floating"),
        ((x, x, x), {"initial_state": x}, r"initial_state is a Tensor, wants a pair \(S, z\)"),
        ((x, x, x), {"initial_state": (x, None)}, "initial_state"),
        ((x, x, x), {"key_padding_mask": [True]}, "key_padding_mask is a list, wants a Tensor"),
        ((x, x, x), {"eps": None}, "eps is a NoneType, wants a number"),
        ((x, x, x), {"scale": torch.tensor(2.0)}, "scale is a Tensor, wants a number"),
        ((x, x, x), {"feature_map": lambda y: None}, "feature_map made a NoneType of query"),
        ((x, x, x), {"feature_map": x}, "feature_map is a Tensor, wants one of identity"),
        ((x, x, x), {"causal": True, "decay": "0.9"}, "decay is a str, wants a number"),
        ((x, x, x), {"causal": True, "decay": [0.9] * 3}, "decay has 3 numbers, wants one or 4"),
    ]
    for args, named, message in wrong:
        refused = (RuntimeError, TypeError, ValueError)
        with pytest.raises(refused, match=f"linear_attention: {message}"):
            linear_attention(*args, **named, backend=by)
    for way in (lambda: torch.compile(linear_attention, backend="eager"), lambda: linear_attention):
        with pytest.raises(Exception, match="wants more than 0, to 1"):
            way()(x, x, x, causal=True, decay=1.5, backend=by)


def test_decays_of_one_number() -> None:
    """A number, a list, and a tensor of one or of every head's are one; its gradient is summed."""
    q, k, v = (torch.randn(1, 4, 20, 8) for _ in range(3))
    wanted = linear_attention(q, k, v, causal=True, decay=0.9, backend="cpu")
    every = torch.full((4,), 0.9, requires_grad=True)
    single = [torch.tensor(0.9, requires_grad=True), torch.tensor([0.9], requires_grad=True)]
    grads = []
    for decay in ([0.9], (0.9,) * 4, every, *single):
        out = linear_attention(q, k, v, causal=True, decay=decay, backend="cpu")
        assert torch.equal(out, wanted)
        if isinstance(decay, Tensor):
            grads.append(torch.autograd.grad(out.square().sum(), decay)[0].sum())
    torch.testing.assert_close(grads[1:], [grads[0]] * 2)


@pytest.mark.parametrize("by", ["torch", "reference", "cpu"])
def test_features_of_another_dtype(by: str) -> None:
    """A function may go to fp32, where fp16 would overflow; the output comes back."""
    given = [torch.randn(1, 2, 30, 8).half().requires_grad_() for _ in range(3)]
    out, (state, total) = linear_attention(
        *given, feature_map=lambda x: (6 * x.float()).exp(), causal=True, return_state=True,
        backend=by,
    )  # fmt: skip
    assert out.dtype == torch.float16 and state.dtype == total.dtype == torch.float32
    assert out.isfinite().all() and total.isfinite().all() and total.max() > 70000
    for grad in torch.autograd.grad(out.float().sum(), given):
        assert grad.dtype == torch.float16 and grad.isfinite().all()


@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_states_of_softmax(kernels: str) -> None:
    """In fp32, as those of other features: to its last places."""
    _or_skip(kernels)
    where = harness.device(kernels)
    draw = torch.Generator().manual_seed(0)
    n = 100 if harness.kind(kernels) != kernels else 500
    given = [torch.randn(1, 2, n, 16, generator=draw).half().to(where) for _ in range(3)]
    named: dict[str, Any] = {"feature_map": "softmax", "causal": True, "return_state": True}
    _, wanted = linear_attention(*(t.double() for t in given), **named, backend="reference")
    _, same = linear_attention(*given, **named, backend="torch")
    _, found = linear_attention(*given, **named, backend=kernels)
    for one, want, other in zip(found, wanted, same, strict=True):
        right, error, allowed = judge(one, want, other)
        assert right, (error, allowed)


def _modules() -> list[P.LinearAttention]:
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    return [
        P.LinearAttention(12, 3, causal=True, **double),
        P.LinearAttention(12, 3, 5, causal=True, decay=[0.5, 0.9, 1.0], bias=True, **double),
        P.LinearAttention(12, 3, 5, causal=True, decay=0.9, learn_decay=True, normalize=False,
                          feature_map="identity", scale=0.3, **double),
    ]  # fmt: skip


@pytest.mark.parametrize("which", range(3))
def test_module_steps(which: int) -> None:
    """Token by token a module gives what it gives for the sequence; it survives copying."""
    module = _modules()[which]
    module.backend = "cpu"
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole, state, tokens = module(x), None, []
    for i in range(9):
        token, state = module.step(x[:, i], state)
        tokens.append(token)
    torch.testing.assert_close(torch.stack(tokens, 1), whole)
    other = copy.deepcopy(module)
    other.backend = "reference"
    torch.testing.assert_close(other(x), whole)
    fresh = _modules()[which]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), whole)
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_module_by_hand() -> None:
    """What the projections are, and the context's."""
    torch.manual_seed(0)
    x, context = torch.randn(2, 9, 12), torch.randn(2, 5, 12)
    module = P.LinearAttention(12, 3, bias=True)
    weight, bias = module.to_qkv.weight.chunk(3), module.to_qkv.bias.chunk(3)
    for source in (x, context):
        q, k, v = (
            (s @ w.T + b).unflatten(-1, (3, 4)).transpose(1, 2)
            for s, w, b in zip((x, source, source), weight, bias, strict=True)
        )
        attended = linear_attention(q, k, v, backend="reference").transpose(1, 2).flatten(2)
        got = module(x) if source is x else module(x, source)
        torch.testing.assert_close(got, module.to_out(attended))
    hidden = torch.tensor([[False] * 3 + [True] * 2] * 2)
    torch.testing.assert_close(module(x, context, hidden), module(x, context[:, :3]))
    other = P.LinearAttention(12, 3, context_dim=7)
    assert other(x, torch.randn(2, 5, 7)).shape == x.shape
    assert "heads=3" in repr(other)


def test_module_errors() -> None:
    """Arguments that make no sense together."""
    for args, named in (
        ((12, 5), {}), ((0,), {}), ((12, 3), {"decay": 0.5}), ((12, 3), {"feature_map": "exp"}),
        ((12, 3, 4, True), {"decay": [0.5, 0.5]}), ((12, 3, 4, True), {"decay": 0.0}),
        ((12, 3, 4, True), {"learn_decay": True}), ((12, 3, 4, True), {"context_dim": 3}),
        ((12, 3, 4, True), {"decay": 1.0, "learn_decay": True}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="pydl: LinearAttention"):
            P.LinearAttention(*args, **named)
    x = torch.randn(1, 3, 12)
    with pytest.raises(RuntimeError, match="causal takes none"):
        P.LinearAttention(12, causal=True)(x, x)
    with pytest.raises(RuntimeError, match="step wants the causal form"):
        P.LinearAttention(12).step(x[:, 0])


def test_a_module_keeps_its_decay() -> None:
    """Whatever it is cast to: bf16 would round 0.999 to 1."""
    module = P.LinearAttention(8, 2, causal=True, decay=0.999)
    assert module.bfloat16().half().double().decay == (0.999, 0.999)
    assert not any("decay" in name for name in module.state_dict())
    x = torch.randn(1, 50, 8).double()
    q, k, v = module._split(module.to_qkv(x), 3)
    out = linear_attention(q, k, v, causal=True, decay=0.999, backend="cpu")
    torch.testing.assert_close(module(x), module.to_out(out.transpose(1, 2).flatten(2)))


def test_a_module_goes_on_from_a_state() -> None:
    """A prompt at once, then token by token."""
    module = P.LinearAttention(8, 2, causal=True, decay=0.9).double()
    x = torch.randn(2, 12, 8).double()
    wanted = module(x)
    first, state = module(x[:, :7], return_state=True)
    second, state = module(x[:, 7:10], state=state, return_state=True)
    tokens = []
    for i in (10, 11):
        token, state = module.step(x[:, i], state)
        tokens.append(token[:, None])
    torch.testing.assert_close(torch.cat([first, second, *tokens], 1), wanted)
    plain = P.LinearAttention(8, 2)
    for wrong, message in (
        (lambda: plain(x.float(), return_state=True), "a state wants the causal form"),
        (lambda: module(x[..., :5]), r"x is \(2, 12, 5\), wants \(B, L, 8\)"),
        (lambda: module.step(x), r"x is \(2, 12, 8\), wants \(B, 8\)"),
        (lambda: plain(x.float(), x[0].float()), r"context is \(12, 8\), wants \(B, L, 8\)"),
    ):
        with pytest.raises(RuntimeError, match=f"LinearAttention: {message}"):
            wrong()
