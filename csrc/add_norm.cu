// CUDA: add_layer_norm and add_rms_norm. One read of x and of the residual, one write of the sum
// and of y, the row in registers between; backward one read of dy, the sum and what flows back to
// it, and a write of the gradient (two where they differ), with a partial row of dweight and dbias
// a block, which a second launch adds in a fixed order.
#include "philox.h"
#include "row_norm.cuh"

namespace pydl {
inline namespace PYDL_ISA {
namespace {

// Stores a pack of 16 bytes, or of 32.
template <class R, int kPack>
PYDL_DEVICE void store_pack(R* to, const Pack<R, kPack>& pack) {
  if constexpr (sizeof(pack) == 32) {
    Pack<R, kPack / 2> half[2];
    memcpy(half, &pack, sizeof half);
    store(to, half[0]);
    store(to + kPack / 2, half[1]);
  } else {
    store(to, pack);
  }
}

template <class T, class R, int kRowThreads, int kItems, bool kCluster>
__global__ void __launch_bounds__(kRowThreads == kWarp ? 256 : kRowThreads, 1)
    add_norm_fwd_kernel(T* y, R* sum, float* mean, float* rstd, const T* x, const R* residual,
                        Weights weight, Weights bias, Dropout given, Norm norm, int64_t part) {
  constexpr int kPack = 16 / sizeof(T);
  using H = Row<R, kRowThreads, kItems, kPack>;
  PYDL_DYNAMIC_SHARED(double, shared);
  RowSums<kRowThreads, kCluster> sum_up(shared);
  const Dropout dropout = given;
  const Share<H, kCluster> share(norm.n, part);
  for (int64_t r = share.row; r < norm.rows; r += share.rows_at_once) {
    const int64_t start = r * norm.n + share.first;
    Row<T, kRowThreads, kItems> added;
    H row;
    added.load(x + start, share.own);
    row.load(residual + start, share.own);
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t at = H::at(item);
      if (at >= share.own) continue;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        float value = to_float(added.packs[item].values[j]);
        if (dropout.threshold > 0) value *= keep<float>(dropout, start + at + j);
        R& h = row.packs[item].values[j];
        h = from_float<R>(value + to_float(h));
      }
      store_pack(sum + start + at, row.packs[item]);
    }
    const auto each = [&](const auto& body) { row.each(share.own, body); };
    const auto m = find_moments(each, mean, rstd, r, norm, sum_up);
    write_normalised(y + start, row, m, weight, bias, share);
  }
  if constexpr (kCluster) cluster_sync();  // others may still read this block's sums
}

// What flows back: dy to y, and dsum to the sum, or null; dresidual is null where it is dinput.
template <class T, class R>
struct Flow {
  T* dinput;
  R* dresidual;
  const T* dy;
  const R *dsum, *sum;
};

// partials: (pieces, 2, n), or null. A row of threads, or a cluster, takes a piece of the rows.
template <class T, class R, int kRowThreads, int kItems, bool kCluster>
__global__ void __launch_bounds__(kRowThreads == kWarp ? 256 : kRowThreads)
    add_norm_bwd_kernel(Flow<T, R> flow, double* partials, const float* mean, const float* rstd,
                        Weights weight, Dropout given, Norm norm, int64_t pieces, int64_t part) {
  constexpr int kPack = 16 / sizeof(T);
  using H = Row<R, kRowThreads, kItems, kPack>;
  PYDL_DYNAMIC_SHARED(double, shared);
  RowSums<kRowThreads, kCluster> sum_up(shared);
  const Share<H, kCluster> share(norm.n, part);
  if (share.row >= pieces) return;
  const Dropout dropout = given;
  const Range range = Pieces::share(norm.rows, pieces, share.row);
  float dweight[kItems][kPack] = {}, dbias[kItems][kPack] = {};
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t start = r * norm.n + share.first;
    H row;
    Row<T, kRowThreads, kItems> upstream;
    row.load(flow.sum + start, share.own);
    upstream.load(flow.dy + start, share.own);
    const auto emit = [&](int64_t at, float (&dh)[kPack]) {
      if (flow.dsum != nullptr) {
        const auto more = *reinterpret_cast<const Pack<R, kPack>*>(flow.dsum + start + at);
#pragma unroll
        for (int j = 0; j < kPack; ++j) dh[j] += to_float(more.values[j]);
      }
      if (flow.dresidual != nullptr) {
        Pack<R, kPack> out;
#pragma unroll
        for (int j = 0; j < kPack; ++j) out.values[j] = from_float<R>(dh[j]);
        store_pack(flow.dresidual + start + at, out);
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (dropout.threshold > 0) dh[j] *= keep<float>(dropout, start + at + j);
      }
      store_rounded(flow.dinput + start + at, dh);
    };
    normalise_backward(upstream, row, norm.centred ? mean[r] : 0, rstd[r], weight, norm, share,
                       sum_up, dweight, dbias, emit);
  }
  write_sums<H>(partials, share.row, dweight, dbias, norm.n, share);
  if constexpr (kCluster) cluster_sync();
}

