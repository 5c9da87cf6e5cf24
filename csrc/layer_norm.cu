// CUDA: layer_norm and rms_norm. One read of x and one write of y, the row in registers between, of
// several blocks where it is long; backward one read of x and dy, one write of dx, and a partial
// row of dweight and dbias a block, which a second launch adds in a fixed order.
#include "row_norm.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

template <class T, int kRowThreads, int kItems, bool kCluster>
__global__ void __launch_bounds__(kRowThreads == kWarp ? 256 : kRowThreads, 1)
    norm_fwd_kernel(T* y, float* mean, float* rstd, const T* x, Weights weight, Weights bias,
                    Norm norm, int64_t part) {
  using R = Row<T, kRowThreads, kItems>;
  PYDL_DYNAMIC_SHARED(double, shared);
  RowSums<kRowThreads, kCluster> sum_up(shared);
  const Share<R, kCluster> share(norm.n, part);
  for (int64_t r = share.row; r < norm.rows; r += share.rows_at_once) {
    const int64_t start = r * norm.n + share.first;
    R row;
    row.load(x + start, share.own);
    const auto each = [&](const auto& body) { row.each(share.own, body); };
    const auto m = find_moments(each, mean, rstd, r, norm, sum_up);
    write_normalised(y + start, row, m, weight, bias, share);
  }
  if constexpr (kCluster) cluster_sync();  // others may still read this block's sums
}

// partials: (pieces, 2, n), or null. A row of threads, or a cluster, takes a piece of the rows.
template <class T, int kRowThreads, int kItems, bool kCluster>
__global__ void __launch_bounds__(kRowThreads == kWarp ? 256 : kRowThreads)
    norm_bwd_kernel(T* dx, double* partials, const T* dy, const T* x, const float* mean,
                    const float* rstd, Weights weight, Norm norm, int64_t pieces, int64_t part) {
  using R = Row<T, kRowThreads, kItems>;
  PYDL_DYNAMIC_SHARED(double, shared);
  RowSums<kRowThreads, kCluster> sum_up(shared);
  const Share<R, kCluster> share(norm.n, part);
  if (share.row >= pieces) return;
  const Range range = Pieces::share(norm.rows, pieces, share.row);
  float dweight[kItems][R::kPack] = {}, dbias[kItems][R::kPack] = {};
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t start = r * norm.n + share.first;
    R row, upstream;
    row.load(x + start, share.own);
    upstream.load(dy + start, share.own);
    normalise_backward(upstream, row, norm.centred ? mean[r] : 0, rstd[r], weight, norm, share,
                       sum_up, dweight, dbias, [&](int64_t at, const float (&values)[R::kPack]) {
                         store_rounded(dx + start + at, values);
                       });
  }
  write_sums<R>(partials, share.row, dweight, dbias, norm.n, share);
  if constexpr (kCluster) cluster_sync();
}

// Rows of any length at any address, and fp64: a block a row.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    norm_fwd_any_kernel(T* y, acc_t<T>* mean, acc_t<T>* rstd, const T* x, Weights weight,
                        Weights bias, Norm norm) {
  __shared__ double shared[kMostSums * kWarp];
  for (int64_t r = blockIdx.x; r < norm.rows; r += gridDim.x) {
    const int64_t at = r * norm.n;
    normalise_any(y + at, x + at, mean, rstd, r, weight, bias, norm, shared);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_bwd_any_kernel(T* dx, double* partials, const T* dy, const T* x, const acc_t<T>* mean,
                        const acc_t<T>* rstd, Weights weight, Norm norm, int64_t pieces) {
  using A = acc_t<T>;
  __shared__ double shared[kMostSums * kWarp];
  const Range range = Pieces::share(norm.rows, pieces, blockIdx.x);
  double* dweight = partials + static_cast<int64_t>(blockIdx.x) * 2 * norm.n;
  double* dbias = dweight + norm.n;
  for (int64_t i = threadIdx.x; partials != nullptr && i < norm.n; i += kThreads) {
    dweight[i] = 0;
    dbias[i] = 0;
  }
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t at = r * norm.n;
    normalise_backward_any(dy + at, x + at, norm.centred ? mean[r] : A(0), rstd[r], weight, norm,
                           shared, partials != nullptr, dweight, dbias,
                           [&](int64_t i, A value) { dx[at + i] = from_float<T>(value); });
  }
}

void forward(Stream stream, const char* op, const Out& y, const Out* mean, const Out& rstd,
             const View& x, const Maybe& weight, const Maybe& bias, double eps) {
  const Rows rows = Rows::of(op, x, {&y}, {mean, &rstd});
  const Norm norm = Norm::of(rows, eps, mean != nullptr);
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
          with_row<T, T, 1024, Row<T, 1024, 4>>(
              norm.n, [&](auto row, auto clusters, const Cluster& cluster) {
                using R = decltype(row);
                return launch_rows<R, clusters>(
                    stream, &norm_fwd_kernel<T, R::kThreadsOf, R::kItemsOf, clusters>, norm.rows,
                    cluster, to, means, scales, from, w, b, norm);
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

// partials: (pieces, 2, n) in fp64. What has no elements is not wanted.
void backward(Stream stream, const char* op, const Out& dx, const Out& dweight, const Out& dbias,
              const Out& partials, const View& dy, const View& x, const View* mean,
              const View& rstd, const Maybe& weight) {
  const Rows rows = Rows::of(op, x, {&dx, &dy}, {mean, &rstd});
  rows.check_sums(op, {&dweight, &dbias}, partials);
  const Norm norm = Norm::of(rows, 0, mean != nullptr);
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
            with_row<T, T, 0, Row<T, 512, sizeof(T)>>(
                norm.n, [&](auto row, auto clusters, const Cluster& cluster) {
                  using R = decltype(row);
                  return launch_rows<R, clusters>(
                      stream, &norm_bwd_kernel<T, R::kThreadsOf, R::kItemsOf, clusters>, pieces,
                      cluster, to, parts, upstream, from, means, scales, w, norm, pieces);
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
