// What the CPU kernels over rows share: a row's moments, weights ready to be read a register at a
// time, and the sum of the weights' gradients over the rows.
#pragma once

#include <cmath>
#include <cstdlib>

#include "channels.h"
#include "rows.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kPad = kVectorBytes / 4;  // what the last register may read or write past a row
constexpr int64_t kRowTile = 64;            // rows whose gradients are summed in fp32 at most

// A register of a formula's type to numbers of its accumulation type.
PYDL_HD void store_as(float* p, vfloat x) { store(p, x); }
PYDL_HD void store_as(float* p, vlow x) { store(p, x.v); }
PYDL_HD void store_as(double* p, double x) { *p = x; }

// Memory of the call's own. No std::vector: its code would be shared among the levels.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(n > 0 ? static_cast<A*>(std::malloc(static_cast<size_t>(n) * sizeof(A))) : nullptr) {
    if (n > 0 && !data_) fail("no memory for %lld numbers", static_cast<long long>(n));
    clear(n);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data() const { return data_; }
  void clear(int64_t n) {
    for (int64_t i = 0; i < n; ++i) data_[i] = 0;
  }

 private:
  A* data_;
};

// A weight or bias of any dtype, in the accumulation type and padded; data() is null where absent.
template <class A>
class Parameters : public Scratch<A> {
 public:
  Parameters(const char* op, const View& given, int64_t n)
      : Scratch<A>(given.dtype == DType::none ? 0 : n + kPad) {
    if (given.dtype == DType::none) return;
    if (given.numel != n) fail("%s: wants %lld weights", op, static_cast<long long>(n));
    dispatch_float(op, given.dtype, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(given.data);
      for (int64_t i = 0; i < n; ++i) this->data()[i] = static_cast<A>(to_float(from[i]));
    });
  }
};

// Rows worth waking a thread for.
PYDL_HD int64_t row_grain(int64_t n) { return n >= kGrain ? 1 : kGrain / (n > 0 ? n : 1); }

// The mean is shift + rest: where it is large, fp32 alone would lose its end.
template <class A>
struct Moments {
  A shift, rest;
  double variance;
};

// Calls body(k, i, count), k in turn from 0 to 3, for the registers of n elements; what `body` adds
// to its four sums goes to fp64 every so often.
template <class T, class Body, class Flush>
PYDL_HD void over_row(int64_t n, const Body& body, const Flush& flush) {
  constexpr int64_t kWidth = Lanes<T>::count, kChunk = 256 * kWidth;
  for (int64_t i0 = 0; i0 < n; i0 += kChunk) {
    const int64_t i1 = n - i0 < kChunk ? n : i0 + kChunk;
    int64_t i = i0;
    for (; i + 4 * kWidth <= i1; i += 4 * kWidth) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) body(k, i + k * kWidth, kWidth);
    }
    for (; i < i1; i += kWidth) body(0, i, i1 - i < kWidth ? i1 - i : kWidth);
    flush();
  }
}
template <class V>
PYDL_HD double take(V (&sums)[4]) {
  const double total = add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (V& sum : sums) sum = splat<V>(0);
  return total;
}
// The first `count` lanes; 0 in the others.
template <class T, class V>
PYDL_HD V only(V x, int64_t count) {
  if constexpr (Lanes<T>::count == 1) {
    return x;
  } else {
    if (count >= Lanes<T>::count) return x;
    float lanes[kLanes];
    store_as(lanes, x);
    for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0;
    return load_as<V>(lanes);
  }
}

// For values whose sums or squares overflow fp32: in fp64, a value at a time.
template <class T>
__attribute__((noinline)) Moments<acc_t<T>> wide_moments(const T* x, int64_t n, bool centred) {
  using A = acc_t<T>;
  const auto count = static_cast<double>(n);
  double mean = 0, squares = 0;
  for (int64_t i = 0; centred && i < n; ++i) mean += static_cast<double>(to_float(x[i]));
  mean /= count;  // of sums that are exact where all are alike
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(to_float(x[i])) - mean;
    squares += d * d;
  }
  const A shift = static_cast<A>(mean);
  return {shift, static_cast<A>(mean - double{shift}), squares / count};
}

