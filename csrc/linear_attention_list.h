// The functions that linear_attention.cpp and linear_attention.cu offer alike, as BACKEND says.
#define LINEAR_ATTENTION_OF(backend, name, names) EXPORT(backend, name, names, name)
#define LINEAR_ATTENTION(name, names) LINEAR_ATTENTION_OF(BACKEND, name, names)
LINEAR_ATTENTION(linear_attention_fwd,
                 "out, factor, state_out, sum_out, pieces, query, key, value, decay, state, sum, "
                 "key_padding_mask, "
                 "feature, causal, normalize, scale, eps")
LINEAR_ATTENTION(
    linear_attention_bwd,
    "dquery, dkey, dvalue, ddecay, dstate, dsum, pieces, numbers, logs, dout, dstate_out, "
    "dsum_out, out, factor, "
    "state_out, sum_out, query, key, value, decay, state, sum, key_padding_mask, feature, causal, "
    "normalize, scale, eps")
