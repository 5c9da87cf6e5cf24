// CUDA: layer_norm and rms_norm. One read of x and one write of y, the row in registers between;
// backward one read of x and dy, one write of dx, and a partial row of dweight and dbias a block,
// which a second launch adds in a fixed order.
#include "rowwise.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

struct Norm {
  int64_t rows, n;
  double eps;
  bool centred;  // layer_norm, else rms_norm
};

template <class T, int kRowThreads, int kItems>
__global__ void __launch_bounds__(kRowThreads == kWarp ? 256 : kRowThreads)
    norm_fwd_kernel(T* y, float* mean, float* rstd, const T* x, Weights weight, Weights bias,
                    Norm norm) {
  using R = Row<T, kRowThreads, kItems>;
  __shared__ float shared[2 * kWarp];
  const float count = static_cast<float>(norm.n);
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * R::kRowsPerBlock + threadIdx.y; r < norm.rows;
       r += static_cast<int64_t>(gridDim.x) * R::kRowsPerBlock) {
    R row;
    row.load(x + r * norm.n, norm.n);
    float sum[1] = {0}, sums[2] = {0, 0};
    if (norm.centred) {
      row.each(norm.n, [&](int, int, float value) { sum[0] += value; });
      sum_row<kRowThreads>(sum, shared);
    }
    // The mean is shift + rest: where it is large, fp32 alone would lose its end.
    const float shift = norm.centred ? sum[0] / count : 0;
    row.each(norm.n, [&](int, int, float value) {
      const float d = value - shift;
      sums[0] += d;
      sums[1] += d * d;
    });
    sum_row<kRowThreads>(sums, shared);
    const float rest = norm.centred ? sums[0] / count : 0;
    const float variance = sums[1] / count - rest * rest;
    const float scale = 1.0f / sqrtf((variance < 0 ? 0 : variance) + static_cast<float>(norm.eps));
    if (threadIdx.x == 0) {
      if (norm.centred) mean[r] = shift + rest;
      rstd[r] = scale;
    }
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t at = R::at(item);
      if (at >= norm.n) continue;
      float w[R::kPack], b[R::kPack];
      load_weights<R::kPack>(weight, at, 1, w);
      load_weights<R::kPack>(bias, at, 0, b);
      Pack<T, R::kPack> out;
#pragma unroll
      for (int j = 0; j < R::kPack; ++j) {
        const float value = to_float(row.packs[item].values[j]);
        out.values[j] = from_float<T>(((value - shift) - rest) * scale * w[j] + b[j]);
      }
      store(y + r * norm.n + at, out);
    }
  }
}

// partials: (pieces, 2, n), or null. A row of threads takes a piece of the rows.
template <class T, int kRowThreads, int kItems>
__global__ void __launch_bounds__(kRowThreads == kWarp ? 256 : kRowThreads)
    norm_bwd_kernel(T* dx, double* partials, const T* dy, const T* x, const float* mean,
                    const float* rstd, Weights weight, Norm norm, int64_t pieces) {
  using R = Row<T, kRowThreads, kItems>;
  __shared__ double shared[2 * kWarp];
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * R::kRowsPerBlock + threadIdx.y;
  if (piece >= pieces) return;
  const Range range = Pieces::share(norm.rows, pieces, piece);
  float dweight[kItems][R::kPack] = {}, dbias[kItems][R::kPack] = {};
  for (int64_t r = range.begin; r < range.end; ++r) {
    R row, upstream;
    row.load(x + r * norm.n, norm.n);
    upstream.load(dy + r * norm.n, norm.n);
    const float centre = norm.centred ? mean[r] : 0, scale = rstd[r];
    float sums[2] = {0, 0};
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
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
    for (int item = 0; item < kItems; ++item) {
      const int64_t at = R::at(item);
      if (at >= norm.n) continue;
      float w[R::kPack];
      load_weights<R::kPack>(weight, at, 1, w);
      Pack<T, R::kPack> out;
#pragma unroll
      for (int j = 0; j < R::kPack; ++j) {
        const float d = to_float(upstream.packs[item].values[j]);
        const float xhat = (to_float(row.packs[item].values[j]) - centre) * scale;
        out.values[j] = from_float<T>(scale * ((fmaf(d, w[j], -c1) - rest) - xhat * c2));
      }
      store(dx + r * norm.n + at, out);
    }
  }
  if (partials == nullptr) return;
  double* to = partials + piece * 2 * norm.n;
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int64_t at = R::at(item);
    if (at >= norm.n) continue;
#pragma unroll
    for (int j = 0; j < R::kPack; ++j) {
      to[at + j] = dweight[item][j];
      to[norm.n + at + j] = dbias[item][j];
    }
  }
}

