// Layer and RMS norm of a row on a GPU, forward and backward, for the kernels that do more around
// it: a row in registers, or in memory where it is long, misaligned or fp64.
#pragma once

#include "rowwise.cuh"

namespace pydl {
inline namespace PYDL_ISA {

struct Norm {
  int64_t rows, n;
  double eps;
  bool centred;  // layer_norm, else rms_norm
};

// The mean is shift + rest: where it is large, fp32 alone would lose its end.
template <class A>
struct RowMoments {
  A shift, rest, scale;
};

// For values whose sums or squares overflow fp32: the mean by fp64, deviations scaled down. A row
// whose values are all alike has nothing left of them. each(body) calls body(value) for every
// element of the thread.
template <int kRowThreads, class Each>
PYDL_DEVICE RowMoments<float> scaled_moments(const Each& each, const Norm& norm, double* shared) {
  constexpr float kScale = 0x1p-80f;
  const float count = static_cast<float>(norm.n);
  float shift = 0;
  if (norm.centred) {
    double sum[1] = {0};
    each([&](float value) { sum[0] += value; });
    sum_row<kRowThreads>(sum, shared);
    // A division in fp64 would cost registers that the row needs.
    double inverse = 1 / count;
    inverse *= 2 - static_cast<double>(norm.n) * inverse;
    shift = static_cast<float>(sum[0] * inverse);
  }
  float sums[2] = {0, 0};
  each([&](float value) {
    const float d = (value - shift) * kScale;
    sums[0] += d;
    sums[1] += d * d;
  });
  sum_row<kRowThreads>(sums, reinterpret_cast<float*>(shared));
  const float rest = norm.centred ? sums[0] / count : 0;
  const float variance = sums[1] / count - rest * rest;
  const float scale =
      variance <= 0 ? 1 / sqrt(static_cast<float>(norm.eps)) : kScale / sqrt(variance);
  return {shift, rest / kScale, scale};
}

// Writes down what backward wants of them. each(body) as above; `of_block` serves a block's sums.
template <int kRowThreads, class A, class Each>
PYDL_DEVICE RowMoments<A> find_moments(const Each& each, A* mean, A* rstd, int64_t r,
                                       const Norm& norm, double* of_block) {
  A* const shared = reinterpret_cast<A*>(of_block);
  const A count = static_cast<A>(norm.n);
  A sum[1] = {0}, sums[2] = {0, 0};
  if (norm.centred) {
    each([&](A value) { sum[0] += value; });
    sum_row<kRowThreads>(sum, shared);
  }
  const A shift = norm.centred ? sum[0] / count : 0;
  each([&](A value) {
    const A d = value - shift;
    sums[0] += d;
    sums[1] += d * d;
  });
  sum_row<kRowThreads>(sums, shared);
  const A rest = norm.centred ? sums[0] / count : 0;
  const A variance = sums[1] / count - rest * rest;
  RowMoments<A> m{shift, rest,
                  A(1) / sqrt((variance < 0 ? A(0) : variance) + static_cast<A>(norm.eps))};
  if constexpr (sizeof(A) == 4) {
    if (!isfinite(sums[1])) m = scaled_moments<kRowThreads>(each, norm, of_block);
  }
  if (threadIdx.x == 0) {
    if (norm.centred) mean[r] = m.shift + m.rest;
    rstd[r] = m.scale;
  }
  return m;
}

template <class T, class R>
PYDL_DEVICE void write_normalised(T* y, const R& row, const RowMoments<float>& m,
                                  const Weights& weight, const Weights& bias, int64_t n) {
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    const int64_t at = R::at(item);
    if (at >= n) continue;
    float w[R::kPack], b[R::kPack];
    load_weights<R::kPack>(weight, at, 1, w);
    load_weights<R::kPack>(bias, at, 0, b);
    Pack<T, R::kPack> out;
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      const float value = to_float(row.packs[item].values[j]);
      out.values[j] = from_float<T>(((value - m.shift) - m.rest) * m.scale * w[j] + b[j]);
    }
    store(y + at, out);
  }
}

// Calls emit(at, dx) for the packs of a row's gradient, in fp32; adds to dweight and dbias.
template <int kRowThreads, class U, class R, class Emit>
PYDL_DEVICE void normalise_backward(const U& upstream, const R& row, float centre, float scale,
                                    const Weights& weight, const Norm& norm, double* shared,
                                    float (&dweight)[R::kItemsOf][R::kPack],
                                    float (&dbias)[R::kItemsOf][R::kPack], const Emit& emit) {
  float sums[2] = {0, 0};
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    if (R::at(item) >= norm.n) continue;
    float w[R::kPack];
    load_weights<R::kPack>(weight, R::at(item), 1, w);
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      const float d = to_float(upstream.packs[item].values[j]);
      const float xhat = (to_float(row.packs[item].values[j]) - centre) * scale;
      const float g = d * w[j];
      sums[0] += g;
      sums[1] += g * xhat;
      dweight[item][j] += d * xhat;
      dbias[item][j] += d;
    }
  }
  // The threads' sums meet in fp64: where a row hardly varies, `scale` is large and g - c1 small.
  double totals[2] = {sums[0], sums[1]};
  sum_row<kRowThreads>(totals, shared);
  const double mean_g = norm.centred ? totals[0] / static_cast<double>(norm.n) : 0;
  const float c1 = static_cast<float>(mean_g), rest = static_cast<float>(mean_g - c1);
  const float c2 = static_cast<float>(totals[1] / static_cast<double>(norm.n));
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    const int64_t at = R::at(item);
    if (at >= norm.n) continue;
    float w[R::kPack], dx[R::kPack];
    load_weights<R::kPack>(weight, at, 1, w);
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      const float d = to_float(upstream.packs[item].values[j]);
      const float xhat = (to_float(row.packs[item].values[j]) - centre) * scale;
      dx[j] = scale * ((fmaf(d, w[j], -c1) - rest) - xhat * c2);
    }
    emit(at, dx);
  }
}

