// Kernels that test the emulation itself: right ones, whose results selftest.cpp knows, and wrong
// ones, which the emulation must notice. All of it is valid CUDA.
#include "../../csrc/cuda.h"

namespace pydl {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}

// Every thread gets the sum over the block. The second barrier protects `parts` from the next call.
template <bool kFirst, bool kSecond>
__device__ float block_sum(float v) {
  __shared__ float parts[32];
  const int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) parts[warp] = v;
  if (kFirst) __syncthreads();
  float sum = 0;
  for (int i = 0; i < warps; ++i) sum += parts[i];
  if (kSecond) __syncthreads();
  return sum;
}

// y [blocks, threads] = sums over the rows of x [blocks, threads], of x^2 added where twice.
template <bool kFirst, bool kSecond>
__global__ void sum_kernel(float* __restrict__ y, const float* __restrict__ x, bool twice) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  float sum = block_sum<kFirst, kSecond>(x[i]);
  if (twice) sum += block_sum<kFirst, kSecond>(x[i] * x[i]);
  y[i] = sum;
}

void sum(Stream stream, Out y, View x, int64_t missing) {
  const unsigned blocks = static_cast<unsigned>(x.sizes[0]),
                 threads = static_cast<unsigned>(x.sizes[1]);
  float* out = static_cast<float*>(y.data);
  const float* in = static_cast<const float*>(x.data);
  if (missing == 0)
    PYDL_LAUNCH((sum_kernel<true, true>), blocks, threads, 0, stream, out, in, true);
  if (missing == 1)
    PYDL_LAUNCH((sum_kernel<false, true>), blocks, threads, 0, stream, out, in, false);
  if (missing == 2)
    PYDL_LAUNCH((sum_kernel<true, false>), blocks, threads, 0, stream, out, in, true);
}

// y = the rows of x reversed, by way of dynamic shared memory; inside each warp only where kWarp.
template <bool kWarp, bool kBarrier>
__global__ void reverse_kernel(float* y, const float* x) {
  PYDL_DYNAMIC_SHARED(float, row);
  const int64_t base = int64_t{blockIdx.x} * blockDim.x;
  const int t = threadIdx.x;
  row[t] = x[base + t];
  if (kBarrier) {
    if (kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
  y[base + t] = row[kWarp ? t ^ 31 : blockDim.x - 1 - t];
}

void reverse(Stream stream, Out y, View x, bool warp, bool barrier) {
  const unsigned blocks = static_cast<unsigned>(x.sizes[0]),
                 threads = static_cast<unsigned>(x.sizes[1]);
  const size_t bytes = threads * sizeof(float);
  float* out = static_cast<float*>(y.data);
  const float* in = static_cast<const float*>(x.data);
  if (warp) {
    if (barrier) PYDL_LAUNCH((reverse_kernel<true, true>), blocks, threads, bytes, stream, out, in);
    if (!barrier)
      PYDL_LAUNCH((reverse_kernel<true, false>), blocks, threads, bytes, stream, out, in);
  } else {
    if (barrier)
      PYDL_LAUNCH((reverse_kernel<false, true>), blocks, threads, bytes, stream, out, in);
    if (!barrier)
      PYDL_LAUNCH((reverse_kernel<false, false>), blocks, threads, bytes, stream, out, in);
  }
}

// y [4 kinds, 5 widths, 40 operands, 32 lanes]: what each lane gets where each offers 100 + lane.
__global__ void shuffles_kernel(int* y) {
  const int lane = threadIdx.x, mine = 100 + lane;
  for (int w = 0; w < 5; ++w) {
    const int width = 32 >> w;
    for (int n = 0; n < 40; ++n) {
      int* at = y + (w * 40 + n) * 32 + lane;
      const int step = 5 * 40 * 32;
      at[0 * step] = __shfl_sync(kAll, mine, n, width);
      at[1 * step] = __shfl_up_sync(kAll, mine, n, width);
      at[2 * step] = __shfl_down_sync(kAll, mine, n, width);
      at[3 * step] = __shfl_xor_sync(kAll, mine, n, width);
    }
  }
}
void shuffles(Stream stream, Out y) {
  PYDL_LAUNCH(shuffles_kernel, 1, 32, 0, stream, static_cast<int*>(y.data));
}

// y [64 threads, 8]: the other types, two half warps at different paces, votes.
__global__ void warps_kernel(double* y) {
  const int t = threadIdx.x, lane = t % 32;
  double* out = y + 8 * t;
  out[0] = __shfl_xor_sync(kAll, 0.1 * lane, 1);
  out[1] = static_cast<double>(__shfl_xor_sync(kAll, (1ll << 40) + lane, 1));
  out[2] = __shfl_down_sync(kAll, 0xfffffff0u + lane, 1);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(half, sum, offset);
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) sum = __shfl_sync(half, sum + lane, 5);
  }
  out[3] = sum;
  out[4] = __ballot_sync(kAll, lane % 3 == 0);
  out[5] =
      4 * __any_sync(kAll, t == 40) + 2 * __all_sync(kAll, t < 32) + __all_sync(half, lane < 16);
  // All threads of the block: those of the second warp's second half are gone by then.
  if (t >= 48) {
    out[6] = out[7] = -1;
    return;
  }
  out[6] = __syncthreads_count(t % 2);
  const int all = __syncthreads_and(t < 48) != 0, not_all = __syncthreads_and(t != 47) != 0;
  const int any = __syncthreads_or(t == 47) != 0, none = __syncthreads_or(t == 48) != 0;
  out[7] = 8 * all + 4 * not_all + 2 * any + none;
}
void warps(Stream stream, Out y) {
  PYDL_LAUNCH(warps_kernel, 1, 64, 0, stream, static_cast<double*>(y.data));
}

