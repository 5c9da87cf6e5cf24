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

// F is called as f(x, p, y, sum, index): registers of the kIn inputs and of the channel's parameter
// in, of the kOut outputs and of the value to sum out.
template <class T, class F, int kOut, int kIn>
__attribute__((noinline)) void sum_piece(const F& f, T* const (&out)[kOut],
                                         const T* const (&in)[kIn], const T* parameter,
                                         const Pieces& pieces, int64_t piece, double* partial) {
  using V = typename Lanes<T>::type;
  constexpr int kWidth = Lanes<T>::count;
  const Range rows = pieces.outer(piece), columns = pieces.inner(piece);
  // Rows of one layout or the other: (outer) rows of all channels, or runs of one channel.
  const bool columns_first = pieces.inner_size == 1;
  const int64_t width = columns_first ? pieces.channels : columns.end - columns.begin;
  // The float sums of a tile stay in registers and L1 and go to the fp64 partial tile by tile.
  constexpr int64_t kBlock = 1024, kTile = 64;
  V sums[kBlock / kWidth];
  const int64_t channels = columns_first ? 1 : pieces.channels;
  for (int64_t c = 0; c < pieces.channels; ++c) partial[c] = 0;
  for (int64_t channel = 0; channel < channels; ++channel) {
    const V shared = splat<V>(to_float(parameter[channel]));
    Compensated total;
    for (int64_t c0 = 0; c0 < width; c0 += kBlock) {
      const int64_t block = width - c0 < kBlock ? width - c0 : kBlock;
      const int64_t registers = (block + kWidth - 1) / kWidth;
      for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kTile) {
        const int64_t r1 = rows.end - r0 < kTile ? rows.end : r0 + kTile;
        for (int64_t v = 0; v < registers; ++v) sums[v] = splat<V>(0);
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t start =
              columns_first
                  ? r * pieces.channels + c0
                  : (r * pieces.channels + channel) * pieces.inner_size + columns.begin + c0;
          for (int64_t v = 0; v < registers; ++v) {
            const int64_t at = start + v * kWidth;
            const int64_t count = block - v * kWidth < kWidth ? block - v * kWidth : kWidth;
            V x[kIn], y[kOut], sum;
            for (int k = 0; k < kIn; ++k) x[k] = load_some(in[k] + at, count);
            const V p = columns_first ? load_some(parameter + c0 + v * kWidth, count) : shared;
            f(x, p, y, sum, at);
            for (int k = 0; k < kOut; ++k) store_some(out[k] + at, y[k], count);
            sums[v] += sum;
          }
        }
        if (columns_first) {
          for (int64_t c = 0; c < block; ++c) partial[c0 + c] += lane(sums[c / kWidth], c % kWidth);
        } else {
          for (int64_t c = 0; c < block; ++c) total.add(lane(sums[c / kWidth], c % kWidth));
        }
      }
    }
    if (!columns_first) partial[channel] = total.sum;
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
        sum_piece<T, F, kOut, kIn>(f, out, in, static_cast<const T*>(parameter.data), pieces, piece,
                                   sums + piece * pieces.channels);
      }
    });
    for (int64_t c = 0; c < pieces.channels; ++c) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces.count(); ++piece)
        sum += sums[piece * pieces.channels + c];
      static_cast<T*>(total.data)[c] = from_float<T>(static_cast<acc_t<T>>(sum));
    }
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
