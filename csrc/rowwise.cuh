// What the CUDA kernels over rows share: a row in the registers of 32, 256 or 1024 threads, moved
// 16 bytes at a time, sums over it, and weights of any dtype.
#pragma once

#include "channels.cuh"
#include "rows.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int kMostSums = 3;  // of a row at once

// Sums of kCount values over the threads of a row, in a fixed order, for all of them. A row of 32
// threads is a warp; a longer one is a block, which `shared` serves: 32 numbers a value.
template <int kRowThreads, int kCount, class A>
PYDL_DEVICE void sum_row(A (&values)[kCount], A* shared) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    for (int half = kWarp / 2; half > 0; half /= 2)
      values[k] += __shfl_xor_sync(0xffffffffu, values[k], half);
  }
  if constexpr (kRowThreads > kWarp) {
    constexpr int kWarps = kRowThreads / kWarp;
    __syncthreads();  // the sums before may still be read
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) shared[k * kWarp + threadIdx.x / kWarp] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      A total = 0;
      for (int w = 0; w < kWarps; ++w) total += shared[k * kWarp + w];
      values[k] = total;
    }
  }
}

// The same as something to call: over the threads of a row, which `of_block` serves, or over the
// blocks of a cluster too, each of which has a part of the row.
template <int kRowThreads, bool kCluster>
class RowSums {
 public:
  static constexpr int kDoubles = kMostSums * (kWarp + (kCluster ? 2 : 0));
  // of_block: kDoubles numbers of shared memory, dynamic for a cluster.
  PYDL_DEVICE explicit RowSums(double* of_block) : shared_(of_block), turn_(0) {}

  template <int kCount, class A>
  PYDL_DEVICE void operator()(A (&values)[kCount]) {
    static_assert(kCount <= kMostSums);
    sum_row<kRowThreads>(values, reinterpret_cast<A*>(shared_));
    if constexpr (kCluster) add_blocks(values);
  }

 private:
  template <int kCount, class A>
  PYDL_DEVICE void add_blocks(A (&values)[kCount]) {
    const int blocks = cluster_size();
    if (blocks == 1) return;
    // Two places in turn: who writes one again has met all blocks since they read it.
    double* const mine = shared_ + kMostSums * (kWarp + turn_);
    turn_ ^= 1;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) mine[k] = values[k];
    }
    cluster_sync();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      double total = 0;
#pragma unroll 1
      for (int b = 0; b < blocks; ++b) total += cluster_load(mine + k, b);
      values[k] = static_cast<A>(total);
    }
  }

  double* shared_;
  int turn_;
};

// A weight or bias of any dtype; data is null where absent.
struct Weights {
  const void* data;
  DType dtype;
  static Weights of(const char* op, const View& given, int64_t n) {
    if (given.dtype == DType::none) return {nullptr, DType::none};
    if (given.numel != n) fail("%s: wants %lld weights", op, static_cast<long long>(n));
    return {given.data, given.dtype};
  }
  // Whether packs may be loaded at once.
  bool packs() const { return dtype != DType::f64 && reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

template <class A>
PYDL_DEVICE A load_weight(const Weights& w, int64_t i) {
  switch (w.dtype) {
    case DType::f32:
      return static_cast<A>(static_cast<const float*>(w.data)[i]);
    case DType::f16:
      return static_cast<A>(to_float(static_cast<const float16*>(w.data)[i]));
    case DType::bf16:
      return static_cast<A>(to_float(static_cast<const bfloat16*>(w.data)[i]));
    default:
      return static_cast<A>(static_cast<const double*>(w.data)[i]);
  }
}

template <class W, int kPack>
PYDL_DEVICE void load_packed(const Weights& w, int64_t i, float (&out)[kPack]) {
  const Pack<W, kPack> pack =
      *reinterpret_cast<const Pack<W, kPack>*>(static_cast<const W*>(w.data) + i);
#pragma unroll
  for (int j = 0; j < kPack; ++j) out[j] = to_float(pack.values[j]);
}
template <int kPack>
PYDL_DEVICE void load_weights(const Weights& w, int64_t i, float absent, float (&out)[kPack]) {
  if (w.data == nullptr) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) out[j] = absent;
  } else if (w.dtype == DType::f32) {
    load_packed<float, kPack>(w, i, out);
  } else if (w.dtype == DType::bf16) {
    load_packed<bfloat16, kPack>(w, i, out);
  } else {
    load_packed<float16, kPack>(w, i, out);
  }
}

// `own` columns of a row from `first` on.
struct Columns {
  int64_t first, own;
};

// The part of its rows that a block has: all columns of some of them, or, in a cluster, `part`
// columns, of which the last block may have fewer.
template <class R, bool kCluster>
struct Share : Columns {
  int64_t row, rows_at_once;
  PYDL_DEVICE Share(int64_t n, int64_t part)
      : Columns{0, n},
        row(static_cast<int64_t>(blockIdx.x) * R::kRowsPerBlock + threadIdx.y),
        rows_at_once(static_cast<int64_t>(gridDim.x) * R::kRowsPerBlock) {
    if constexpr (kCluster) {
      first = cluster_rank() * part;
      own = n - first < part ? n - first : part;
      row = blockIdx.x / cluster_size();
      rows_at_once = gridDim.x / cluster_size();
    }
  }
};

// A row as packs: thread t of a row has elements (item * kRowThreads + t) * kPack and the next few.
template <class T, int kRowThreads, int kItems, int kPackOf = 16 / sizeof(T)>
struct Row {
  static constexpr int kPack = kPackOf, kRowsPerBlock = kRowThreads == kWarp ? 8 : 1;
  static constexpr int kThreadsOf = kRowThreads, kItemsOf = kItems;
  static constexpr int kMost = kRowThreads * kItems * kPack;
  Pack<T, kPack> packs[kItems];

  static PYDL_DEVICE int64_t at(int item) {
    return (static_cast<int64_t>(item) * kRowThreads + threadIdx.x) * kPack;
  }
  PYDL_DEVICE void load(const T* row, int64_t n) {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (at(item) < n) {
        packs[item] = *reinterpret_cast<const Pack<T, kPack>*>(row + at(item));
      }
    }
  }
  // body(value) for every element of the thread.
  template <class Body>
  PYDL_DEVICE void each(int64_t n, const Body& body) const {
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (at(item) < n) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) body(to_float(packs[item].values[j]));
      }
    }
  }
};

}  // namespace PYDL_ISA
}  // namespace pydl
