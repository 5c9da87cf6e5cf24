// CPU: attention over tiles of queries and keys, in fp32 (fp64 for fp64). Nothing of size queries x
// keys is stored.
#include <cmath>
#include <limits>

#include "attention_backward.h"
#include "attention_forward.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

void attention_fwd(Out out, Out lse, Out rest, View query, View key, View value, Maybe mask,
                   Maybe relative, Maybe offsets_q, Maybe offsets_k, Maybe seed, int64_t longest_q,
                   int64_t longest_k, double scale, double softcap, int64_t left, int64_t right,
                   bool bottom, double dropout_p) {
  const Attention a =
      attention_of(kOp, {&query, &key, &value, &mask, &relative, &offsets_q, &offsets_k, &seed,
                         longest_q, longest_k, scale, softcap, left, right, bottom, dropout_p});
  const Quad o = Quad::of(kOp, "out", out), l = Quad::of(kOp, "lse", lse);
  const Quad r = Quad::of(kOp, "rest", rest);
  check_forward(a, query, o, l, r);
  if (query.sizes[0] * query.sizes[1] * query.sizes[2] == 0) return;
  dispatch_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kDots && std::is_same_v<T, bfloat16>) {
      check_tiles();
      if (dot_mode && a.queries > AttentionForward<T>::kFew) {
        return AttentionForward<T, true>{a, o, l, r}.run();
      }
    }
    AttentionForward<T>{a, o, l, r}.run();
  });
}

// scratch is for CUDA.
void attention_bwd(Out dquery, Out dkey, Out dvalue, Out dmask, Out drelative, Out, View dout,
                   Maybe dlse, View out, View lse, View rest, View query, View key, View value,
                   Maybe mask, Maybe relative, Maybe offsets_q, Maybe offsets_k, Maybe seed,
                   int64_t longest_q, int64_t longest_k, double scale, double softcap, int64_t left,
                   int64_t right, bool bottom, double dropout_p) {
  const AttentionArgs args{&query,     &key,  &value,    &mask,     &relative, &offsets_q,
                           &offsets_k, &seed, longest_q, longest_k, scale,     softcap,
                           left,       right, bottom,    dropout_p};
  const Attention a = attention_of(kOp, args);
  const AttentionGradients g = gradients_of(
      a, args, {&dquery, &dkey, &dvalue, &dmask, &drelative, &dout, &dlse, &out, &lse, &rest});
  dispatch_float(kOp, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (kDots && std::is_same_v<T, bfloat16>) {
      check_tiles();
      if (dot_mode) return AttentionBackward<T, true>{a, g}.run();
    }
    AttentionBackward<T>{a, g}.run();
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cpu
#include "attention_list.h"
ATTENTION_FWD
ATTENTION_BWD
