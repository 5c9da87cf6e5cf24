"""Modules: twins of torch.nn, and those that torch lacks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pydl.nn as P

TWINS = [
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("ReLU", {"inplace": True}),
    ("LeakyReLU", {"negative_slope": 0.2}),
    ("PReLU", {"num_parameters": 6}),
    ("ELU", {"alpha": 0.5}),
    ("SELU", {}),
    ("GELU", {"approximate": "tanh"}),
    ("SiLU", {"inplace": True}),
    ("Mish", {}),
    ("GLU", {}),
]


@pytest.mark.parametrize("name, arguments", TWINS, ids=[name for name, _ in TWINS])
def test_twin(name: str, arguments: dict) -> None:
    ours, theirs = getattr(P, name)(**arguments), getattr(nn, name)(**arguments)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours.backend = "cpu"
    x = torch.randn(4, 6, 10)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    got, want = ours(a * 1), theirs(b * 1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), a)[0], torch.autograd.grad(want.sum(), b)[0]
    )


@pytest.mark.parametrize("name", ["SwiGLU", "GEGLU", "ReGLU", "MishGLU"])
def test_gated(name: str) -> None:
    module = getattr(P, name)()
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(module(torch.cat((gate, up), -1)), module(gate, up))
    act = {"SwiGLU": "silu", "GEGLU": "gelu", "ReGLU": "relu", "MishGLU": "mish"}[name]
    torch.testing.assert_close(module(gate, up), getattr(nn.functional, act)(gate) * up)


def test_swish_learns_beta() -> None:
    module = P.Swish(1.5, learnable=True, num_parameters=3)
    module(torch.randn(2, 3, 4)).sum().backward()
    (beta,) = module.parameters()
    assert beta.shape == (3,) and beta.grad is not None and beta.grad.abs().min() > 0
    assert not list(P.Swish(1.5).parameters())


def test_bias_act_drops_in_training_only() -> None:
    module = P.BiasAct(8, "relu", dropout_p=0.5)
    x = torch.rand(64, 8) + 1
    assert (module(x) == 0).any()
    module.eval()
    torch.testing.assert_close(module(x), torch.relu(x + module.bias))


@pytest.mark.parametrize("module", [P.GELU("tanh"), P.Swish(0.5, True), P.BiasAct(4), P.SwiGLU()])
def test_copies(module: nn.Module) -> None:
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stored, weights_only=False),
    )
    x = torch.randn(5, 4)
    for made in copies:
        assert repr(made) == repr(module)
        torch.testing.assert_close(made(x), module(x))
