// Layer and RMS norm of a row on a GPU, forward and backward, for the kernels that do more around
// it: a row in registers, or in memory where it is long, misaligned or fp64.
#pragma once

#include "rowwise.cuh"

namespace pydl {
inline namespace PYDL_ISA {

struct Norm {
  int64_t rows, n;
  double eps;
  bool centred;    // layer_norm, else rms_norm
  double inverse;  // 1 / n: a division in fp64 would cost registers that the row needs

  static Norm of(const Rows& rows, double eps, bool centred) {
    return {rows.count, rows.n, eps, centred, 1 / static_cast<double>(rows.n > 0 ? rows.n : 1)};
  }
};

// The mean is shift + rest: where it is large, fp32 alone would lose its end.
template <class A>
struct RowMoments {
  A shift, rest, scale;
};

// For values whose sums or squares overflow fp32: the mean by fp64, deviations scaled down. A row
// whose values are all alike has nothing left of them. each(body) calls body(value) for every
// element of the thread; sum_up(values) adds over the row's threads.
template <class Each, class Sums>
PYDL_DEVICE RowMoments<float> scaled_moments(const Each& each, const Norm& norm, Sums& sum_up) {
  constexpr float kScale = 0x1p-80f;
  const float count = static_cast<float>(norm.n);
  float shift = 0;
  if (norm.centred) {
    double sum[1] = {0};
    each([&](float value) { sum[0] += value; });
    sum_up(sum);
    shift = static_cast<float>(sum[0] * norm.inverse);
  }
  float sums[2] = {0, 0};
  each([&](float value) {
    const float d = (value - shift) * kScale;
    sums[0] += d;
    sums[1] += d * d;
  });
  sum_up(sums);
  const float rest = norm.centred ? sums[0] / count : 0;
  const float variance = sums[1] / count - rest * rest;
  const float scale =
      variance <= 0 ? 1 / sqrt(static_cast<float>(norm.eps)) : kScale / sqrt(variance);
  return {shift, rest / kScale, scale};
}

// Writes down what backward wants of them. each(body) and sum_up(values) as above.
template <class A, class Each, class Sums>
PYDL_DEVICE RowMoments<A> find_moments(const Each& each, A* mean, A* rstd, int64_t r,
                                       const Norm& norm, Sums&& sum_up) {
  const A count = static_cast<A>(norm.n);
  A sum[1] = {0}, sums[2] = {0, 0};
  if (norm.centred) {
    each([&](A value) { sum[0] += value; });
    sum_up(sum);
  }
  const A shift = norm.centred ? sum[0] / count : 0;
  each([&](A value) {
    const A d = value - shift;
    sums[0] += d;
    sums[1] += d * d;
  });
  sum_up(sums);
  const A rest = norm.centred ? sums[0] / count : 0;
  const A variance = sums[1] / count - rest * rest;
  RowMoments<A> m{shift, rest,
                  A(1) / sqrt((variance < 0 ? A(0) : variance) + static_cast<A>(norm.eps))};
  if constexpr (sizeof(A) == 4) {
    if (!isfinite(sums[1])) m = scaled_moments(each, norm, sum_up);
  }
  if (threadIdx.x == 0) {
    if (norm.centred) mean[r] = m.shift + m.rest;
    rstd[r] = m.scale;
  }
  return m;
}

template <class T, class R>
PYDL_DEVICE void write_normalised(T* y, const R& row, const RowMoments<float>& m,
                                  const Weights& weight, const Weights& bias,
                                  const Columns& columns) {
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    const int64_t at = R::at(item);
    if (at >= columns.own) continue;
    float w[R::kPack], b[R::kPack];
    load_weights<R::kPack>(weight, columns.first + at, 1, w);
    load_weights<R::kPack>(bias, columns.first + at, 0, b);
    Pack<T, R::kPack> out;
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      const float value = to_float(row.packs[item].values[j]);
      out.values[j] = from_float<T>(((value - m.shift) - m.rest) * m.scale * w[j] + b[j]);
    }
    store(y + at, out);
  }
}

// Calls emit(at, dx) for the packs of these columns of a row's gradient, in fp32; adds to dweight
// and dbias.
template <class U, class R, class Sums, class Emit>
PYDL_DEVICE void normalise_backward(const U& upstream, const R& row, float centre, float scale,
                                    const Weights& weight, const Norm& norm, const Columns& columns,
                                    Sums&& sum_up, float (&dweight)[R::kItemsOf][R::kPack],
                                    float (&dbias)[R::kItemsOf][R::kPack], const Emit& emit) {
  float sums[kMostSums] = {};
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    if (R::at(item) >= columns.own) continue;
    float w[R::kPack];
    load_weights<R::kPack>(weight, columns.first + R::at(item), 1, w);
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      const float xhat = (to_float(row.packs[item].values[j]) - centre) * scale;
      const float g = to_float(upstream.packs[item].values[j]) * w[j];
      sums[0] += g;
      sums[1] += g * xhat;
      sums[2] += xhat;
    }
  }
  // The threads' sums meet in fp64: where a row hardly varies, `scale` is large and g - c1 small.
  double totals[kMostSums] = {sums[0], sums[1], sums[2]};
  sum_up(totals);
  const double mean_g = norm.centred ? totals[0] * norm.inverse : 0;
  // What rounding has left of the mean; where that is large, much of a value's last places.
  const double left = norm.centred ? totals[2] * norm.inverse : 0;
  const float c1 = static_cast<float>(mean_g), rest = static_cast<float>(mean_g - c1);
  const float c2 = static_cast<float>(totals[1] * norm.inverse - left * mean_g);
  const float offset = static_cast<float>(-left);
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    const int64_t at = R::at(item);
    if (at >= columns.own) continue;
    float w[R::kPack], dx[R::kPack];
    load_weights<R::kPack>(weight, columns.first + at, 1, w);
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      const float d = to_float(upstream.packs[item].values[j]);
      const float xhat = fmaf(to_float(row.packs[item].values[j]) - centre, scale, offset);
      dx[j] = scale * ((fmaf(d, w[j], -c1) - rest) - xhat * c2);
      dweight[item][j] += d * xhat;
      dbias[item][j] += d;
    }
    emit(at, dx);
  }
}

