"""torch.fx: functions are nodes, modules trace through or are nodes, and what is traced computes
the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn

import pydl
import pydl.functional as F
import pydl.nn as P
from pydl.ops.product import linear_layer
from pydl.replace import TWINS

FLOAT = torch.float64


def _holder(part: nn.Module, count: int, **given: Any) -> Any:
    """A model that gives its part so many tensors."""
    names = ", ".join(("x", "y", "z")[:count])
    scope: dict[str, Any] = {"nn": nn, "given": given}
    exec(
        f"class Holder(nn.Module):\n    def forward(self, {names}):\n"
        f"        return self.part({names}, **given)\n",
        scope,
    )
    made = scope["Holder"]()
    made.part = part
    return made.to(FLOAT)


def _twins() -> list[Any]:
    x4, x3, x5 = (2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 4, 5)
    made: dict[str, tuple[Any, tuple]] = {
        "BatchNorm1d": (6, x3), "BatchNorm2d": (6, x4), "BatchNorm3d": (6, x5),
        "GroupNorm": ((3, 6), x4), "InstanceNorm1d": (6, x3), "InstanceNorm2d": (6, x4),
        "InstanceNorm3d": (6, x5), "LayerNorm": (6, (4, 6)), "RMSNorm": (6, (4, 6)),
        "Linear": ((6, 3), (4, 6)), "MultiheadAttention": ((6, 2), (5, 2, 6)),
        "PReLU": (6, x4), "SyncBatchNorm": (6, x4),
        "TransformerEncoderLayer": ((6, 2, 8, 0.0), (5, 2, 6)),
    }  # fmt: skip
    return [(cls.__name__, *made.get(cls.__name__, ((), x4))) for cls in TWINS]


def _flow(module: nn.Module, shape: tuple, count: int = 1) -> dict[str, Any]:
    """Outputs, gradients by name and what the module's state is then."""
    torch.manual_seed(3)
    xs = [torch.randn(shape, dtype=FLOAT, requires_grad=True) for _ in range(count)]
    outs = module(*xs)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
    loss = sum((out * torch.randn(out.shape, dtype=FLOAT)).sum() for out in outs)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, [*xs, *named.values()], allow_unused=True)
    found = {f"out {i}": out for i, out in enumerate(outs)}
    found |= {f"of {i}": grad for i, grad in enumerate(grads[:count])}
    found |= dict(zip(named, grads[count:], strict=True))
    return found | {f"state {name}": one.clone() for name, one in module.state_dict().items()}


