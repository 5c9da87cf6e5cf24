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

__all__ = [
    "ELU",
    "GEGLU",
    "GELU",
    "GLU",
    "SELU",
    "BiasAct",
    "GatedAct",
    "LeakyReLU",
    "Mish",
    "MishGLU",
    "PReLU",
    "ReGLU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "SwiGLU",
    "Swish",
    "Tanh",
]