// Rows of any length at any address, and fp64: a block a row, the sum written and read again, each
// element by one thread.
template <class T, class R>
__global__ void __launch_bounds__(kThreads, 4)
    add_norm_fwd_any_kernel(T* y, R* sum, acc_t<R>* mean, acc_t<R>* rstd, const T* x,
                            const R* residual, Weights weight, Weights bias, Dropout given,
                            Norm norm) {
  using A = acc_t<R>;
  __shared__ double shared[kMostSums * kWarp];
  const Dropout dropout = given;
  for (int64_t r = blockIdx.x; r < norm.rows; r += gridDim.x) {
    const int64_t start = r * norm.n;
#pragma unroll 1
    for (int64_t i = start + threadIdx.x; i < start + norm.n; i += kThreads) {
      A value = to_float(x[i]);
      if (dropout.threshold > 0) value *= keep<A>(dropout, i);
      sum[i] = from_float<R>(value + to_float(residual[i]));
    }
    normalise_any(y + start, sum + start, mean, rstd, r, weight, bias, norm, shared);
  }
}

template <class T, class R>
__global__ void __launch_bounds__(kThreads)
    add_norm_bwd_any_kernel(Flow<T, R> flow, double* partials, const acc_t<R>* mean,
                            const acc_t<R>* rstd, Weights weight, Dropout given, Norm norm,
                            int64_t pieces) {
  using A = acc_t<R>;
  __shared__ double shared[kMostSums * kWarp];
  const Dropout dropout = given;
  const Range range = Pieces::share(norm.rows, pieces, blockIdx.x);
  double* dweight = partials + static_cast<int64_t>(blockIdx.x) * 2 * norm.n;
  double* dbias = dweight + norm.n;
  for (int64_t i = threadIdx.x; partials != nullptr && i < norm.n; i += kThreads) {
    dweight[i] = 0;
    dbias[i] = 0;
  }
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t start = r * norm.n;
    const auto emit = [&](int64_t i, A dh) {
      if (flow.dsum != nullptr) dh += to_float(flow.dsum[start + i]);
      if (flow.dresidual != nullptr) flow.dresidual[start + i] = from_float<R>(dh);
      if (dropout.threshold > 0) dh *= keep<A>(dropout, start + i);
      flow.dinput[start + i] = from_float<T>(dh);
    };
    normalise_backward_any(flow.dy + start, flow.sum + start, norm.centred ? mean[r] : A(0),
                           rstd[r], weight, norm, shared, partials != nullptr, dweight, dbias,
                           emit);
  }
}

template <class T, class R>
bool packs(int64_t n, std::initializer_list<const void*> inputs,
           std::initializer_list<const void*> residuals) {
  return n % (16 / sizeof(T)) == 0 && aligned(inputs) &&
         aligned(residuals, 16 / sizeof(T) * sizeof(R));
}

