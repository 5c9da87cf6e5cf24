// CUDA: attention backward.
#include "attention_queries.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

unsigned grid_of(int64_t blocks) {
  if (blocks >= int64_t{1} << 31) {
    fail("attention: %lld blocks are too many", static_cast<long long>(blocks));
  }
  return static_cast<unsigned>(blocks);
}

template <class T, int kWidth, bool kGeneral>
void launch(Stream stream, const Attention& a, BackwardCall c) {
  using A = acc_t<T>;
  using S = BackwardShape<T, kWidth>;
  const int64_t rows = c.g.out.sizes[0] * c.g.out.sizes[1] * c.g.out.sizes[2];
  if (rows > 0) {
    const auto delta = &delta_kernel<T>;
    constexpr int kEach = kThreads / kLanesOfWarp;
    PYDL_LAUNCH(delta, dim3(grid_of((rows + kEach - 1) / kEach)), dim3(kThreads), 0, stream, a, c.g,
                static_cast<A*>(c.delta), rows);
  }
  const int rooms = kGeneral ? 2 : 0;
  c.tiles = (a.keys + S::kRows - 1) / S::kRows;
  if (const int64_t blocks = c.tiles * a.batch * a.kv_heads * S::kParts; blocks > 0) {
    const auto kernel = &attention_keys_kernel<T, kWidth, kGeneral>;
    PYDL_LAUNCH(kernel, dim3(grid_of(blocks)), dim3(S::kThreadsOfBlock), S::shared(rooms), stream,
                a, c);
  }
  c.tiles = (a.queries + S::kRows - 1) / S::kRows;
  if (const int64_t blocks = c.tiles * a.batch * a.heads * S::kParts; blocks > 0) {
    const auto kernel = &attention_queries_kernel<T, kWidth, kGeneral>;
    PYDL_LAUNCH(kernel, dim3(grid_of(blocks)), dim3(S::kThreadsOfBlock), S::shared(rooms), stream,
                a, c);
  }
  if constexpr (kGeneral) {
    if (c.relative != nullptr) {
      const auto kernel = &relative_kernel<A>;
      const int64_t count = a.heads * a.relative.sizes[3];
      PYDL_LAUNCH(kernel, dim3(grid_of((count + kThreads - 1) / kThreads)), dim3(kThreads), 0,
                  stream, static_cast<const A*>(c.relative), c.g.drelative, a.batch, a.heads,
                  c.tiles);
    }
    if (!c.g.dmask.present()) return;
    const Quad& m = c.g.dmask;
    const int64_t down = m.sizes[2] > 1 ? c.tiles : 1;
    const int64_t along = m.sizes[3] > 1 ? (a.keys + S::kInner - 1) / S::kInner : 1;
    const auto kernel = &attention_mask_kernel<T, kWidth>;
    PYDL_LAUNCH(kernel, dim3(grid_of(m.sizes[0] * m.sizes[1] * down * along)),
                dim3(S::kThreadsOfBlock), S::shared(3), stream, a, c);
  }
}

// scratch: in the accumulation type, a number for each row of the output, and, where drelative is
// wanted, as many for each head and 16 queries as the window is wide.
void attention_bwd(Stream stream, Out dquery, Out dkey, Out dvalue, Out dmask, Out drelative,
                   Out scratch, View dout, Maybe dlse, View out, View lse, View rest, View query,
                   View key, View value, Maybe mask, Maybe relative, Maybe offsets_q,
                   Maybe offsets_k, Maybe seed, int64_t longest_q, int64_t longest_k, double scale,
                   double softcap, int64_t left, int64_t right, bool bottom, double dropout_p) {
  const AttentionArgs args{&query,     &key,  &value,    &mask,     &relative, &offsets_q,
                           &offsets_k, &seed, longest_q, longest_k, scale,     softcap,
                           left,       right, bottom,    dropout_p};
  const Attention a = attention_of(kOp, args);
  BackwardCall c{};
  c.g = gradients_of(
      a, args, {&dquery, &dkey, &dvalue, &dmask, &drelative, &dout, &dlse, &out, &lse, &rest});
  const int64_t rows = out.sizes[0] * out.sizes[1] * out.sizes[2];
  const int64_t window = c.g.drelative.present() ? a.relative.sizes[3] : 0;
  const int64_t most = rows + window * a.batch * a.heads * ((a.queries + 15) / 16);
  if (scratch.numel < most || (scratch.numel > 0 && scratch.dtype != wide_of(query.dtype))) {
    fail("%s: wants scratch of %lld numbers", kOp, static_cast<long long>(most));
  }
  c.delta = scratch.data;
  with_width(a, query.dtype, [&](auto zero, auto width, auto general) {
    using T = decltype(zero);
    if (window > 0) c.relative = static_cast<acc_t<T>*>(scratch.data) + rows;
    c.wide = rows_wide<T>(a.q) && rows_wide<T>(a.k) && rows_wide<T>(a.v);
    c.wide_dout = rows_wide<T>(c.g.dout);
    c.wide_dq = rows_wide<T>(c.g.dq);
    c.wide_dk = rows_wide<T>(c.g.dk);
    c.wide_dv = rows_wide<T>(c.g.dv);
    launch<T, decltype(width)::value, decltype(general)::value>(stream, a, c);
  });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cuda
#include "attention_list.h"
ATTENTION_BWD