def _same(got: nn.Module, want: nn.Module, shape: tuple, count: int = 1, **bound: float) -> None:
    bound = bound or {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(_flow(got, shape, count), _flow(want, shape, count), **bound)


@pytest.mark.parametrize("asked", [None, "cpu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, args, shape", _twins())
def test_twins_trace(name: str, args: Any, shape: tuple, training: bool, asked: str | None) -> None:
    args = args if isinstance(args, tuple) else (args,)
    torch.manual_seed(1)
    count, given = 1, {}
    if name == "MultiheadAttention":
        count, given = 3, {"need_weights": False}
    # torch's SyncBatchNorm takes no CPU tensors
    native = getattr(nn, "BatchNorm2d" if name == "SyncBatchNorm" else name)
    theirs = _holder(native(*args), count, **given)
    # Traced in one mode, run in the other.
    ours = _holder(getattr(P, name)(*args), count, **given).train(not training)
    ours.load_state_dict(theirs.state_dict())
    ours.part.backend = asked
    traced = fx.symbolic_trace(ours).train(training)
    theirs.train(training)
    nodes = [n for n in traced.graph.nodes if n.op in ("call_function", "call_module")]
    assert len(nodes) == 1
    node: Any = nodes[0]
    if node.op == "call_module":
        assert traced.get_submodule(node.target) is ours.part
    else:
        assert node.target.__module__.startswith("pydl.ops")
    assert traced.state_dict().keys() == ours.state_dict().keys()
    _same(traced, theirs, shape, count)


OWN = [
    (P.Swish(2.0), 1), (P.Swish(learnable=True), 1), (P.SwiGLU(), 1), (P.GEGLU(), 2),
    (P.BiasAct(6, "gelu"), 1), (P.AddLayerNorm(6), 2), (P.AddRMSNorm(6), 2),
    (P.LinearAttention(6, 2, causal=True), 1), (P.AdditiveAttention(6, 4), 3),
    (P.ScaledDotProductAttention(), 3), (P.LocalAttention(3), 3), (P.HighwayLayer(6), 1),
]  # fmt: skip


@pytest.mark.parametrize("part, count", OWN, ids=lambda one: type(one).__name__)
def test_modules_that_torch_lacks_trace(part: nn.Module, count: int) -> None:
    model = _holder(copy.deepcopy(part), count)
    traced = fx.symbolic_trace(model)
    assert "pydl" in traced.code or any(n.op == "call_module" for n in traced.graph.nodes)
    _same(traced, model, (2, 4, 6), count, rtol=0, atol=0)


@pytest.mark.parametrize("block", ["StandardResBlock", "BottleneckBlock", "PreActResBlock"])
def test_residual_blocks_trace(block: str) -> None:
    model = getattr(P, block)(4, 8, 2).to(FLOAT)
    fresh = copy.deepcopy(model)
    _same(fx.symbolic_trace(model), fresh, (2, 4, 6, 6), rtol=0, atol=0)


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


class Encoder(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 8, 3, 3)
        self.place = nn.Parameter(torch.zeros(1, 4, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.layer(x).mean(1))


class Perceptron(nn.Module):
    """A loop over layers, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm, self.act = nn.RMSNorm(6), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.act(layer(self.norm(x)))
        return F.gelu(x)


@pytest.mark.parametrize("asked", [None, "cpu"])
@pytest.mark.parametrize("kind", [Residual, Encoder, Perceptron])
def test_models_trace_after_replace(kind: type[nn.Module], asked: str | None) -> None:
    torch.manual_seed(0)
    plain = kind().to(FLOAT)
    model = copy.deepcopy(plain)
    pydl.replace(model, backend=asked)
    traced = fx.symbolic_trace(model)
    traced.graph.lint()
    used = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    used |= {type(traced.get_submodule(name)) for name in called}
    wanted = {
        Residual: {F.relu, P.BatchNorm2d},
        Encoder: {F.layer_norm, F.gelu, P.MultiheadAttention, P.TransformerEncoderLayer},
        Perceptron: {F.silu, F.rms_norm, F.gelu, linear_layer},
    }[kind]
    assert wanted <= used
    shape = (2, 6) if kind is Perceptron else (2, 4, 6, 6)
    for node in traced.graph.nodes:
        node.type = None  # this file's annotations are words, which no pickle of torch.fx takes
    traced.recompile()
    for one in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), traced):
        _same(one, copy.deepcopy(plain), shape)


def test_a_module_that_cannot_be_a_node_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"BatchNorm2d .* is no part of the model"):
        fx.symbolic_trace(P.BatchNorm2d(3))
    model = nn.Sequential(P.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(RuntimeError, match="BatchNorm2d '0' has hooks, wants none, or a tracer"):
        fx.symbolic_trace(model)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, P.BatchNorm2d) or super().is_leaf_module(m, name)

    x = torch.randn(2, 3, 4, 4)
    traced = fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), 2 * P.BatchNorm2d(3)(x))


class _Sees(Tensor):
    """A tensor that remembers the functions it is given to."""

    seen: tuple[Any, ...] = ()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _Sees.seen += (func,)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "module, function", [(P.GELU(), TF.gelu), (P.LayerNorm(6), TF.layer_norm), (P.ELU(), TF.elu)]
)
def test_a_subclass_of_tensor_is_given_torchs_functions(module: nn.Module, function: Any) -> None:
    _Sees.seen = ()
    out = module(torch.randn(600, 6).as_subclass(_Sees))
    assert function in _Sees.seen and type(out) is _Sees