// Sums about `shift`, near the mean: what is left of the mean, and its squares.
template <class T>
__attribute__((noinline)) Moments<acc_t<T>> moments_about(acc_t<T> shift, const T* x, int64_t n) {
  using V = typename Lanes<T>::type;
  using A = acc_t<T>;
  V first[4] = {}, second[4] = {};
  double total = 0, squares = 0;
  over_row<T>(
      n,
      [&](int k, int64_t i, int64_t count) {
        const V d = only<T>(load_some(x + i, count) - splat<V>(shift), count);
        first[k] += d;
        second[k] += d * d;
      },
      [&] {
        total += take(first);
        squares += take(second);
      });
  const double rest = total / static_cast<double>(n);
  const double variance = squares / static_cast<double>(n) - rest * rest;
  if (!std::isfinite(variance)) return wide_moments(x, n, true);
  return {shift, static_cast<A>(rest), variance < 0 ? 0 : variance};
}
template <class T>
inline Moments<acc_t<T>> moments_from(double sum, const T* x, int64_t n) {
  return moments_about(static_cast<acc_t<T>>(sum / static_cast<double>(n)), x, n);
}

// In two passes, the second about the mean: for channels, whose parts are put together.
template <class T>
__attribute__((noinline)) Moments<acc_t<T>> moments_in_two(const T* x, int64_t n) {
  using V = typename Lanes<T>::type;
  V sums[4] = {};
  double total = 0;
  over_row<T>(
      n, [&](int k, int64_t i, int64_t count) { sums[k] += load_some(x + i, count); },
      [&] { total += take(sums); });
  return moments_from(total, x, n);
}

// In one pass about the mean of the first few, in another where that was no good guess: further off
// than a standard deviation, so that the squares would cancel.
template <class T>
inline Moments<acc_t<T>> moments(const T* x, int64_t n) {
  using V = typename Lanes<T>::type;
  using A = acc_t<T>;
  constexpr int64_t kFew = Lanes<T>::count > 1 ? Lanes<T>::count : 16;
  const int64_t few = n < kFew ? n : kFew;
  double guess = 0;
  for (int64_t i = 0; i < few; i += Lanes<T>::count) {
    const int64_t count = few - i < Lanes<T>::count ? few - i : Lanes<T>::count;
    guess += add_lanes(load_some(x + i, count) * splat<V>(1.0 / static_cast<double>(few)));
  }
  const Moments<A> m = moments_about(static_cast<A>(guess), x, n);
  const double rest = static_cast<double>(m.rest);
  if (rest * rest <= m.variance) return m;
  return moments_about(static_cast<A>(guess + rest), x, n);
}

// As a variance about 0, the mean of squares that add up to `squares`.
template <class T>
inline Moments<acc_t<T>> moments_from_squares(double squares, const T* x, int64_t n) {
  if (!std::isfinite(squares)) return wide_moments(x, n, false);
  return {0, 0, squares / static_cast<double>(n)};
}

// The mean of the squares, as a variance about 0.
template <class T>
__attribute__((noinline)) Moments<acc_t<T>> mean_square(const T* x, int64_t n) {
  using V = typename Lanes<T>::type;
  V sums[4] = {};
  double total = 0;
  over_row<T>(
      n,
      [&](int k, int64_t i, int64_t count) {
        const V value = load_some(x + i, count);
        sums[k] += value * value;
      },
      [&] { total += take(sums); });
  return moments_from_squares(total, x, n);
}

// Writes a row's mean (where it is wanted) and scale, and returns the scale.
template <class A>
inline A keep_moments(const Moments<A>& m, double eps, const View* mean, const View& rstd,
                      int64_t row) {
  const A scale = static_cast<A>(1 / std::sqrt(m.variance + eps));
  if (mean) static_cast<A*>(mean->data)[row] = m.shift + m.rest;
  static_cast<A*>(rstd.data)[row] = scale;
  return scale;
}

// The means of g = dy w, as g + rest, and of g xhat, xhat = (x - mean) scale + offset: the offset
// is what rounding has left of the mean, which where that is large is much of a value's last
// places. Not centred, there is neither a mean to take away from g nor an offset.
template <class A>
struct Dots {
  A g, rest, gx, offset;
};
template <bool kCentred, class T>
__attribute__((noinline)) Dots<acc_t<T>> dots(const T* dy, const T* x, const acc_t<T>* weight,
                                              acc_t<T> mean, acc_t<T> scale, int64_t n) {
  using V = typename Lanes<T>::type;
  using A = acc_t<T>;
  V g_sums[4] = {}, gx_sums[4] = {}, x_sums[4] = {};
  double g_total = 0, gx_total = 0, x_total = 0;
  over_row<T>(
      n,
      [&](int k, int64_t i, int64_t count) {
        V g = load_some(dy + i, count);
        if (weight) g = g * load_as<V>(weight + i);
        const V xhat = only<T>((load_some(x + i, count) - splat<V>(mean)) * splat<V>(scale), count);
        gx_sums[k] += g * xhat;
        if constexpr (kCentred) {
          g_sums[k] += g;
          x_sums[k] += xhat;
        }
      },
      [&] {
        gx_total += take(gx_sums);
        if constexpr (kCentred) {
          g_total += take(g_sums);
          x_total += take(x_sums);
        }
      });
  const auto count = static_cast<double>(n);
  const double mean_g = g_total / count, left = x_total / count;
  const A g = static_cast<A>(mean_g);
  return {g, static_cast<A>(mean_g - g), static_cast<A>(gx_total / count - left * mean_g),
          static_cast<A>(-left)};
}