// y [n, 16] = integer intrinsics of a[i], b[i].
__global__ void integers_kernel(int64_t* y, const int64_t* a, const int64_t* b) {
  const int i = threadIdx.y;
  const int64_t p = a[i], q = b[i];
  const int u = static_cast<int>(p), v = static_cast<int>(q);
  int64_t* out = y + 16 * i;
  out[0] = __popc(static_cast<unsigned>(u));
  out[1] = __popcll(static_cast<unsigned long long>(p));
  out[2] = __ffs(u);
  out[3] = __ffsll(p);
  out[4] = __clz(u);
  out[5] = __clzll(p);
  out[6] = __brev(static_cast<unsigned>(u));
  out[7] = __mulhi(u, v);
  out[8] = __umulhi(static_cast<unsigned>(u), static_cast<unsigned>(v));
  out[9] = __mul64hi(p, q);
  out[10] = static_cast<int64_t>(
      __umul64hi(static_cast<unsigned long long>(p), static_cast<unsigned long long>(q)));
  out[11] = min(u, v);
  out[12] = max(u, v);
  out[13] = __float_as_int(__int_as_float(u & 0x3fffffff));
  out[14] = __float2int_rn(2.5f) + 10 * __float2int_rz(-2.5f);
  out[15] = threadIdx.x + 10 * threadIdx.z + 100 * blockDim.y;
}
void integers(Stream stream, Out y, View a, View b) {
  const dim3 block(1, static_cast<unsigned>(a.numel), 1);
  PYDL_LAUNCH(integers_kernel, 1, block, 0, stream, static_cast<int64_t*>(y.data),
              static_cast<const int64_t*>(a.data), static_cast<const int64_t*>(b.data));
}

// y [blocks * threads, 2] = blocks and threads in the order in which they ran.
__global__ void order_kernel(int* y, int* count) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int at = atomicAdd(count, 1);
  y[2 * at] = block;
  y[2 * at + 1] = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