template <class T, int kPack>
PYDL_DEVICE void store_rounded(T* to, const float (&values)[kPack]) {
  Pack<T, kPack> out;
#pragma unroll
  for (int j = 0; j < kPack; ++j) out.values[j] = from_float<T>(values[j]);
  store(to, out);
}

// These columns of a piece's row of dweight and of its row of dbias.
template <class R>
PYDL_DEVICE void write_sums(double* partials, int64_t piece,
                            const float (&dweight)[R::kItemsOf][R::kPack],
                            const float (&dbias)[R::kItemsOf][R::kPack], int64_t n,
                            const Columns& columns) {
  if (partials == nullptr) return;
  double* to = partials + piece * 2 * n + columns.first;
#pragma unroll
  for (int item = 0; item < R::kItemsOf; ++item) {
    const int64_t at = R::at(item);
    if (at >= columns.own) continue;
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
  const RowMoments<A> m =
      find_moments(each, mean, rstd, r, norm, RowSums<kThreads, false>(of_block));
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
  double sums[kMostSums] = {};
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
    A g = to_float(upstream[i]);
    if (weight.data != nullptr) g *= load_weight<A>(weight, i);
    const A xhat = (to_float(row[i]) - centre) * scale;
    sums[0] += g;
    sums[1] += g * xhat;
    sums[2] += xhat;
  }
  sum_row<kThreads>(sums, shared);
  const double mean_g = norm.centred ? sums[0] * norm.inverse : 0;
  const double left = norm.centred ? sums[2] * norm.inverse : 0;
  const A c1 = static_cast<A>(mean_g), rest = static_cast<A>(mean_g - c1);
  const A c2 = static_cast<A>(sums[1] * norm.inverse - left * mean_g),
          offset = static_cast<A>(-left);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
    const A d = to_float(upstream[i]), xhat = (to_float(row[i]) - centre) * scale + offset;
    const A g = weight.data != nullptr ? d * load_weight<A>(weight, i) : d;
    emit(i, scale * (((g - c1) - rest) - xhat * c2));
    if (sums_wanted) {
      dweight[i] += d * xhat;
      dbias[i] += d;
    }
  }
}

// Rows over a cluster of so many blocks, each with `part` columns in its registers.
struct Cluster {
  static constexpr int kMost = 8;
  int blocks;
  int64_t part;
  // As few as hold n columns.
  template <class R>
  static Cluster of(int64_t n) {
    const int64_t blocks = (n + R::kMost - 1) / R::kMost, packs = n / R::kPack;
    return {static_cast<int>(blocks < kMost ? blocks : kMost + 1),
            (packs + blocks - 1) / blocks * R::kPack};
  }
};

// Launches a kernel over rows where Row{} and the cluster hold n columns in packs of 16 bytes of T:
// launch(row, clusters or not, cluster) returns whether it did. The longest rows of one block take
// kLong threads where that is more than 256; backward, which needs more registers, says 0. Rows
// beyond are Clustered, in as many blocks as hold them.
template <class T, class R, int kLong, class Clustered, class Launch>
bool with_row(int64_t n, const Launch& launch) {
  constexpr int kPack = 16 / sizeof(T);
  const auto fits = [&](auto row) {
    if (n > decltype(row)::kMost) return false;
    return launch(row, std::false_type{}, Cluster{1, n});
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
    if (fits(Row<R, kLong, 4096 / kLong, kPack>{})) return true;
  }
  const Cluster cluster = Cluster::of<Clustered>(n);
  return cluster.blocks <= Cluster::kMost && launch(Clustered{}, std::true_type{}, cluster);
}

inline bool aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

// Starts kernel(args..., part) over `rows`, or pieces of them, of which a block takes kRowsPerBlock
// at once, or a cluster one; false where the device has no such clusters.
template <class R, bool kCluster, class Kernel, class... Args>
bool launch_rows(Stream stream, Kernel kernel, int64_t rows, const Cluster& cluster,
                 const Args&... args) {
  constexpr size_t kShared = RowSums<R::kThreadsOf, kCluster>::kDoubles * sizeof(double);
  const dim3 block(R::kThreadsOf, R::kRowsPerBlock);
  if (kCluster && !clusters_fit(kernel, cluster.blocks, block, kShared)) return false;
  const int64_t groups = (rows + R::kRowsPerBlock - 1) / R::kRowsPerBlock;
  const int64_t blocks = (groups < (1 << 20) ? groups : 1 << 20) * cluster.blocks;
  PYDL_LAUNCH_CLUSTERS(kernel, cluster.blocks, dim3(static_cast<unsigned>(blocks)), block, kShared,
                       stream, args..., cluster.part);
  return true;
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