template <class A>
struct Normalise {
  A shift, scale, offset;  // the mean is shift - offset / scale
  const A *weight, *bias;
  Normalise(const Moments<A>& m, A by, const A* w, const A* b)
      : shift(m.shift), scale(by), offset(-(m.rest * by)), weight(w), bias(b) {}
  PYDL_HD bool by_position() const { return true; }
  template <class V>
  PYDL_HD void operator()(const V (&x)[1], V (&y)[1], int64_t i) const {
    V out = (x[0] - splat<V>(shift)) * splat<V>(scale) + splat<V>(offset);
    if (weight) out = out * load_as<V>(weight + i);
    if (bias) out = out + load_as<V>(bias + i);
    y[0] = out;
  }
};

// in: dy, x. Adds a row's part to dweight and dbias.
template <class A>
struct NormaliseBackward {
  A mean, scale;
  Dots<A> dot;
  const A* weight;
  A *dweight, *dbias;
  PYDL_HD bool by_position() const { return true; }
  template <class V>
  PYDL_HD void operator()(const V (&in)[2], V (&dx)[1], int64_t i) const {
    const V xhat = (in[1] - splat<V>(mean)) * splat<V>(scale) + splat<V>(dot.offset);
    V g = in[0];
    if (weight) g = g * load_as<V>(weight + i);
    if (dweight) store_as(dweight + i, load_as<V>(dweight + i) + in[0] * xhat);
    if (dbias) store_as(dbias + i, load_as<V>(dbias + i) + in[0]);
    dx[0] =
        splat<V>(scale) * (((g - splat<V>(dot.g)) - splat<V>(dot.rest)) - xhat * splat<V>(dot.gx));
  }
};

// Calls body(rows, weights, biases) for tiles of rows, in pieces of partials (pieces, 2, n). `body`
// adds its rows' part of dweight and dbias to those numbers; null is not wanted.
template <class A, class Body>
inline void over_pieces(const Rows& rows, const View& dweight, const View& dbias,
                        const View& partials, const Body& body) {
  const int64_t n = rows.n;
  const bool sums = partials.numel > 0;
  const int64_t pieces = sums ? partials.sizes[0] : (rows.count + kRowTile - 1) / kRowTile;
  parallel_for(pieces, 1, [&](int64_t first, int64_t last) {
    const int64_t width = n + kPad;
    const Scratch<A> added(sums ? 2 * width : 0);
    A* const weights = dweight.numel > 0 ? added.data() : nullptr;
    A* const biases = dbias.numel > 0 ? added.data() + width : nullptr;
    for (int64_t piece = first; piece < last; ++piece) {
      double* totals = sums ? static_cast<double*>(partials.data) + piece * 2 * n : nullptr;
      for (int64_t i = 0; totals && i < 2 * n; ++i) totals[i] = 0;
      const Range range = Pieces::share(rows.count, pieces, piece);
      for (int64_t r0 = range.begin; r0 < range.end; r0 += kRowTile) {
        body(Range{r0, range.end - r0 < kRowTile ? range.end : r0 + kRowTile}, weights, biases);
        for (int64_t i = 0; totals && i < n; ++i) {
          totals[i] += added.data()[i];
          totals[n + i] += added.data()[width + i];
          added.data()[i] = added.data()[width + i] = 0;
        }
      }
    }
  });
}

// out[i] = the sum over pieces of partials (pieces, 2, n) at `which`, in a fixed order.
inline void add_pieces(const char* op, const View& out, const View& partials, int64_t which) {
  if (out.numel == 0) return;
  const int64_t pieces = partials.sizes[0], n = partials.sizes[2];
  const double* from = static_cast<const double*>(partials.data) + which * n;
  dispatch_float(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_partials(static_cast<T*>(out.data), from, n, pieces, 2 * n);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