void forward(Stream stream, const char* op, const Out& y, const Out& sum, const Out* mean,
             const Out& rstd, const View& x, const View& residual, const Maybe& weight,
             const Maybe& bias, const Maybe& seed, double p, double eps) {
  const Rows rows = Rows::of(op, x, {&y}, {mean, &rstd});
  rows.check_same(op, Rows::of(op, residual, {&sum}, {}));
  const Norm norm = Norm::of(rows, eps, mean != nullptr);
  const Dropout dropout = dropout_of(op, seed, p);
  if (x.numel == 0) return;
  const Weights w = Weights::of(op, weight, norm.n), b = Weights::of(op, bias, norm.n);
  dispatch_residual(op, x.dtype, residual.dtype, [&](auto zero, auto wide_zero) {
    using T = decltype(zero);
    using R = decltype(wide_zero);
    using A = acc_t<R>;
    T* to = static_cast<T*>(y.data);
    R* added = static_cast<R*>(sum.data);
    const T* from = static_cast<const T*>(x.data);
    const R* other = static_cast<const R*>(residual.data);
    A* means = mean != nullptr ? static_cast<A*>(mean->data) : nullptr;
    A* scales = static_cast<A*>(rstd.data);
    if constexpr (sizeof(T) <= 4) {
      constexpr bool kSame = sizeof(T) == sizeof(R);
      const auto launch = [&](auto row, auto clusters, const Cluster& cluster) {
        using H = decltype(row);
        return launch_rows<H, clusters>(
            stream, &add_norm_fwd_kernel<T, R, H::kThreadsOf, H::kItemsOf, clusters>, norm.rows,
            cluster, to, added, means, scales, from, other, w, b, dropout, norm);
      };
      using Long = Row<R, 512, kSame ? 8 : 4, 16 / sizeof(T)>;
      if (packs<T, R>(norm.n, {to, from}, {added, other}) && w.packs() && b.packs() &&
          with_row<T, R, kSame ? 512 : 256, Long>(norm.n, launch)) {
        return;
      }
    }
    const auto kernel = &add_norm_fwd_any_kernel<T, R>;
    const int64_t blocks = norm.rows < (1 << 20) ? norm.rows : 1 << 20;
    PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, to, added,
                means, scales, from, other, w, b, dropout, norm);
  });
}