// Rows of any length at any address, and fp64: a block a row, read from memory three times.
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_fwd_any_kernel(T* y, acc_t<T>* mean, acc_t<T>* rstd, const T* x, Weights weight,
                        Weights bias, Norm norm) {
  using A = acc_t<T>;
  __shared__ A shared[2 * kWarp];
  const A count = static_cast<A>(norm.n);
  for (int64_t r = blockIdx.x; r < norm.rows; r += gridDim.x) {
    const T* row = x + r * norm.n;
    A sum[1] = {0}, sums[2] = {0, 0};
    if (norm.centred) {
      for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) sum[0] += to_float(row[i]);
      sum_row<kThreads>(sum, shared);
    }
    const A shift = norm.centred ? sum[0] / count : 0;
    for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
      const A d = to_float(row[i]) - shift;
      sums[0] += d;
      sums[1] += d * d;
    }
    sum_row<kThreads>(sums, shared);
    const A rest = norm.centred ? sums[0] / count : 0;
    const A variance = sums[1] / count - rest * rest;
    const A scale = A(1) / sqrt((variance < 0 ? A(0) : variance) + static_cast<A>(norm.eps));
    if (threadIdx.x == 0) {
      if (norm.centred) mean[r] = shift + rest;
      rstd[r] = scale;
    }
    for (int64_t i = threadIdx.x; i < norm.n; i += kThreads) {
      A out = ((to_float(row[i]) - shift) - rest) * scale;
      if (weight.data != nullptr) out *= load_weight<A>(weight, i);
      if (bias.data != nullptr) out += load_weight<A>(bias, i);
      y[r * norm.n + i] = from_float<T>(out);
    }
  }
}

// Each thread owns its columns of the piece's partial row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_bwd_any_kernel(T* dx, double* partials, const T* dy, const T* x, const acc_t<T>* mean,
                        const acc_t<T>* rstd, Weights weight, Norm norm, int64_t pieces) {
  using A = acc_t<T>;
  __shared__ double shared[2 * kWarp];
  const Range range = Pieces::share(norm.rows, pieces, blockIdx.x);
  double* dweight = partials + static_cast<int64_t>(blockIdx.x) * 2 * norm.n;
  double* dbias = dweight + norm.n;
  for (int64_t i = threadIdx.x; partials != nullptr && i < norm.n; i += kThreads) {
    dweight[i] = 0;
    dbias[i] = 0;
  }
  for (int64_t r = range.begin; r < range.end; ++r) {
    const T *row = x + r * norm.n, *upstream = dy + r * norm.n;
    const A centre = norm.centred ? mean[r] : A(0), scale = rstd[r];
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
      dx[r * norm.n + i] = from_float<T>(scale * (((g - c1) - rest) - xhat * c2));
      if (partials != nullptr) {
        dweight[i] += d * xhat;
        dbias[i] += d;
      }
    }
  }
}

// Calls body(Row<T, threads, items>{}) for the least that holds n elements; false where none does.
template <class T, bool kBackward, class Body>
bool with_row(int64_t n, const Body& body) {
  const auto fits = [&](auto row) {
    if (n > decltype(row)::kMost) return false;
    body(row);
    return true;
  };
  if (fits(Row<T, 32, 1>{}) || fits(Row<T, 32, 2>{})) return true;
  if constexpr (!kBackward) {
    if (fits(Row<T, 32, 4>{})) return true;
  }
  if (fits(Row<T, 256, 1>{}) || fits(Row<T, 256, 2>{}) || fits(Row<T, 256, 4>{})) return true;
  if constexpr (!kBackward) {
    return fits(Row<T, 256, 8>{}) || fits(Row<T, 1024, 4>{});
  }
  return false;
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

template <class R>
dim3 blocks_of(int64_t rows) {
  const int64_t blocks = (rows + R::kRowsPerBlock - 1) / R::kRowsPerBlock;
  return dim3(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20));
}

template <class T, int kRowThreads, int kItems>
void launch_fwd(Stream stream, Row<T, kRowThreads, kItems>, T* y, float* mean, float* rstd,
                const T* x, const Weights& weight, const Weights& bias, const Norm& norm) {
  using R = Row<T, kRowThreads, kItems>;
  const auto kernel = &norm_fwd_kernel<T, kRowThreads, kItems>;
  PYDL_LAUNCH(kernel, blocks_of<R>(norm.rows), dim3(kRowThreads, R::kRowsPerBlock), 0, stream, y,
              mean, rstd, x, weight, bias, norm);
}

template <class T, int kRowThreads, int kItems>
void launch_bwd(Stream stream, Row<T, kRowThreads, kItems>, T* dx, double* partials, const T* dy,
                const T* x, const float* mean, const float* rstd, const Weights& weight,
                const Norm& norm, int64_t pieces) {
  using R = Row<T, kRowThreads, kItems>;
  const auto kernel = &norm_bwd_kernel<T, kRowThreads, kItems>;
  PYDL_LAUNCH(kernel, blocks_of<R>(pieces), dim3(kRowThreads, R::kRowsPerBlock), 0, stream, dx,
              partials, dy, x, mean, rstd, weight, norm, pieces);
}

