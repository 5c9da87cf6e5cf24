// CPU: layer_norm and rms_norm over rows, with the gradients of their weights.
#include "rowwise.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

// mean is null for rms_norm.
void forward(const char* op, const Out& y, const Out* mean, const Out& rstd, const View& x,
             const Maybe& weight, const Maybe& bias, double eps) {
  const Rows rows = Rows::of(op, x, {&y}, {mean, &rstd});
  if (x.numel == 0) return;
  dispatch_float(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameters<A> w(op, weight, rows.n), b(op, bias, rows.n);
    const bool past_cache = x.numel * static_cast<int64_t>(sizeof(T)) >= stream_bytes;
    parallel_for(rows.count, row_grain(rows.n), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = static_cast<const T*>(x.data) + r * rows.n;
        const Moments<A> m = mean ? moments(from, rows.n) : mean_square(from, rows.n);
        const A scale = keep_moments(m, eps, mean, rstd, r);
        const Normalise<A> f{m, scale, w.data(), b.data()};
        void* const out[1] = {static_cast<T*>(y.data) + r * rows.n};
        const void* const in[1] = {from};
        map_run<T, Normalise<A>, 1, 1>(&f, out, in, rows.n, 0, past_cache);
      }
    });
  });
}

// partials: (pieces, 2, n) in fp64. What has no elements is not wanted.
void backward(const char* op, const Out& dx, const Out& dweight, const Out& dbias,
              const Out& partials, const View& dy, const View& x, const View* mean,
              const View& rstd, const Maybe& weight) {
  const Rows rows = Rows::of(op, x, {&dx, &dy}, {mean, &rstd});
  rows.check_sums(op, {&dweight, &dbias}, partials);
  const int64_t n = rows.n;
  if (n == 0) return;
  dispatch_float(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Parameters<A> w(op, weight, n);
    const bool past_cache = x.numel * static_cast<int64_t>(sizeof(T)) >= stream_bytes;
    over_pieces<A>(rows, dweight, dbias, partials, [&](Range tile, A* weights, A* biases) {
      for (int64_t r = tile.begin; r < tile.end; ++r) {
        const T* d = static_cast<const T*>(dy.data) + r * n;
        const T* v = static_cast<const T*>(x.data) + r * n;
        const A centre = mean ? static_cast<const A*>(mean->data)[r] : A(0);
        const A scale = static_cast<const A*>(rstd.data)[r];
        const auto sum_up = mean ? &dots<true, T> : &dots<false, T>;
        const Dots<A> dot = sum_up(d, v, w.data(), centre, scale, n);
        const NormaliseBackward<A> f{centre, scale, dot, w.data(), weights, biases};
        void* const out[1] = {static_cast<T*>(dx.data) + r * n};
        const void* const in[2] = {d, v};
        map_run<T, NormaliseBackward<A>, 1, 2>(&f, out, in, n, 0, past_cache);
      }
    });
  });
  add_pieces(op, dweight, partials, 0);
  add_pieces(op, dbias, partials, 1);
}

void layer_norm_fwd(Out y, Out mean, Out rstd, View x, Maybe weight, Maybe bias, double eps) {
  forward("layer_norm", y, &mean, rstd, x, weight, bias, eps);
}
void layer_norm_bwd(Out dx, Out dweight, Out dbias, Out partials, View dy, View x, View mean,
                    View rstd, Maybe weight) {
  backward("layer_norm", dx, dweight, dbias, partials, dy, x, &mean, rstd, weight);
}
void rms_norm_fwd(Out y, Out rstd, View x, Maybe weight, double eps) {
  forward("rms_norm", y, nullptr, rstd, x, weight, Maybe{}, eps);
}
void rms_norm_bwd(Out dx, Out dweight, Out partials, View dy, View x, View rstd, Maybe weight) {
  backward("rms_norm", dx, dweight, Out{}, partials, dy, x, nullptr, rstd, weight);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, layer_norm_fwd, "y, mean, rstd, x, weight, bias, eps", layer_norm_fwd)
EXPORT(cpu, layer_norm_bwd, "dx, dweight, dbias, partials, dy, x, mean, rstd, weight",
       layer_norm_bwd)
EXPORT(cpu, rms_norm_fwd, "y, rstd, x, weight, eps", rms_norm_fwd)
EXPORT(cpu, rms_norm_bwd, "dx, dweight, partials, dy, x, rstd, weight", rms_norm_bwd)