// A piece's row of dweight and one of dbias.
template <class R>
PYDL_DEVICE void write_sums(double* partials, int64_t piece,
                            const float (&dweight)[R::kItemsOf][R::kPack],
                            const float (&dbias)[R::kItemsOf][R::kPack], int64_t n) {
  if (partials == nullptr) return;
  double* to = partials + piece * 2 * n;
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    const int64_t at = R::at(item);
    if (at >= n) continue;
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      to[at + j] = dweight[item][j];
      to[n + at + j] = dbias[item][j];
    }
  }
}

// The same for a row in memory, by a block: read three times.
template <class T, class R, class A>
PYDL_DEVICE void normalise_any(T* y, const R* row, A* mean, A* rstd, int64_t r,
                               const Weights& weight, const Weights& bias, const Norm& norm,
                               double* of_block) {
  const auto each = [&](const auto& body) {
    for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) body(to_float(row[i]));
  };
  const RowMoments<A> m = find_moments<kThreads>(each, mean, rstd, r, norm, of_block);
  for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
    A out = ((to_float(row[i]) - m.shift) - m.rest) * m.scale;
    if (weight.data != nullptr) out *= load_weight<A>(weight, i);
    if (bias.data != nullptr) out += load_weight<A>(bias, i);
    y[i] = from_float<T>(out);
  }
}

// Calls emit(i, dx) for a row's elements. Each thread owns its columns of dweight and dbias, which
// are wanted where `sums_wanted` says so.
template <class T, class R, class A, class Emit>
PYDL_DEVICE void normalise_backward_any(const T* upstream, const R* row, A centre, A scale,
                                        const Weights& weight, const Norm& norm, double* shared,
                                        bool sums_wanted, double* dweight, double* dbias,
                                        const Emit& emit) {
  double sums[2] = {0, 0};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
    A g = to_float(upstream[i]);
    if (weight.data != nullptr) g *= load_weight<A>(weight, i);
    sums[0] += g;
    sums[1] += g * ((to_float(row[i]) - centre) * scale);
  }
  sum_row<kThreads>(sums, shared);
  const double mean_g = norm.centred ? sums[0] / static_cast<double>(norm.n) : 0;
  const A c1 = static_cast<A>(mean_g), rest = static_cast<A>(mean_g - c1);
  const A c2 = static_cast<A>(sums[1] / static_cast<double>(norm.n));
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
    const A d = to_float(upstream[i]), xhat = (to_float(row[i]) - centre) * scale;
    const A g = weight.data != nullptr ? d * load_weight<A>(weight, i) : d;
    emit(i, scale * (((g - c1) - rest) - xhat * c2));
    if (sums_wanted) {
      dweight[i] += d * xhat;
      dbias[i] += d;
    }
  }
}

// Calls body(Row{}) for the least row of R that holds n elements in packs of 16 bytes of T; false
// where none does. The longest rows take kLong threads where that is more than 256; backward,
// which needs more registers, says 0.
template <class T, class R, int kLong, class Body>
bool with_row(int64_t n, const Body& body) {
  constexpr int kPack = 16 / sizeof(T);
  const auto fits = [&](auto row) {
    if (n > decltype(row)::kMost) return false;
    body(row);
    return true;
  };
  if (fits(Row<R, 32, 1, kPack>{}) || fits(Row<R, 32, 2, kPack>{})) return true;
  if constexpr (kLong > 0) {
    if (fits(Row<R, 32, 4, kPack>{})) return true;
  }
  if (fits(Row<R, 256, 1, kPack>{}) || fits(Row<R, 256, 2, kPack>{}) ||
      fits(Row<R, 256, 4, kPack>{})) {
    return true;
  }
  if constexpr (kLong > 0) {
    if (fits(Row<R, 256, 8, kPack>{})) return true;
  }
  if constexpr (kLong > 256) {
    return fits(Row<R, kLong, 4096 / kLong, kPack>{});
  }
  return false;
}

inline bool aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

template <class R>
dim3 blocks_of(int64_t rows) {
  const int64_t blocks = (rows + R::kRowsPerBlock - 1) / R::kRowsPerBlock;
  return dim3(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20));
}

inline void add_pieces(Stream stream, const Out& total, const Out& partials, int64_t which) {
  if (total.numel == 0) return;
  const int64_t pieces = partials.sizes[0], n = partials.sizes[2];
  const double* from = static_cast<const double*>(partials.data) + which * n;
  dispatch_float("layer_norm", total.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_partials(stream, static_cast<T*>(total.data), from, n, pieces, 2 * n);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
