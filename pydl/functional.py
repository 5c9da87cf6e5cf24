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
from pydl.ops.add_norm import add_layer_norm, add_rms_norm
from pydl.ops.batch_norm import batch_norm, batch_norm_act, group_norm, instance_norm
from pydl.ops.bias_act import bias_act
from pydl.ops.dot_product import scaled_dot_product_attention
from pydl.ops.gated_act import gated_act
from pydl.ops.layer_norm import layer_norm, rms_norm
from pydl.ops.linear import linear_attention, linear_attention_step
from pydl.ops.local_attention import local_attention
from pydl.ops.product import linear
from pydl.ops.score_attention import additive_attention, gaussian_attention
from pydl.ops.varlen_attention import varlen_attention

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "additive_attention",
    "batch_norm",
    "batch_norm_act",
    "bias_act",
    "elu",
    "gated_act",
    "gaussian_attention",
    "gelu",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_attention",
    "linear_attention_step",
    "local_attention",
    "mish",
    "prelu",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "selu",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
    "varlen_attention",
]