void forward(Stream stream, const char* op, const Out& y, const Out* mean, const Out& rstd,
             const View& x, const Maybe& weight, const Maybe& bias, double eps) {
  const Rows rows = Rows::of(op, x, {&y}, {mean, &rstd});
  const Norm norm{rows.count, rows.n, eps, mean != nullptr};
  if (x.numel == 0) return;
  const Weights w = Weights::of(op, weight, norm.n), b = Weights::of(op, bias, norm.n);
  dispatch_float(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    T* to = static_cast<T*>(y.data);
    const T* from = static_cast<const T*>(x.data);
    A* means = mean != nullptr ? static_cast<A*>(mean->data) : nullptr;
    A* scales = static_cast<A*>(rstd.data);
    if constexpr (sizeof(T) <= 4) {
      if (norm.n % (16 / sizeof(T)) == 0 && aligned({to, from}) && w.packs() && b.packs() &&
          with_row<T, false>(norm.n, [&](auto row) {
            launch_fwd(stream, row, to, means, scales, from, w, b, norm);
          })) {
        return;
      }
    }
    const auto kernel = &norm_fwd_any_kernel<T>;
    const int64_t blocks = norm.rows < (1 << 20) ? norm.rows : 1 << 20;
    PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, to, means,
                scales, from, w, b, norm);
  });
}

void add_pieces(Stream stream, const Out& total, const Out& partials, int64_t which) {
  if (total.numel == 0) return;
  const int64_t pieces = partials.sizes[0], n = partials.sizes[2];
  const double* from = static_cast<const double*>(partials.data) + which * n;
  dispatch_float("layer_norm", total.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_partials(stream, static_cast<T*>(total.data), from, n, pieces, 2 * n);
  });
}

// partials: (pieces, 2, n) in fp64. What has no elements is not wanted.
void backward(Stream stream, const char* op, const Out& dx, const Out& dweight, const Out& dbias,
              const Out& partials, const View& dy, const View& x, const View* mean,
              const View& rstd, const Maybe& weight) {
  const Rows rows = Rows::of(op, x, {&dx, &dy}, {mean, &rstd});
  rows.check_sums(op, {&dweight, &dbias}, partials);
  const Norm norm{rows.count, rows.n, 0, mean != nullptr};
  if (norm.n == 0) return;
  const Weights w = Weights::of(op, weight, norm.n);
  const bool sums = partials.numel > 0;
  const int64_t most = int64_t{16} * multiprocessors();
  const int64_t pieces = sums ? partials.sizes[0] : norm.rows < most ? norm.rows : most;
  if (pieces > 0) {
    dispatch_float(op, x.dtype, [&](auto zero) {
      using T = decltype(zero);
      using A = acc_t<T>;
      T* to = static_cast<T*>(dx.data);
      const T *upstream = static_cast<const T*>(dy.data), *from = static_cast<const T*>(x.data);
      const A* means = mean != nullptr ? static_cast<const A*>(mean->data) : nullptr;
      const A* scales = static_cast<const A*>(rstd.data);
      double* parts = sums ? static_cast<double*>(partials.data) : nullptr;
      if constexpr (sizeof(T) <= 4) {
        if (norm.n % (16 / sizeof(T)) == 0 && aligned({to, upstream, from}) && w.packs() &&
            with_row<T, true>(norm.n, [&](auto row) {
              launch_bwd(stream, row, to, parts, upstream, from, means, scales, w, norm, pieces);
            })) {
          return;
        }
      }
      const auto kernel = &norm_bwd_any_kernel<T>;
      PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(pieces)), dim3(kThreads), 0, stream, to, parts,
                  upstream, from, means, scales, w, norm, pieces);
    });
  }
  if (sums) {
    add_pieces(stream, dweight, partials, 0);
    add_pieces(stream, dbias, partials, 1);
  }
}

void layer_norm_fwd(Stream stream, Out y, Out mean, Out rstd, View x, Maybe weight, Maybe bias,
                    double eps) {
  forward(stream, "layer_norm", y, &mean, rstd, x, weight, bias, eps);
}
void layer_norm_bwd(Stream stream, Out dx, Out dweight, Out dbias, Out partials, View dy, View x,
                    View mean, View rstd, Maybe weight) {
  backward(stream, "layer_norm", dx, dweight, dbias, partials, dy, x, &mean, rstd, weight);
}
void rms_norm_fwd(Stream stream, Out y, Out rstd, View x, Maybe weight, double eps) {
  forward(stream, "rms_norm", y, nullptr, rstd, x, weight, Maybe{}, eps);
}
void rms_norm_bwd(Stream stream, Out dx, Out dweight, Out partials, View dy, View x, View rstd,
                  Maybe weight) {
  backward(stream, "rms_norm", dx, dweight, Out{}, partials, dy, x, nullptr, rstd, weight);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cuda, layer_norm_fwd, "y, mean, rstd, x, weight, bias, eps", layer_norm_fwd)
EXPORT(cuda, layer_norm_bwd, "dx, dweight, dbias, partials, dy, x, mean, rstd, weight",
       layer_norm_bwd)
EXPORT(cuda, rms_norm_fwd, "y, rstd, x, weight, eps", rms_norm_fwd)
EXPORT(cuda, rms_norm_bwd, "dx, dweight, partials, dy, x, rstd, weight", rms_norm_bwd)
