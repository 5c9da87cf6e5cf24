// CPU: add_layer_norm and add_rms_norm over rows. Forward adds a row into a buffer that stays in
// the cache and normalises it from there; backward adds what flows back to the sum on the way.
#include "philox.h"
#include "rowwise.h"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

constexpr int64_t kFetchedBytes = 1 << 18;  // what may wait in a core's cache for its turn

// The numbers of one register as another.
template <class V, class From>
PYDL_HD V lanes_as(From x) {
  if constexpr (std::is_same_v<V, From>) {
    return x;
  } else if constexpr (std::is_same_v<V, vlow>) {
    return {x};
  } else {
    return x.v;
  }
}

template <class To, class From>
__attribute__((noinline)) void convert_row(To* to, const From* from, int64_t n) {
  using V = typename Lanes<To>::type;
  for (int64_t i = 0; i < n; i += Lanes<To>::count) {
    const int64_t count = n - i < Lanes<To>::count ? n - i : Lanes<To>::count;
    store_some(to + i, lanes_as<V>(load_some(from + i, count)), count);
  }
}

// to = residual + dropout(x), padded; the sum of what was rounded, or of its squares. `start` is
// the place of the row's first element.
template <class T, class R, bool kSquares>
__attribute__((noinline)) double add_row(R* to, const T* x, const R* residual,
                                         const Dropout& dropout, int64_t start, int64_t n) {
  using V = typename Lanes<R>::type;
  V sums[4] = {};
  double total = 0;
  over_row<R>(
      n,
      [&](int k, int64_t i, int64_t count) {
        V h = lanes_as<V>(load_some(x + i, count));
        if (dropout.threshold > 0) h = h * keep<V>(dropout, start + i);
        store(to + i, h + load_some(residual + i, count));
        h = load(to + i);
        sums[k] += kSquares ? h * h : h;
      },
      [&] { total += take(sums); });
  return total;
}

// Fetches the next row's x and residual while this one is stored: a buffer's row is in the cache,
// and the memory would do nothing but write.
template <class T, class R>
struct NormaliseSum {
  Normalise<acc_t<R>> norm;
  const T* next_x;
  const R* next_residual;
  PYDL_HD bool by_position() const { return true; }
  template <class V>
  PYDL_HD void operator()(const V (&h)[1], V (&out)[2], int64_t i) const {
    if (next_x) {
      prefetch(next_x + i);
      prefetch(next_residual + i);
    }
    V y[1];
    norm(h, y, i);
    out[0] = y[0];
    out[1] = h[0];
  }
};

// in: dy, h, and what flows back to h, if any. out: dinput, and dresidual where that differs.
template <class A>
struct NormaliseSumBackward {
  NormaliseBackward<A> norm;
  Dropout dropout;
  int64_t start;
  PYDL_HD bool by_position() const { return true; }
  template <class V, int kIn, int kOut>
  PYDL_HD void operator()(const V (&in)[kIn], V (&out)[kOut], int64_t i) const {
    const V pair[2] = {in[0], in[1]};
    V dh[1];
    norm(pair, dh, i);
    if constexpr (kIn == 3) dh[0] = dh[0] + in[2];
    if constexpr (kOut == 2) out[1] = dh[0];
    if (dropout.threshold > 0) dh[0] = dh[0] * keep<V>(dropout, start + i);
    out[0] = dh[0];
  }
};

// mean is null for add_rms_norm.
void forward(const char* op, const Out& y, const Out& sum, const Out* mean, const Out& rstd,
             const View& x, const View& residual, const Maybe& weight, const Maybe& bias,
             const Maybe& seed, double p, double eps) {
  const Rows rows = Rows::of(op, x, {&y}, {mean, &rstd});
  rows.check_same(op, Rows::of(op, residual, {&sum}, {}));
  const Dropout dropout = dropout_of(op, seed, p);
  const int64_t n = rows.n;
  if (x.numel == 0) return;
  dispatch_residual(op, x.dtype, residual.dtype, [&](auto zero, auto wide_zero) {
    using T = decltype(zero);
    using R = decltype(wide_zero);
    using A = acc_t<R>;
    using F = NormaliseSum<T, R>;
    constexpr bool kSame = std::is_same_v<T, R>;
    const Parameters<A> w(op, weight, n), b(op, bias, n);
    const bool fetches = n * static_cast<int64_t>(sizeof(T) + sizeof(R)) <= kFetchedBytes;
    const bool past_cache = kSame && x.numel * static_cast<int64_t>(sizeof(T)) >= stream_bytes;
    parallel_for(rows.count, row_grain(n), [&](int64_t begin, int64_t end) {
      const Scratch<A> added(n + kPad), normalised(kSame ? 0 : n + kPad);
      R* const row = reinterpret_cast<R*>(added.data());
      for (int64_t r = begin; r < end; ++r) {
        const T* from = static_cast<const T*>(x.data) + r * n;
        const R* other = static_cast<const R*>(residual.data) + r * n;
        T* const to = static_cast<T*>(y.data) + r * n;
        const double total = mean ? add_row<T, R, false>(row, from, other, dropout, r * n, n)
                                  : add_row<T, R, true>(row, from, other, dropout, r * n, n);
        const Moments<A> m =
            mean ? moments_from(total, row, n) : moments_from_squares(total, row, n);
        const A scale = keep_moments(m, eps, mean, rstd, r);
        const bool ahead = fetches && r + 1 < end;
        const F f{{m, scale, w.data(), b.data()}, ahead ? from + n : nullptr, other + n};
        void* const first = kSame ? static_cast<void*>(to) : normalised.data();
        void* const out[2] = {first, static_cast<R*>(sum.data) + r * n};
        const void* const in[1] = {row};
        map_run<R, F, 2, 1>(&f, out, in, n, 0, past_cache);
        if constexpr (!kSame) convert_row(to, normalised.data(), n);
      }
    });
  });
}

