// CPU: linear attention by chunks of the sequence, in fp32 (fp64 for fp64). Between chunks nothing
// is kept but the state.
#include "linear_attention_backward.h"
#include "linear_attention_forward.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr const char* kOp = "linear_attention";

// What only CUDA's kernels work in (pieces, numbers, logs) is empty here.
void linear_attention_fwd(Out out, Out factor, Out state_out, Out sum_out, Out, View query,
                          View key, View value, Maybe decay, Maybe state, Maybe sum,
                          Maybe key_padding_mask, int64_t feature, bool causal, bool normalize,
                          double scale, double eps) {
  const LinearAttention a =
      linear_attention_of(kOp, {&query, &key, &value, &decay, &state, &sum, &key_padding_mask,
                                feature, causal, normalize, scale, eps});
  const DType wide = accumulation_of(query.dtype);
  const Quad o = quad_of(kOp, "out", out, query.dtype, query, a.value_width);
  const Quad f = quad_of(kOp, "factor", factor, wide, query, 1);
  void* const states =
      dense_of(kOp, "state_out", state_out, wide, {a.batch, a.heads, a.width, a.value_width});
  void* const sums = dense_of(kOp, "sum_out", sum_out, wide, {a.batch, a.heads, a.width});
  dispatch_float(kOp, query.dtype,
                 [&](auto zero) { LinearForward<decltype(zero)>(a, o, f, states, sums).run(); });
}

void linear_attention_bwd(Out dquery, Out dkey, Out dvalue, Out ddecay, Out dstate, Out dsum, Out,
                          Out, Out, View dout, Maybe dstate_out, Maybe dsum_out, View out,
                          View factor, View state_out, View sum_out, View query, View key,
                          View value, Maybe decay, Maybe state, Maybe sum, Maybe key_padding_mask,
                          int64_t feature, bool causal, bool normalize, double scale, double eps) {
  const LinearAttention a =
      linear_attention_of(kOp, {&query, &key, &value, &decay, &state, &sum, &key_padding_mask,
                                feature, causal, normalize, scale, eps});
  const LinearGradients g =
      gradients_of(kOp, a, query, key, value,
                   {&dquery, &dkey, &dvalue, &ddecay, &dstate, &dsum, &dout, &dstate_out, &dsum_out,
                    &out, &factor, &state_out, &sum_out});
  dispatch_float(kOp, query.dtype, [&](auto zero) { LinearBackward<decltype(zero)>(a, g).run(); });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cpu
#include "linear_attention_list.h"
