// What attention's kernels check before they start, on the CPU and on CUDA.
#pragma once

#include "attention.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr const char* kOp = "attention";

inline DType wide_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

inline void check_like(const char* name, const Quad& got, const int64_t (&sizes)[4], DType dtype) {
  bool fits = got.dtype == dtype;
  for (int d = 0; d < 4; ++d) fits = fits && got.sizes[d] == sizes[d];
  if (!fits || (got.strides[3] != 1 && got.sizes[3] > 1)) {
    fail(
        "%s: %s wants shape (%lld, %lld, %lld, %lld), its partner's dtype and neighbouring "
        "elements in the last dimension",
        kOp, name, static_cast<long long>(sizes[0]), static_cast<long long>(sizes[1]),
        static_cast<long long>(sizes[2]), static_cast<long long>(sizes[3]));
  }
}

// Sizes of what has a row for each of a tensor's, of `columns`.
struct Sizes {
  int64_t of[4];
  Sizes(const View& q, int64_t columns) : of{q.sizes[0], q.sizes[1], q.sizes[2], columns} {}
};

inline void check_forward(const Attention& a, const View& query, const Quad& out, const Quad& lse,
                          const Quad& rest) {
  check_like("out", out, Sizes(query, a.value_width).of, query.dtype);
  check_like("lse", lse, Sizes(query, 1).of, wide_of(query.dtype));
  check_like("rest", rest, Sizes(query, 1).of, wide_of(query.dtype));
}

// The last two in the accumulation type, where wanted.
struct AttentionGradients {
  Quad dq, dk, dv, dmask, drelative, dout, dlse, out, lse, rest;
};

struct GradientArgs {
  const View *dquery, *dkey, *dvalue, *dmask, *drelative, *dout, *dlse, *out, *lse, *rest;
};

inline AttentionGradients gradients_of(const Attention& a, const AttentionArgs& args,
                                       const GradientArgs& given) {
  AttentionGradients g;
  g.dq = Quad::of(kOp, "dquery", *given.dquery);
  g.dk = Quad::of(kOp, "dkey", *given.dkey);
  g.dv = Quad::of(kOp, "dvalue", *given.dvalue);
  if (given.dmask->numel > 0) g.dmask = Quad::of(kOp, "dmask", *given.dmask);
  if (given.drelative->numel > 0) g.drelative = Quad::of(kOp, "drelative", *given.drelative);
  g.dout = Quad::of(kOp, "dout", *given.dout);
  g.dlse = Quad::of(kOp, "dlse", *given.dlse);
  g.out = Quad::of(kOp, "out", *given.out);
  g.lse = Quad::of(kOp, "lse", *given.lse);
  g.rest = Quad::of(kOp, "rest", *given.rest);
  const View &query = *args.q, &key = *args.k, &value = *args.v;
  const DType dtype = query.dtype, wide = wide_of(dtype);
  check_like("dquery", g.dq, Sizes(query, a.width).of, dtype);
  check_like("dkey", g.dk, Sizes(key, a.width).of, dtype);
  check_like("dvalue", g.dv, Sizes(value, a.value_width).of, dtype);
  check_like("dout", g.dout, Sizes(query, a.value_width).of, dtype);
  check_like("out", g.out, Sizes(query, a.value_width).of, dtype);
  check_like("lse", g.lse, Sizes(query, 1).of, wide);
  check_like("rest", g.rest, Sizes(query, 1).of, wide);
  if (g.dlse.present()) check_like("dlse", g.dlse, Sizes(query, 1).of, wide);
  if (g.dmask.present()) {
    bool alike = g.dmask.dtype == wide;
    for (int d = 0; d < 4; ++d) alike = alike && g.dmask.sizes[d] == a.mask.sizes[d];
    if (!alike) fail("%s: dmask wants the mask's shape", kOp);
  }
  if (g.drelative.present()) {
    check_like("drelative", g.drelative, Sizes(*args.relative, a.relative.sizes[3]).of, wide);
  }
  return g;
}

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// CUDA's switch: body(T{}, width, general), the width being the narrowest compiled that the heads
// fit in. Few kernels serve fp32 and fp64, which need more than the window seldom enough.
template <class Body>
inline void with_width(const Attention& a, DType dtype, const Body& body) {
  const int64_t width = a.width > a.value_width ? a.width : a.value_width;
  if (width > 256)
    fail("%s: heads are %lld wide, wants 256 at most", kOp, static_cast<long long>(width));
  const bool general = a.softcap > 0 || a.mask.present() || a.relative.present() || a.drops;
  dispatch_float(kOp, dtype, [&](auto zero) {
    const auto with = [&](auto fits) {
      if constexpr (sizeof(zero) == 2) {
        if (!general) return body(zero, fits, Number<0>{});
      }
      body(zero, fits, Number<1>{});
    };
    if constexpr (sizeof(zero) <= 4) {
      if (width <= 64) return with(Number<64>{});
      if (width <= 128) return with(Number<128>{});
    }
    with(Number<256>{});
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