// partials: (pieces, 2, n) in fp64. What has no elements is not wanted. `dsum` is what flows back
// to the sum.
void backward(Stream stream, const char* op, const Out& dinput, const Out& dresidual,
              const Out& dweight, const Out& dbias, const Out& partials, const View& dy,
              const Maybe& dsum, const View& sum, const View* mean, const View& rstd,
              const Maybe& weight, const Maybe& seed, double p) {
  const Rows rows = Rows::of(op, sum, {}, {mean, &rstd});
  rows.check_same(op, Rows::of(op, dy, {&dinput}, {}));
  const bool more = dsum.dtype != DType::none, two = dresidual.numel > 0;
  if (more) Rows::of(op, sum, {&dsum}, {});
  if (two) Rows::of(op, sum, {&dresidual}, {});
  rows.check_sums(op, {&dweight, &dbias}, partials);
  const Norm norm = Norm::of(rows, 0, mean != nullptr);
  const Dropout dropout = dropout_of(op, seed, p);
  if (norm.n == 0) return;
  const Weights w = Weights::of(op, weight, norm.n);
  const bool sums = partials.numel > 0;
  const int64_t most = int64_t{16} * multiprocessors();
  const int64_t pieces = sums ? partials.sizes[0] : norm.rows < most ? norm.rows : most;
  if (pieces > 0) {
    dispatch_residual(op, dy.dtype, sum.dtype, [&](auto zero, auto wide_zero) {
      using T = decltype(zero);
      using R = decltype(wide_zero);
      using A = acc_t<R>;
      const Flow<T, R> flow{
          static_cast<T*>(dinput.data), two ? static_cast<R*>(dresidual.data) : nullptr,
          static_cast<const T*>(dy.data), more ? static_cast<const R*>(dsum.data) : nullptr,
          static_cast<const R*>(sum.data)};
      const A* means = mean != nullptr ? static_cast<const A*>(mean->data) : nullptr;
      const A* scales = static_cast<const A*>(rstd.data);
      double* parts = sums ? static_cast<double*>(partials.data) : nullptr;
      if constexpr (sizeof(T) <= 4) {
        const auto launch = [&](auto row, auto clusters, const Cluster& cluster) {
          using H = decltype(row);
          return launch_rows<H, clusters>(
              stream, &add_norm_bwd_kernel<T, R, H::kThreadsOf, H::kItemsOf, clusters>, pieces,
              cluster, flow, parts, means, scales, w, dropout, norm, pieces);
        };
        using Long = Row<R, 512, sizeof(T), 16 / sizeof(T)>;
        if (packs<T, R>(norm.n, {flow.dinput, flow.dy}, {flow.dresidual, flow.dsum, flow.sum}) &&
            w.packs() && with_row<T, R, 0, Long>(norm.n, launch)) {
          return;
        }
      }
      const auto kernel = &add_norm_bwd_any_kernel<T, R>;
      PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(pieces)), dim3(kThreads), 0, stream, flow,
                  parts, means, scales, w, dropout, norm, pieces);
    });
  }
  if (sums) {
    add_pieces(stream, dweight, partials, 0);
    add_pieces(stream, dbias, partials, 1);
  }
}

void add_layer_norm_fwd(Stream stream, Out y, Out sum, Out mean, Out rstd, View x, View residual,
                        Maybe weight, Maybe bias, Maybe seed, double p, double eps) {
  forward(stream, "add_layer_norm", y, sum, &mean, rstd, x, residual, weight, bias, seed, p, eps);
}
void add_layer_norm_bwd(Stream stream, Out dinput, Out dresidual, Out dweight, Out dbias,
                        Out partials, View dy, Maybe dsum, View sum, View mean, View rstd,
                        Maybe weight, Maybe seed, double p) {
  backward(stream, "add_layer_norm", dinput, dresidual, dweight, dbias, partials, dy, dsum, sum,
           &mean, rstd, weight, seed, p);
}
void add_rms_norm_fwd(Stream stream, Out y, Out sum, Out rstd, View x, View residual, Maybe weight,
                      Maybe seed, double p, double eps) {
  forward(stream, "add_rms_norm", y, sum, nullptr, rstd, x, residual, weight, Maybe{}, seed, p,
          eps);
}
void add_rms_norm_bwd(Stream stream, Out dinput, Out dresidual, Out dweight, Out partials, View dy,
                      Maybe dsum, View sum, View rstd, Maybe weight, Maybe seed, double p) {
  backward(stream, "add_rms_norm", dinput, dresidual, dweight, Out{}, partials, dy, dsum, sum,
           nullptr, rstd, weight, seed, p);
}

}  // namespace
}  // namespace PYDL_ISA
}  // namespace pydl

using namespace pydl;
EXPORT(cuda, add_layer_norm_fwd,
       "y, sum, mean, rstd, x, residual, weight, bias, seed, dropout_p, eps", add_layer_norm_fwd)
EXPORT(cuda, add_layer_norm_bwd,
       "dinput, dresidual, dweight, dbias, partials, dy, dsum, sum, mean, rstd, weight, seed, "
       "dropout_p",
       add_layer_norm_bwd)
EXPORT(cuda, add_rms_norm_fwd, "y, sum, rstd, x, residual, weight, seed, dropout_p, eps",
       add_rms_norm_fwd)
EXPORT(cuda, add_rms_norm_bwd,
       "dinput, dresidual, dweight, partials, dy, dsum, sum, rstd, weight, seed, dropout_p",
       add_rms_norm_bwd)