void order(Stream stream, Out y, Out count, int64_t x, int64_t by_y, int64_t by_z,
           int64_t threads) {
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(by_y),
                  static_cast<unsigned>(by_z));
  const dim3 block(static_cast<unsigned>(threads / 4), 2, 2);
  PYDL_LAUNCH(order_kernel, grid, block, 0, stream, static_cast<int*>(y.data),
              static_cast<int*>(count.data));
}

// y [blocks, 64] = shared memory of which the first half only was written: static, then dynamic.
__global__ void unwritten_kernel(float* y) {
  __shared__ float fixed[32];
  PYDL_DYNAMIC_SHARED(float, dynamic);
  const int t = threadIdx.x;
  if (t < 16) fixed[t] = dynamic[t] = 1;
  __syncthreads();
  y[64 * blockIdx.x + t] = fixed[t];
  y[64 * blockIdx.x + 32 + t] = dynamic[t];
}
void unwritten(Stream stream, Out y) {
  PYDL_LAUNCH(unwritten_kernel, static_cast<unsigned>(y.sizes[0]), 32, 128, stream,
              static_cast<float*>(y.data));
}

// Writes one element past y, static or dynamic shared memory, or misaligned.
__global__ void past_kernel(float* y, int n, int where) {
  __shared__ float fixed[32];
  PYDL_DYNAMIC_SHARED(float, dynamic);
  const int t = threadIdx.x;
  fixed[t] = dynamic[t] = 0;
  __syncthreads();
  if (where == 0) y[n + t - 31] = 1;
  if (where == 1) fixed[t + 1] = 1;
  if (where == 2) dynamic[t + 1] = 1;
  if (where == 3) *reinterpret_cast<float4*>(y + 1) = make_float4(0, 0, 0, 0);
  __syncthreads();
  if (t == 0) y[0] = fixed[1] + dynamic[1];
}
void past(Stream stream, Out y, int64_t where) {
  PYDL_LAUNCH(past_kernel, 1, 32, 32 * sizeof(float), stream, static_cast<float*>(y.data),
              static_cast<int>(y.numel), static_cast<int>(where));
}

struct Alive {
  int* count;
  __device__ explicit Alive(int* c) : count(c) { atomicAdd(count, 1); }
  __device__ ~Alive() { atomicAdd(count, -1); }
};

// Programs that no GPU needs to finish. The count of threads inside is 0 again after a failure.
__global__ void wrong_kernel(float* y, int* alive, int kind) {
  const Alive inside(alive);
  const int t = threadIdx.x, lane = t % 32;
  float v = 1;
  switch (kind) {
    case 0:  // a barrier that some pass by, who wait elsewhere
      if (t < 40) __syncthreads();
      v = __shfl_xor_sync(kAll, v, 1);
      __syncthreads();
      break;
    case 1:  // two kinds of barrier
      if (t < 64) {
        __syncthreads();
      } else {
        v = __syncthreads_or(t == 3);
      }
      break;
    case 2:  // a lane that its mask waits for waits at the barrier
      if (lane != 7) v = __shfl_sync(kAll, v, 0);
      __syncthreads();
      break;
    case 3:  // the source is not in the mask
      if (lane < 16) v = __shfl_sync(0xffffu, v, 20);
      break;
    case 4:  // the caller is not in the mask
      v = __shfl_sync(0xffffu, v, 0);
      break;
    case 5:  // the source has exited
      if (lane == 3) return;
      v = __shfl_sync(kAll, v, 3);
      break;
    case 6:  // lanes of one step disagree about its type
      v = lane < 16 ? __shfl_sync(kAll, 1.0f, 0) : static_cast<float>(__shfl_sync(kAll, 1, 0));
      break;
  }
  y[t] = v;
}
void wrong(Stream stream, Out y, Out alive, int64_t kind) {
  PYDL_LAUNCH(wrong_kernel, 1, 128, 0, stream, static_cast<float*>(y.data),
              static_cast<int*>(alive.data), static_cast<int>(kind));
}

