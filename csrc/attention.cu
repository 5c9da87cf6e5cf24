// CUDA: attention forward; attention_backward.cu has the backward pass.
#include "attention_checks.h"
#include "attention_forward.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

template <class T, int kWidth, bool kGeneral>
void launch(Stream stream, const Attention& a, const ForwardOut& o) {
  using S = ForwardShape<T, kWidth>;
  const int64_t tiles = (a.queries + S::kRows - 1) / S::kRows;
  const int64_t blocks = tiles * a.batch * a.heads * S::kParts;
  if (blocks == 0) return;
  if (blocks >= int64_t{1} << 31)
    fail("attention: %lld blocks are too many", static_cast<long long>(blocks));
  const auto kernel = &attention_forward_kernel<T, kWidth, kGeneral>;
  PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(S::kThreadsOfBlock),
              S::shared(kGeneral), stream, a, o, tiles);
}

void attention_fwd(Stream stream, Out out, Out lse, Out rest, View query, View key, View value,
                   Maybe mask, Maybe relative, Maybe offsets_q, Maybe offsets_k, Maybe seed,
                   int64_t longest_q, int64_t longest_k, double scale, double softcap, int64_t left,
                   int64_t right, bool bottom, double dropout_p) {
  const Attention a =
      attention_of(kOp, {&query, &key, &value, &mask, &relative, &offsets_q, &offsets_k, &seed,
                         longest_q, longest_k, scale, softcap, left, right, bottom, dropout_p});
  ForwardOut o{Quad::of(kOp, "out", out), Quad::of(kOp, "lse", lse), Quad::of(kOp, "rest", rest),
               false, false};
  check_forward(a, query, o.out, o.lse, o.rest);
  with_width(a, query.dtype, [&](auto zero, auto width, auto general) {
    using T = decltype(zero);
    o.wide = rows_wide<T>(a.q) && rows_wide<T>(a.k) && rows_wide<T>(a.v);
    o.wide_out = rows_wide<T>(o.out);
    launch<T, decltype(width)::value, decltype(general)::value>(stream, a, o);
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cuda
#include "attention_list.h"
ATTENTION_FWD
