"""The functional API: `torch.nn.functional`'s names where torch has the function, each with
`backend=`."""

from pydl.ops.activation import (
    elu,
    gelu,
    leaky_relu,
    mish,
    prelu,
    relu,
    selu,
    sigmoid,
    silu,
    swish,
    tanh,
)
from pydl.ops.bias_act import bias_act
from pydl.ops.gated_act import gated_act
from pydl.ops.layer_norm import layer_norm, rms_norm

__all__ = [
    "bias_act",
    "elu",
    "gated_act",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "mish",
    "prelu",
    "relu",
    "rms_norm",
    "selu",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
]
