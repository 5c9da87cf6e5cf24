// CPU: linear attention by chunks of the sequence, in fp32 (fp64 for fp64). Between chunks nothing
// is kept but the state.
#include "linear_attention_backward.h"
#include "linear_attention_forward.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr const char* kOp = "linear_attention";

// A tensor of the sizes and dtype given, with neighbouring elements in the last dimension.
Quad quad_of(const char* name, const View& view, DType dtype, const View& like, int64_t columns) {
  const Quad q = Quad::of(kOp, name, view);
  bool fits = view.dtype == dtype && view.ndim == 4;
  for (int d = 0; fits && d < 4; ++d) {
    fits = view.sizes[d] == (d < 3 ? like.sizes[d] : columns);
  }
  if (!fits || (q.strides[3] != 1 && q.sizes[3] > 1)) {
    fail(
        "%s: %s wants shape (%lld, %lld, %lld, %lld), its partner's dtype and neighbouring "
        "elements in the last dimension",
        kOp, name, static_cast<long long>(like.sizes[0]), static_cast<long long>(like.sizes[1]),
        static_cast<long long>(like.sizes[2]), static_cast<long long>(columns));
  }
  return q;
}

void linear_attention_fwd(Out out, Out factor, Out state_out, Out sum_out, View query, View key,
                          View value, Maybe decay, Maybe state, Maybe sum, Maybe key_padding_mask,
                          int64_t feature, bool causal, bool normalize, double scale, double eps) {
  const LinearAttention a =
      linear_attention_of(kOp, {&query, &key, &value, &decay, &state, &sum, &key_padding_mask,
                                feature, causal, normalize, scale, eps});
  const DType wide = accumulation_of(query.dtype);
  const Quad o = quad_of("out", out, query.dtype, query, a.value_width);
  const Quad f = quad_of("factor", factor, wide, query, 1);
  void* const states =
      dense_of(kOp, "state_out", state_out, wide, {a.batch, a.heads, a.width, a.value_width});
  void* const sums = dense_of(kOp, "sum_out", sum_out, wide, {a.batch, a.heads, a.width});
  dispatch_float(kOp, query.dtype,
                 [&](auto zero) { LinearForward<decltype(zero)>(a, o, f, states, sums).run(); });
}

void linear_attention_bwd(Out dquery, Out dkey, Out dvalue, Out ddecay, Out dstate, Out dsum,
                          View dout, Maybe dstate_out, Maybe dsum_out, View out, View factor,
                          View state_out, View sum_out, View query, View key, View value,
                          Maybe decay, Maybe state, Maybe sum, Maybe key_padding_mask,
                          int64_t feature, bool causal, bool normalize, double scale, double eps) {
  const LinearAttention a =
      linear_attention_of(kOp, {&query, &key, &value, &decay, &state, &sum, &key_padding_mask,
                                feature, causal, normalize, scale, eps});
  const DType wide = accumulation_of(query.dtype);
  const auto states = [&](const char* name, const View& view) {
    return dense_of(kOp, name, view, wide, {a.batch, a.heads, a.width, a.value_width});
  };
  const auto sums = [&](const char* name, const View& view) {
    return dense_of(kOp, name, view, wide, {a.batch, a.heads, a.width});
  };
  LinearGradients g;
  g.dq = quad_of("dquery", dquery, query.dtype, query, a.width);
  g.dk = quad_of("dkey", dkey, query.dtype, key, a.width);
  g.dv = quad_of("dvalue", dvalue, query.dtype, value, a.value_width);
  g.ddecay = dense_of(kOp, "ddecay", ddecay, wide, {a.heads});
  g.dstate = states("dstate", dstate);
  g.dsum = sums("dsum", dsum);
  g.dout = quad_of("dout", dout, query.dtype, query, a.value_width);
  g.out = quad_of("out", out, query.dtype, query, a.value_width);
  g.factor = quad_of("factor", factor, wide, query, 1);
  g.dstate_out = states("dstate_out", dstate_out);
  g.dsum_out = sums("dsum_out", dsum_out);
  g.state_out = states("state_out", state_out);
  g.sum_out = sums("sum_out", sum_out);
  if (g.ddecay && !a.decay) fail("%s: ddecay wants a decay", kOp);
  dispatch_float(kOp, query.dtype, [&](auto zero) { LinearBackward<decltype(zero)>(a, g).run(); });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cpu
#include "linear_attention_list.h"
