// The CUDA skeleton of backward passes that also sum a value over all but the channels; see
// channels.h for its CPU twin and for how F is called. Two launches: pieces write fp64 partials,
// then each channel adds its own in a fixed order. No atomics.
#pragma once

#include "elementwise.cuh"
#include "pieces.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int kWarp = 32, kRows = kThreads / kWarp;

template <class T, class F, int kOut, int kIn, int kPack>
PYDL_DEVICE void sum_pack(const F& f, const Pointers<kOut, kIn>& p, int64_t at,
                          const acc_t<T> (&parameter)[kPack], acc_t<T> (&sums)[kPack]) {
  using Packed = Pack<T, kPack>;
  Packed x[kIn], y[kOut];
#pragma unroll
  for (int k = 0; k < kIn; ++k)
    x[k] = *reinterpret_cast<const Packed*>(static_cast<const T*>(p.in[k]) + at);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    acc_t<T> one[kIn], made[kOut], sum;
#pragma unroll
    for (int k = 0; k < kIn; ++k) one[k] = to_float(x[k].values[j]);
    f(one, parameter[j], made, sum, at + j);
    sums[j] += sum;
#pragma unroll
    for (int k = 0; k < kOut; ++k) y[k].values[j] = from_float<T>(made[k]);
  }
#pragma unroll
  for (int k = 0; k < kOut; ++k) store(static_cast<T*>(p.out[k]) + at, y[k]);
}

// Channels innermost. Grid: (blocks of 32 packs of channels, pieces); a thread keeps the sums of
// one pack over every eighth row.
template <class T, class F, int kOut, int kIn, int kPack>
__global__ void __launch_bounds__(kThreads, 3)
    sum_columns_kernel(F given, Pointers<kOut, kIn> p, const T* parameters, Pieces pieces,
                       double* partials) {
  using A = acc_t<T>;
  const F f = given;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * kPack;
  const Range rows = pieces.outer(blockIdx.y);
  A parameter[kPack], sums[kPack];
  const bool inside = channel < pieces.channels;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    sums[j] = 0;
    parameter[j] = inside ? to_float(parameters[channel + j]) : A(0);
  }
  if (inside) {
    for (int64_t r = rows.begin + row; r < rows.end; r += kRows) {
      sum_pack<T, F, kOut, kIn, kPack>(f, p, r * pieces.channels + channel, parameter, sums);
    }
  }
  __shared__ double shared[kRows][kWarp];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    shared[row][lane] = sums[j];
    __syncthreads();
    if (row == 0 && inside) {
      double total = 0;
      for (int k = 0; k < kRows; ++k) total += shared[k][lane];
      partials[blockIdx.y * pieces.channels + channel + j] = total;
    }
    __syncthreads();
  }
}

// Channels outside. Grid: (channels, pieces); a block sums its part of a channel.
template <class T, class F, int kOut, int kIn, int kPack>
__global__ void __launch_bounds__(kThreads, 3)
    sum_rows_kernel(F given, Pointers<kOut, kIn> p, const T* parameters, Pieces pieces,
                    double* partials) {
  using A = acc_t<T>;
  const F f = given;
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  // In 64 bits: with one channel the whole tensor may be one run.
  const Range rows = pieces.outer(blockIdx.y);
  const Range packs = Pieces::share(pieces.inner_size / kPack, pieces.inner_pieces,
                                    blockIdx.y % pieces.inner_pieces);
  for (int64_t channel = blockIdx.x; channel < pieces.channels; channel += gridDim.x) {
    A parameter[kPack], sums[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      sums[j] = 0;
      parameter[j] = to_float(parameters[channel]);
    }
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t start = (r * pieces.channels + channel) * pieces.inner_size;
      for (int64_t i = packs.begin + threadIdx.x; i < packs.end; i += kThreads) {
        sum_pack<T, F, kOut, kIn, kPack>(f, p, start + i * kPack, parameter, sums);
      }
    }
    double total = 0;
#pragma unroll
    for (int j = 0; j < kPack; ++j) total += sums[j];
    for (int half = kWarp / 2; half > 0; half /= 2)
      total += __shfl_down_sync(0xffffffffu, total, half);
    __shared__ double shared[kRows];
    if (lane == 0) shared[row] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int k = 0; k < kRows; ++k) sum += shared[k];
      partials[blockIdx.y * pieces.channels + channel] = sum;
    }
    __syncthreads();
  }
}

