// Tensors seen as (outer, channels, inner), dense, and the CPU skeleton of backward passes that
// also sum a value over all but the channels. The sums go to a fixed number of partials, which do
// not depend on the number of threads, and are added in a fixed order: the same bits each run.
#pragma once

#include "elementwise.h"
#include "pieces.h"

namespace pydl {
inline namespace PYDL_ISA {

// A sum that carries what rounding lost along (Kahan 1965): fp64 inputs leave no wider type to sum
// in.
struct Compensated {
  double sum = 0, lost = 0;
  void add(double x) {
    const double term = x - lost, next = sum + term;
    lost = (next - sum) - term;
    if (lost != lost) lost = 0;  // an infinite sum stays infinite
    sum = next;
  }
};

// One register of every operand, or its first `count` lanes: F is called as f(x, p, y, sum, index),
// registers of the kIn inputs and of the channel's parameter in, of the kOut outputs and of the
// value to sum out.
template <class T, class F, int kOut, int kIn, class V>
PYDL_HD V sum_register(const F& f, T* const (&out)[kOut], const T* const (&in)[kIn], V p,
                       int64_t at, int64_t count) {
  V x[kIn], y[kOut], sum;
#pragma GCC unroll 8
  for (int k = 0; k < kIn; ++k) x[k] = load_some(in[k] + at, count);
  f(x, p, y, sum, at);
#pragma GCC unroll 8
  for (int k = 0; k < kOut; ++k) store_some(out[k] + at, y[k], count);
  return sum;
}

// The float sums of up to kTile registers' lanes stay in registers and L1 before they go to fp64.
constexpr int64_t kBlock = 1024, kTile = 64, kColumns = 2048;

// Rows of all channels.
template <class T, class F, int kOut, int kIn>
__attribute__((noinline)) void sum_columns(const F& f, T* const (&out)[kOut],
                                           const T* const (&in)[kIn], const T* parameter,
                                           int64_t channels, Range rows, double* partial) {
  using V = typename Lanes<T>::type;
  constexpr int kWidth = Lanes<T>::count;
  V sums[kColumns / kWidth];
  for (int64_t c = 0; c < channels; ++c) partial[c] = 0;
  for (int64_t c0 = 0; c0 < channels; c0 += kColumns) {
    const int64_t block = channels - c0 < kColumns ? channels - c0 : kColumns;
    for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kTile) {
      const int64_t r1 = rows.end - r0 < kTile ? rows.end : r0 + kTile;
      for (V& sum : sums) sum = splat<V>(0);
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t c = 0; c < block; c += kWidth) {
          const V p = load_some(parameter + c0 + c, block - c);
          // The next row begins in another page, which the hardware does not foresee.
#pragma GCC unroll 8
          for (int k = 0; k < kIn; ++k) prefetch(in[k] + (r + 1) * channels + c0 + c);
          sums[c / kWidth] += sum_register<T>(f, out, in, p, r * channels + c0 + c, block - c);
        }
      }
      for (int64_t c = 0; c < block; ++c) partial[c0 + c] += lane(sums[c / kWidth], c % kWidth);
    }
  }
}

// Runs of one channel.
template <class T, class F, int kOut, int kIn>
__attribute__((noinline)) void sum_rows(const F& f, T* const (&out)[kOut],
                                        const T* const (&in)[kIn], const T* parameter,
                                        const Pieces& pieces, Range rows, Range columns,
                                        double* partial) {
  using V = typename Lanes<T>::type;
  constexpr int kWidth = Lanes<T>::count, kRegisters = kBlock / kWidth;
  V sums[kRegisters];
  for (int64_t channel = 0; channel < pieces.channels; ++channel) {
    const V p = splat<V>(to_float(parameter[channel]));
    Compensated total;
    int64_t blocks = 0;
    for (V& sum : sums) sum = splat<V>(0);
    const auto flush = [&] {
      for (int half = kRegisters / 2; half > 0 && kWidth > 1; half /= 2) {
        for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
      }
      for (int v = 0; v < (kWidth > 1 ? 1 : kRegisters); ++v) total.add(add_lanes(sums[v]));
      for (V& sum : sums) sum = splat<V>(0);
      blocks = 0;
    };
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t start = (r * pieces.channels + channel) * pieces.inner_size;
      for (int64_t c0 = columns.begin; c0 < columns.end; c0 += kBlock) {
        const int64_t block = columns.end - c0 < kBlock ? columns.end - c0 : kBlock;
        int64_t c = 0;
        for (; c + kWidth <= block; c += kWidth) {
          sums[c / kWidth] += sum_register<T>(f, out, in, p, start + c0 + c, kWidth);
        }
        if (c < block) {
          const V sum = sum_register<T>(f, out, in, p, start + c0 + c, block - c);
          for (int64_t i = 0; i < block - c; ++i) total.add(lane(sum, i));
        }
        if (++blocks == kTile) flush();
      }
    }
    flush();
    partial[channel] = total.sum;
  }
}

// partials: `count` rows, `stride` apart, which are added in order.
template <class T>
inline void add_partials(T* totals, const double* partials, int64_t channels, int64_t count,
                         int64_t stride) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t piece = 0; piece < count; ++piece) sum += partials[piece * stride + c];
    totals[c] = from_float<T>(static_cast<acc_t<T>>(sum));
  }
}

// outs, ins: (outer, channels, inner) and dense. parameter, total: (channels). partials: (pieces,
// channels), fp64.
template <class F, int kOut, int kIn>
inline void map_and_sum(const char* op, const F& f, const Out (&outs)[kOut], const View (&ins)[kIn],
                        const View& parameter, const Out& total, const Out& partials) {
  const Pieces pieces = Pieces::of(op, outs[0], parameter, total, partials);
  if (pieces.channels == 0) return;
  double* sums = static_cast<double*>(partials.data);
  dispatch_float(op, outs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out[kOut];
    const T* in[kIn];
    for (int k = 0; k < kOut; ++k) out[k] = static_cast<T*>(outs[k].data);
    for (int k = 0; k < kIn; ++k) in[k] = static_cast<const T*>(ins[k].data);
    parallel_for(pieces.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const T* parameters = static_cast<const T*>(parameter.data);
        double* partial = sums + piece * pieces.channels;
        const Range rows = pieces.outer(piece);
        if (pieces.inner_size == 1) {
          sum_columns<T, F, kOut, kIn>(f, out, in, parameters, pieces.channels, rows, partial);
        } else {
          sum_rows<T, F, kOut, kIn>(f, out, in, parameters, pieces, rows, pieces.inner(piece),
                                    partial);
        }
      }
    });
    add_partials(static_cast<T*>(total.data), sums, pieces.channels, pieces.count(),
                 pieces.channels);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
