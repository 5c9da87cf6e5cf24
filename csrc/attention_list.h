// The functions that attention.cpp and CUDA's files offer alike, as BACKEND says.
#define ATTENTION_OF(backend, name, names) EXPORT(backend, name, names, name)
#define ATTENTION(name, names) ATTENTION_OF(BACKEND, name, names)
#define ATTENTION_FWD                                                                         \
  ATTENTION(attention_fwd,                                                                    \
            "out, lse, rest, query, key, value, mask, relative, offsets_q, offsets_k, seed, " \
            "longest_q, longest_k, scale, softcap, left, right, bottom, dropout_p")
#define ATTENTION_BWD                                                                              \
  ATTENTION(attention_bwd,                                                                         \
            "dquery, dkey, dvalue, dmask, drelative, scratch, dout, dlse, out, lse, rest, query, " \
            "key, value, mask, relative, offsets_q, offsets_k, seed, longest_q, longest_k, "       \
            "scale, softcap, left, right, bottom, dropout_p")
