// CPU: attention over tiles of queries and keys, in fp32 (fp64 for fp64). Nothing of size queries x
// keys is stored.
#include <cmath>
#include <limits>

#include "attention_backward.h"
#include "attention_forward.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

void check_like(const char* op, const char* name, const Quad& got, const int64_t (&sizes)[4],
                DType dtype) {
  bool fits = got.dtype == dtype;
  for (int d = 0; d < 4; ++d) fits = fits && got.sizes[d] == sizes[d];
  if (!fits || (got.strides[3] != 1 && got.sizes[3] > 1)) {
    fail(
        "%s: %s wants shape (%lld, %lld, %lld, %lld), its partner's dtype and neighbouring "
        "elements in the last dimension",
        op, name, static_cast<long long>(sizes[0]), static_cast<long long>(sizes[1]),
        static_cast<long long>(sizes[2]), static_cast<long long>(sizes[3]));
  }
}
DType wide_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// Sizes of what has a row a query, of `columns`.
struct Sizes {
  int64_t of[4];
  Sizes(const View& q, int64_t columns) : of{q.sizes[0], q.sizes[1], q.sizes[2], columns} {}
};

void attention_fwd(Out out, Out lse, Out rest, View query, View key, View value, Maybe mask,
                   Maybe relative, Maybe offsets_q, Maybe offsets_k, Maybe seed, int64_t longest_q,
                   int64_t longest_k, double scale, double softcap, int64_t left, int64_t right,
                   bool bottom, double dropout_p) {
  const Attention a = attention_of(
      "attention", {&query, &key, &value, &mask, &relative, &offsets_q, &offsets_k, &seed,
                    longest_q, longest_k, scale, softcap, left, right, bottom, dropout_p});
  const Quad o = Quad::of("attention", "out", out), l = Quad::of("attention", "lse", lse);
  const Quad r = Quad::of("attention", "rest", rest);
  check_like("attention", "out", o, Sizes(query, a.value_width).of, query.dtype);
  check_like("attention", "lse", l, Sizes(query, 1).of, wide_of(query.dtype));
  check_like("attention", "rest", r, Sizes(query, 1).of, wide_of(query.dtype));
  if (query.sizes[0] * query.sizes[1] * query.sizes[2] == 0) return;
  dispatch_float("attention", query.dtype,
                 [&](auto zero) { AttentionForward<decltype(zero)>{a, o, l, r}.run(); });
}

void attention_bwd(Out dquery, Out dkey, Out dvalue, Out dmask, Out drelative, View dout,
                   Maybe dlse, View out, View lse, View rest, View query, View key, View value,
                   Maybe mask, Maybe relative, Maybe offsets_q, Maybe offsets_k, Maybe seed,
                   int64_t longest_q, int64_t longest_k, double scale, double softcap, int64_t left,
                   int64_t right, bool bottom, double dropout_p) {
  const char* const op = "attention";
  const Attention a =
      attention_of(op, {&query, &key, &value, &mask, &relative, &offsets_q, &offsets_k, &seed,
                        longest_q, longest_k, scale, softcap, left, right, bottom, dropout_p});
  AttentionGradients g;
  g.dq = Quad::of(op, "dquery", dquery);
  g.dk = Quad::of(op, "dkey", dkey);
  g.dv = Quad::of(op, "dvalue", dvalue);
  if (dmask.numel > 0) g.dmask = Quad::of(op, "dmask", dmask);
  if (drelative.numel > 0) g.drelative = Quad::of(op, "drelative", drelative);
  g.dout = Quad::of(op, "dout", dout);
  g.dlse = Quad::of(op, "dlse", dlse);
  g.out = Quad::of(op, "out", out);
  g.lse = Quad::of(op, "lse", lse);
  g.rest = Quad::of(op, "rest", rest);
  const DType wide = wide_of(query.dtype);
  check_like(op, "dquery", g.dq, Sizes(query, a.width).of, query.dtype);
  check_like(op, "dkey", g.dk, Sizes(key, a.width).of, query.dtype);
  check_like(op, "dvalue", g.dv, Sizes(value, a.value_width).of, query.dtype);
  check_like(op, "dout", g.dout, Sizes(query, a.value_width).of, query.dtype);
  check_like(op, "out", g.out, Sizes(query, a.value_width).of, query.dtype);
  check_like(op, "lse", g.lse, Sizes(query, 1).of, wide);
  check_like(op, "rest", g.rest, Sizes(query, 1).of, wide);
  if (g.dlse.present()) check_like(op, "dlse", g.dlse, Sizes(query, 1).of, wide);
  if (g.dmask.present()) {
    bool alike = g.dmask.dtype == wide;
    for (int d = 0; d < 4; ++d) alike = alike && g.dmask.sizes[d] == a.mask.sizes[d];
    if (!alike) fail("%s: dmask wants the mask's shape", op);
  }
  if (g.drelative.present()) {
    check_like(op, "drelative", g.drelative, Sizes(relative, a.relative.sizes[3]).of, wide);
  }
  dispatch_float(op, query.dtype,
                 [&](auto zero) { AttentionBackward<decltype(zero)>{a, g}.run(); });
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;

#define BACKEND cpu
#include "attention_list.h"
