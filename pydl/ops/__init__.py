"""The ops by family: rows of the table, definitions, autograd and the functional API."""

from pydl.ops import (  # noqa: F401
    activation_rows,
    add_norm_rows,
    attention_rows,
    batch_norm_rows,
    bias_act,
    gated_act,
    layer_norm_rows,
    linear_attention_rows,
    product_rows,
    score_attention_rows,
)
