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
from pydl.nn.attention import MultiheadAttention
from pydl.nn.attention_ops import AdditiveAttention, LocalAttention, ScaledDotProductAttention
from pydl.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from pydl.nn.blocks import (
    BottleneckBlock,
    DenseBlock,
    HighwayLayer,
    PreActResBlock,
    StandardResBlock,
)
from pydl.nn.encoder import TransformerEncoderLayer
from pydl.nn.gated import GEGLU, GLU, BiasAct, GatedAct, MishGLU, ReGLU, SwiGLU
from pydl.nn.linear import Linear
from pydl.nn.linear_attention import LinearAttention
from pydl.nn.norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from pydl.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "ELU",
    "GEGLU",
    "GELU",
    "GLU",
    "SELU",
    "AddLayerNorm",
    "AddRMSNorm",
    "AdditiveAttention",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct",
    "BiasAct",
    "BottleneckBlock",
    "DenseBlock",
    "GatedAct",
    "GroupNorm",
    "HighwayLayer",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearAttention",
    "LocalAttention",
    "Mish",
    "MishGLU",
    "MultiheadAttention",
    "PReLU",
    "PreActResBlock",
    "RMSNorm",
    "ReGLU",
    "ReLU",
    "ScaledDotProductAttention",
    "SiLU",
    "Sigmoid",
    "StandardResBlock",
    "SwiGLU",
    "Swish",
    "SyncBatchNorm",
    "Tanh",
    "TransformerEncoderLayer",
]