// y [blocks, threads] = the row of x of the next block of the cluster, twice in turn: what this one
// read of the block after it. `missing`: no barrier, or memory that a cluster's blocks do not
// share.
template <int kMissing>
__global__ void rotate_kernel(double* y, const double* x) {
  PYDL_DYNAMIC_SHARED(double, rows);
  __shared__ double fixed;
  const int t = threadIdx.x, threads = blockDim.x, next = (cluster_rank() + 1) % cluster_size();
  double value = x[int64_t{blockIdx.x} * threads + t];
  for (int turn = 0; turn < 2; ++turn) {
    rows[turn * threads + t] = value;
    if (kMissing != 1) cluster_sync();
    value = cluster_load(rows + turn * threads + (t + 1) % threads, next);
  }
  if (kMissing == 2) {
    if (t == 0) fixed = value;
    __syncthreads();
    value = fixed;
  }
  y[int64_t{blockIdx.x} * threads + t] = value;
  cluster_sync();
}
void rotate(Stream stream, Out y, View x, int64_t cluster, int64_t missing) {
  const unsigned blocks = static_cast<unsigned>(x.sizes[0]),
                 threads = static_cast<unsigned>(x.sizes[1]);
  const auto kernel = missing == 0   ? &rotate_kernel<0>
                      : missing == 1 ? &rotate_kernel<1>
                                     : &rotate_kernel<2>;
  const size_t bytes = 2 * threads * sizeof(double);
  const int size = static_cast<int>(cluster);
  if (!clusters_fit(kernel, size, dim3(threads), bytes)) return;
  PYDL_LAUNCH_CLUSTERS(kernel, size, blocks, threads, bytes, stream, static_cast<double*>(y.data),
                       static_cast<const double*>(x.data));
}

__global__ void nothing_kernel() {}
void nothing(Stream stream, int64_t x, int64_t y, int64_t z, int64_t threads, int64_t bytes) {
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  PYDL_LAUNCH(nothing_kernel, grid, static_cast<unsigned>(threads), static_cast<size_t>(bytes),
              stream);
}

__global__ void barriers_kernel(float* y, int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    y[int64_t{blockIdx.x} * blockDim.x + threadIdx.x] += 1;
    __syncthreads();
  }
}
void barriers(Stream stream, Out y, int64_t rounds) {
  PYDL_LAUNCH(barriers_kernel, static_cast<unsigned>(y.sizes[0]), static_cast<unsigned>(y.sizes[1]),
              0, stream, static_cast<float*>(y.data), rounds);
}

__global__ void add_kernel(float4* __restrict__ y, const float4* __restrict__ x, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float4 a = y[i], b = __ldg(x + i);
  y[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
void add(Stream stream, Out y, View x) {
  const int64_t n = y.numel / 4;
  PYDL_LAUNCH(add_kernel, static_cast<unsigned>((n + 255) / 256), 256, 0, stream,
              static_cast<float4*>(y.data), static_cast<const float4*>(x.data), n);
}

}  // namespace
}  // namespace pydl

EXPORT(cuda, selftest_sum, "y, x, missing", pydl::sum)
EXPORT(cuda, selftest_reverse, "y, x, warp, barrier", pydl::reverse)
EXPORT(cuda, selftest_shuffles, "y", pydl::shuffles)
EXPORT(cuda, selftest_warps, "y", pydl::warps)
EXPORT(cuda, selftest_integers, "y, a, b", pydl::integers)
EXPORT(cuda, selftest_order, "y, count, x, by_y, by_z, threads", pydl::order)
EXPORT(cuda, selftest_unwritten, "y", pydl::unwritten)
EXPORT(cuda, selftest_past, "y, where", pydl::past)
EXPORT(cuda, selftest_wrong, "y, alive, kind", pydl::wrong)
EXPORT(cuda, selftest_nothing, "x, y, z, threads, bytes", pydl::nothing)
EXPORT(cuda, selftest_barriers, "y, rounds", pydl::barriers)
EXPORT(cuda, selftest_rotate, "y, x, cluster, missing", pydl::rotate)
EXPORT(cuda, selftest_add, "y, x", pydl::add)
