// What a call of linear attention is, for the CPU's and CUDA's kernels alike.
//
// With f = phi(query), g = phi(key) and scores s_ij = scale decay^(i - j) f_i g_j over all keys, or
// those up to the query's own where causal, the output is sum_j s_ij v_j, divided by eps + sum_j
// s_ij where normalised (0 where that is 0). The state, S = sum_j decay^(last - j) g_j v_j and z =
// the same sum of g_j, holds all that later queries need of the keys; an initial state stands just
// before the first key.
//
// Kernels take the sums without scale: out_i = r_i u_i with u_i = f_i S_i, and r_i = scale, or
// scale / (scale f_i z_i + eps) where normalised. Then du_i = r_i dout_i, and what flows to f_i z_i
// is rho_i = -r_i dout_i out_i where normalised, else 0.
#pragma once

#include <limits>

#include "attention.h"

namespace pydl {
inline namespace PYDL_ISA {

// Numbers as in pydl/ops/linear_attention.py.
enum class Feature : int64_t { identity, elu, relu, softmax };

// How a row of sums is divided: multiplied by `lift`, then by `by`. `factor`, what backward takes,
// is both together.
template <class A>
struct Quotient {
  A lift, by, factor;
};
template <class A>
PYDL_HD Quotient<A> quotient(A scale, A below) {
  constexpr A kMost = std::numeric_limits<A>::max(), kLift = A(0x1p64);
  if (below == 0) return {1, 0, 0};
  const A by = scale / below;
  if (!(by > kMost || by < -kMost)) return {1, by, by};
  // The inverse of a subnormal number overflows where the quotient need not.
  return {kLift, scale / (below * kLift), by > 0 ? kMost : -kMost};
}

struct LinearAttention {
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  Quad q, k, v;
  // In the accumulation type, dense: (heads), (batch, heads, width, value_width) and (batch, heads,
  // width), or null.
  const void *decay, *state, *sum;
  const uint8_t* hidden;  // (batch, keys): not 0 where a key is to be ignored, or null
  int64_t hidden_strides[2];
  Feature feature;
  bool causal, normalize;
  double scale, eps;

  PYDL_HD bool hides(int64_t b, int64_t j) const {
    return hidden && hidden[b * hidden_strides[0] + j * hidden_strides[1]];
  }
  PYDL_HD int64_t state_at(int64_t b, int64_t h) const {
    return (b * heads + h) * width * value_width;
  }
  PYDL_HD int64_t sum_at(int64_t b, int64_t h) const { return (b * heads + h) * width; }
};

// Data of a dense tensor of the sizes and dtype given; null where it is absent or empty.
inline void* dense_of(const char* op, const char* name, const View& view, DType dtype,
                      std::initializer_list<int64_t> sizes) {
  if (view.dtype == DType::none || view.numel == 0) return nullptr;
  bool fits = view.dtype == dtype && view.ndim == static_cast<int32_t>(sizes.size());
  int64_t stride = view.numel;
  for (int d = 0; fits && d < view.ndim; ++d) {
    fits = view.sizes[d] == sizes.begin()[d];
    stride /= view.sizes[d];
    fits = fits && (view.sizes[d] == 1 || view.strides[d] == stride);
  }
  if (!fits)
    fail("%s: %s does not fit the query, key and value in size, dtype or layout", op, name);
  return view.data;
}

// The arguments of a call that are no outputs.
struct LinearAttentionArgs {
  const View *q, *k, *v, *decay, *state, *sum, *hidden;
  int64_t feature;
  bool causal, normalize;
  double scale, eps;
};

inline DType accumulation_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

inline LinearAttention linear_attention_of(const char* op, const LinearAttentionArgs& args) {
  LinearAttention a{};
  for (const View* view : {args.q, args.k, args.v}) {
    if (view->ndim != 4) fail("%s: wants query, key and value of 4 dimensions", op);
    if (view->dtype != args.q->dtype) fail("%s: wants query, key and value of one dtype", op);
    if (view->strides[3] != 1 && view->sizes[3] > 1 && view->numel > 0) {
      fail("%s: wants neighbouring elements in the last dimension", op);
    }
  }
  a.q = Quad::of(op, "query", *args.q);
  a.k = Quad::of(op, "key", *args.k);
  a.v = Quad::of(op, "value", *args.v);
  a.batch = args.q->sizes[0];
  a.heads = args.q->sizes[1];
  a.queries = args.q->sizes[2];
  a.width = args.q->sizes[3];
  a.kv_heads = args.k->sizes[1];
  a.keys = args.k->sizes[2];
  a.value_width = args.v->sizes[3];
  const bool fits = args.k->sizes[0] == a.batch && args.v->sizes[0] == a.batch &&
                    args.v->sizes[1] == a.kv_heads && args.v->sizes[2] == a.keys &&
                    args.k->sizes[3] == a.width && (!args.causal || a.keys == a.queries);
  if (!fits || (a.kv_heads > 0 ? a.heads % a.kv_heads != 0 : a.heads != 0)) {
    fail(
        "%s: wants key (batch, kv heads, keys, width) and value (batch, kv heads, keys, value "
        "width) that fit a query of (%lld, %lld, %lld, %lld)",
        op, static_cast<long long>(a.batch), static_cast<long long>(a.heads),
        static_cast<long long>(a.queries), static_cast<long long>(a.width));
  }
  const DType wide = accumulation_of(args.q->dtype);
  a.decay = dense_of(op, "decay", *args.decay, wide, {a.heads});
  a.state = dense_of(op, "state", *args.state, wide, {a.batch, a.heads, a.width, a.value_width});
  a.sum = dense_of(op, "sum", *args.sum, wide, {a.batch, a.heads, a.width});
  if (args.hidden->dtype != DType::none && args.hidden->numel > 0) {
    const View& m = *args.hidden;
    if (m.dtype != DType::u8 || m.ndim != 2 || m.sizes[0] != a.batch || m.sizes[1] != a.keys) {
      fail("%s: key_padding_mask wants truth values of (batch, keys)", op);
    }
    a.hidden = static_cast<const uint8_t*>(m.data);
    for (int d = 0; d < 2; ++d) a.hidden_strides[d] = m.strides[d];
  }
  if (args.feature < 0 || args.feature > 3) {
    fail("%s: feature map %lld is none", op, static_cast<long long>(args.feature));
  }
  if (a.decay && !args.causal) fail("%s: decay wants the causal form", op);
  a.feature = static_cast<Feature>(args.feature);
  a.causal = args.causal;
  a.normalize = args.normalize;
  a.scale = args.scale;
  a.eps = args.eps;
  return a;
}

// A tensor of the sizes and dtype given, with neighbouring elements in the last dimension.
inline Quad quad_of(const char* op, const char* name, const View& view, DType dtype,
                    const View& like, int64_t columns) {
  const Quad q = Quad::of(op, name, view);
  bool fits = view.dtype == dtype && view.ndim == 4;
  for (int d = 0; fits && d < 4; ++d) {
    fits = view.sizes[d] == (d < 3 ? like.sizes[d] : columns);
  }
  if (!fits || (q.strides[3] != 1 && q.sizes[3] > 1)) {
    fail(
        "%s: %s wants shape (%lld, %lld, %lld, %lld), its partner's dtype and neighbouring "
        "elements in the last dimension",
        op, name, static_cast<long long>(like.sizes[0]), static_cast<long long>(like.sizes[1]),
        static_cast<long long>(like.sizes[2]), static_cast<long long>(columns));
  }
  return q;
}

struct LinearGradients {
  Quad dq, dk, dv;
  void *ddecay, *dstate, *dsum;  // null where not wanted
  Quad dout, out, factor;
  const void *dstate_out, *dsum_out;  // null where nothing flows back from the state
  const void *state_out, *sum_out;
};

struct LinearGradientArgs {
  const View *dquery, *dkey, *dvalue, *ddecay, *dstate, *dsum, *dout, *dstate_out, *dsum_out, *out,
      *factor, *state_out, *sum_out;
};

inline LinearGradients gradients_of(const char* op, const LinearAttention& a, const View& query,
                                    const View& key, const View& value,
                                    const LinearGradientArgs& given) {
  const DType wide = accumulation_of(query.dtype);
  const auto states = [&](const char* name, const View& view) {
    return dense_of(op, name, view, wide, {a.batch, a.heads, a.width, a.value_width});
  };
  const auto sums = [&](const char* name, const View& view) {
    return dense_of(op, name, view, wide, {a.batch, a.heads, a.width});
  };
  LinearGradients g;
  g.dq = quad_of(op, "dquery", *given.dquery, query.dtype, query, a.width);
  g.dk = quad_of(op, "dkey", *given.dkey, query.dtype, key, a.width);
  g.dv = quad_of(op, "dvalue", *given.dvalue, query.dtype, value, a.value_width);
  g.ddecay = dense_of(op, "ddecay", *given.ddecay, wide, {a.heads});
  g.dstate = states("dstate", *given.dstate);
  g.dsum = sums("dsum", *given.dsum);
  g.dout = quad_of(op, "dout", *given.dout, query.dtype, query, a.value_width);
  g.out = quad_of(op, "out", *given.out, query.dtype, query, a.value_width);
  g.factor = quad_of(op, "factor", *given.factor, wide, query, 1);
  g.dstate_out = states("dstate_out", *given.dstate_out);
  g.dsum_out = sums("dsum_out", *given.dsum_out);
  g.state_out = states("state_out", *given.state_out);
  g.sum_out = sums("sum_out", *given.sum_out);
  if (g.ddecay && !a.decay) fail("%s: ddecay wants a decay", op);
  return g;
}

}  // namespace PYDL_ISA
}  // namespace pydl
