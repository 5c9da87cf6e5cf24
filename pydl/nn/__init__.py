"""Modules: twins of `torch.nn`'s, and what torch lacks."""

from pydl.nn.activation import (
    ELU,
    GELU,
    SELU,
    LeakyReLU,
    Mish,
    PReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Swish,
    Tanh,
)
from pydl.nn.gated import GEGLU, GLU, BiasAct, GatedAct, MishGLU, ReGLU, SwiGLU
from pydl.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "ELU",
    "GEGLU",
    "GELU",
    "GLU",
    "SELU",
    "BiasAct",
    "GatedAct",
    "LayerNorm",
    "LeakyReLU",
    "Mish",
    "MishGLU",
    "PReLU",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "SwiGLU",
    "Swish",
    "Tanh",
]