// partials: `count` rows, `stride` apart. Grid: blocks of 32 channels; block: 32 channels by 32
// pieces.
template <class T>
__global__ void __launch_bounds__(kWarp* kWarp)
    add_partials_kernel(T* totals, const double* partials, int64_t channels, int64_t count,
                        int64_t stride) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double sum = 0;
  if (channel < channels) {
    for (int64_t piece = row; piece < count; piece += kWarp)
      sum += partials[piece * stride + channel];
  }
  __shared__ double shared[kWarp][kWarp];
  shared[row][lane] = sum;
  __syncthreads();
  if (row == 0 && channel < channels) {
    double total = 0;
    for (int k = 0; k < kWarp; ++k) total += shared[k][lane];
    totals[channel] = from_float<T>(static_cast<acc_t<T>>(total));
  }
}

template <class T>
inline void add_partials(Stream stream, T* totals, const double* partials, int64_t channels,
                         int64_t count, int64_t stride) {
  const auto kernel = &add_partials_kernel<T>;
  PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>((channels + kWarp - 1) / kWarp)),
              dim3(kWarp * kWarp), 0, stream, totals, partials, channels, count, stride);
}

template <class T, class F, int kOut, int kIn, int kPack>
inline void launch_sums(Stream stream, const F& f, const Pointers<kOut, kIn>& p,
                        const T* parameters, const Pieces& pieces, double* partials) {
  const unsigned count = static_cast<unsigned>(pieces.count());
  if (pieces.inner_size == 1) {
    const int64_t blocks = (pieces.channels / kPack + kWarp - 1) / kWarp;
    const auto kernel = &sum_columns_kernel<T, F, kOut, kIn, kPack>;
    PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), count), dim3(kThreads), 0, stream, f, p,
                parameters, pieces, partials);
  } else {
    const auto kernel = &sum_rows_kernel<T, F, kOut, kIn, kPack>;
    PYDL_LAUNCH(
        kernel,
        dim3(static_cast<unsigned>(pieces.channels < 65536 ? pieces.channels : 65536), count),
        dim3(kThreads), 0, stream, f, p, parameters, pieces, partials);
  }
}

// Arguments as for the CPU's map_and_sum; both functors compute the same, `slow` where 16 bytes
// cannot be moved at once and in fp64.
template <int kOut, int kIn, class F, class Slow>
inline void map_and_sum(Stream stream, const char* op, const F& f, const Slow& slow,
                        const Out (&outs)[kOut], const View (&ins)[kIn], const View& parameter,
                        const Out& total, const Out& partials) {
  const Pieces pieces = Pieces::of(op, outs[0], parameter, total, partials);
  if (pieces.channels == 0) return;
  Pointers<kOut, kIn> p;
  bool aligned = true;
  for (int k = 0; k < kOut; ++k) {
    p.out[k] = outs[k].data;
    aligned = aligned && reinterpret_cast<uintptr_t>(p.out[k]) % 16 == 0;
  }
  for (int k = 0; k < kIn; ++k) {
    p.in[k] = ins[k].data;
    aligned = aligned && reinterpret_cast<uintptr_t>(p.in[k]) % 16 == 0;
  }
  double* sums = static_cast<double*>(partials.data);
  dispatch_float(op, outs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kPack = sizeof(T) == 8 ? 1 : 16 / sizeof(T);
    const T* parameters = static_cast<const T*>(parameter.data);
    const int64_t along = pieces.inner_size == 1 ? pieces.channels : pieces.inner_size;
    if constexpr (kPack == 1) {
      launch_sums<T, Slow, kOut, kIn, 1>(stream, slow, p, parameters, pieces, sums);
    } else if (aligned && along % kPack == 0) {
      launch_sums<T, F, kOut, kIn, kPack>(stream, f, p, parameters, pieces, sums);
    } else {
      launch_sums<T, Slow, kOut, kIn, 1>(stream, slow, p, parameters, pieces, sums);
    }
    add_partials(stream, static_cast<T*>(total.data), sums, pieces.channels, pieces.count(),
                 pieces.channels);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