// partials: (pieces, 2, n) in fp64. What has no elements is not wanted. `dsum` is what flows back
// to the sum h.
void backward(const char* op, const Out& dinput, const Out& dresidual, const Out& dweight,
              const Out& dbias, const Out& partials, const View& dy, const Maybe& dsum,
              const View& h, const View* mean, const View& rstd, const Maybe& weight,
              const Maybe& seed, double p) {
  const Rows rows = Rows::of(op, h, {}, {mean, &rstd});
  rows.check_same(op, Rows::of(op, dy, {&dinput}, {}));
  const bool more = dsum.dtype != DType::none, two = dresidual.numel > 0;
  if (more) Rows::of(op, h, {&dsum}, {});
  if (two) Rows::of(op, h, {&dresidual}, {});
  rows.check_sums(op, {&dweight, &dbias}, partials);
  const Dropout dropout = dropout_of(op, seed, p);
  const int64_t n = rows.n;
  if (n == 0) return;
  dispatch_residual(op, dy.dtype, h.dtype, [&](auto zero, auto wide_zero) {
    using T = decltype(zero);
    using R = decltype(wide_zero);
    using A = acc_t<R>;
    using F = NormaliseSumBackward<A>;
    constexpr bool kSame = std::is_same_v<T, R>;
    const RunFn run = two    ? more ? &map_run<R, F, 2, 3> : &map_run<R, F, 2, 2>
                      : more ? &map_run<R, F, 1, 3>
                             : &map_run<R, F, 1, 2>;
    const Parameters<A> w(op, weight, n);
    const bool past_cache = kSame && h.numel * static_cast<int64_t>(sizeof(T)) >= stream_bytes;
    over_pieces<A>(rows, dweight, dbias, partials, [&](Range tile, A* weights, A* biases) {
      // fp32 rows where the input's are of 16 bits.
      const Scratch<A> wide(kSame ? 0 : 2 * (n + kPad));
      for (int64_t r = tile.begin; r < tile.end; ++r) {
        const T* upstream = static_cast<const T*>(dy.data) + r * n;
        const R* row = static_cast<const R*>(h.data) + r * n;
        T* const to = static_cast<T*>(dinput.data) + r * n;
        const void* in[3] = {upstream, row, static_cast<const R*>(dsum.data) + (more ? r * n : 0)};
        void* out[2] = {to, static_cast<R*>(dresidual.data) + (two ? r * n : 0)};
        if constexpr (!kSame) {
          convert_row(wide.data(), upstream, n);
          in[0] = wide.data();
          out[0] = wide.data() + n + kPad;
        }
        const A centre = mean ? static_cast<const A*>(mean->data)[r] : A(0);
        const A scale = static_cast<const A*>(rstd.data)[r];
        const auto sum_up = mean ? &dots<true, R> : &dots<false, R>;
        const Dots<A> dot = sum_up(static_cast<const R*>(in[0]), row, w.data(), centre, scale, n);
        const F f{{centre, scale, dot, w.data(), weights, biases}, dropout, r * n};
        run(&f, out, in, n, 0, past_cache);
        if constexpr (!kSame) convert_row(to, static_cast<const R*>(out[0]), n);
      }
    });
  });
  add_pieces(op, dweight, partials, 0);
  add_pieces(op, dbias, partials, 1);
}

void add_layer_norm_fwd(Out y, Out sum, Out mean, Out rstd, View x, View residual, Maybe weight,
                        Maybe bias, Maybe seed, double p, double eps) {
  forward("add_layer_norm", y, sum, &mean, rstd, x, residual, weight, bias, seed, p, eps);
}
void add_layer_norm_bwd(Out dinput, Out dresidual, Out dweight, Out dbias, Out partials, View dy,
                        Maybe dsum, View sum, View mean, View rstd, Maybe weight, Maybe seed,
                        double p) {
  backward("add_layer_norm", dinput, dresidual, dweight, dbias, partials, dy, dsum, sum, &mean,
           rstd, weight, seed, p);
}
void add_rms_norm_fwd(Out y, Out sum, Out rstd, View x, View residual, Maybe weight, Maybe seed,
                      double p, double eps) {
  forward("add_rms_norm", y, sum, nullptr, rstd, x, residual, weight, Maybe{}, seed, p, eps);
}
void add_rms_norm_bwd(Out dinput, Out dresidual, Out dweight, Out partials, View dy, Maybe dsum,
                      View sum, View rstd, Maybe weight, Maybe seed, double p) {
  backward("add_rms_norm", dinput, dresidual, dweight, Out{}, partials, dy, dsum, sum, nullptr,
           rstd, weight, seed, p);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cpu, add_layer_norm_fwd,
       "y, sum, mean, rstd, x, residual, weight, bias, seed, dropout_p, eps", add_layer_norm_fwd)
EXPORT(cpu, add_layer_norm_bwd,
       "dinput, dresidual, dweight, dbias, partials, dy, dsum, sum, mean, rstd, weight, seed, "
       "dropout_p",
       add_layer_norm_bwd)
EXPORT(cpu, add_rms_norm_fwd, "y, sum, rstd, x, residual, weight, seed, dropout_p, eps",
       add_rms_norm_fwd)
EXPORT(cpu, add_rms_norm_bwd,
       "dinput, dresidual, dweight, partials, dy, dsum, sum, rstd, weight, seed, dropout_p",
       add_rms_norm_bwd)
