// The CUDA skeleton of every elementwise kernel; see elementwise.h for its CPU twin and for how F
// is called.
#pragma once

#include "cuda.h"
#include "loop.h"
#include "math.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int kThreads = 256;

// Which kernels an op compiles for each activation: those that move 16 bytes at a time through flat
// memory, through broadcast or strided memory, or both. Everything else, and fp64, runs one
// compiled for all.
enum Fast { kFlatFast = 1, kPackedFast = 2, kBothFast = 3 };

// What one 16-byte access moves.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

// One store of a pack. The compiler takes a pack apart and does not always put it together again,
// so that 16 bytes are stored by the instruction itself.
template <class Packed>
PYDL_DEVICE void store(void* to, const Packed& y) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Packed) == 16) {
    uint4 words;
    memcpy(&words, &y, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
    return;
  }
#endif
  *static_cast<Packed*>(to) = y;
}

template <int kOut, int kIn>
struct Pointers {
  void* out[kOut];
  const void* in[kIn];
};

template <class T, class F, int kOut, int kIn>
PYDL_DEVICE void apply(const F& f, const T (&in)[kIn], T (&out)[kOut], int64_t index) {
  acc_t<T> x[kIn], y[kOut];
#pragma unroll
  for (int k = 0; k < kIn; ++k) x[k] = to_float(in[k]);
  f(x, y, index);
#pragma unroll
  for (int k = 0; k < kOut; ++k) out[k] = from_float<T>(y[k]);
}

// 16-byte loads in flight per operand and thread.
template <int kOperands>
constexpr int unroll() {
  return kOperands <= 3 ? 2 : 1;
}

// One run of memory in every operand, all aligned to 16 bytes: a block's loads are all in flight
// before its first store. 64-bit arithmetic for the block's start only.
template <class T, class F, int kOut, int kIn>
__global__ void __launch_bounds__(kThreads, kOut + kIn <= 2 ? 4 : 3)
    map_flat_kernel(F given, Pointers<kOut, kIn> p, int64_t n) {
  constexpr int kPack = 16 / sizeof(T), kUnroll = unroll<kOut + kIn>();
  constexpr int kTile = kThreads * kPack * kUnroll;
  using Packed = Pack<T, kPack>;
  const F f = given;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kTile;
  T* out[kOut];
  const T* in[kIn];
#pragma unroll
  for (int k = 0; k < kOut; ++k) out[k] = static_cast<T*>(p.out[k]) + base;
#pragma unroll
  for (int k = 0; k < kIn; ++k) in[k] = static_cast<const T*>(p.in[k]) + base;
  if (n - base >= kTile) {
    Packed x[kIn][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int k = 0; k < kIn; ++k) {
        x[k][u] = reinterpret_cast<const Packed*>(in[k])[u * kThreads + threadIdx.x];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = (u * kThreads + threadIdx.x) * kPack;
      Packed y[kOut];
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        T one[kIn], made[kOut];
#pragma unroll
        for (int k = 0; k < kIn; ++k) one[k] = x[k][u].values[j];
        apply(f, one, made, base + at + j);
#pragma unroll
        for (int k = 0; k < kOut; ++k) y[k].values[j] = made[k];
      }
#pragma unroll
      for (int k = 0; k < kOut; ++k) store(out[k] + at, y[k]);
    }
    return;
  }
  const int rest = static_cast<int>(n - base);
  for (int i = threadIdx.x; i < rest; i += kThreads) {
    T one[kIn], made[kOut];
#pragma unroll
    for (int k = 0; k < kIn; ++k) one[k] = in[k][i];
    apply(f, one, made, base + i);
#pragma unroll
    for (int k = 0; k < kOut; ++k) out[k][i] = made[k];
  }
}

// Any strides, kPack elements of the innermost dimension a thread; fewer than 2^31 elements.
// `first` is the position of the loop's first element in the output's memory. With kPack > 1 the
// outputs step by 1, the inputs by 1 or 0, and every other stride and address keeps the alignment.
template <class T, class F, int kOut, int kIn, int kPack>
__global__ void __launch_bounds__(kThreads)
    map_strided_kernel(F given, Loop<kOut + kIn> loop, int64_t first) {
  using Packed = Pack<T, kPack>;
  const F f = given;
  const uint32_t packs = static_cast<uint32_t>(loop.numel / kPack);
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= packs) return;
  int64_t offsets[kOut + kIn] = {};
  uint32_t rest = index;
  for (int d = loop.ndim - 1; d >= 0; --d) {
    const bool inner = d == loop.ndim - 1;
    const uint32_t size = static_cast<uint32_t>(inner ? loop.sizes[d] / kPack : loop.sizes[d]);
    const uint32_t at = rest % size * (inner ? kPack : 1);
    rest /= size;
#pragma unroll
    for (int k = 0; k < kOut + kIn; ++k) offsets[k] += at * loop.strides[k][d];
  }
  Packed x[kIn], y[kOut];
#pragma unroll
  for (int k = 0; k < kIn; ++k) {
    const T* p = static_cast<const T*>(loop.data[kOut + k]) + offsets[kOut + k];
    if (kPack == 1 || loop.strides[kOut + k][loop.ndim - 1] == 1) {
      x[k] = *reinterpret_cast<const Packed*>(p);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) x[k].values[j] = *p;
    }
  }
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    T one[kIn], made[kOut];
#pragma unroll
    for (int k = 0; k < kIn; ++k) one[k] = x[k].values[j];
    apply(f, one, made, first + static_cast<int64_t>(index) * kPack + j);
#pragma unroll
    for (int k = 0; k < kOut; ++k) y[k].values[j] = made[k];
  }
#pragma unroll
  for (int k = 0; k < kOut; ++k) {
    store(static_cast<T*>(loop.data[k]) + offsets[k], y[k]);
  }
}

// Whether map_strided_kernel may take `pack` elements of `size` bytes at once.
template <int kOut, int kIn>
inline bool packs(const Loop<kOut + kIn>& loop, int pack, int64_t size) {
  const int inner = loop.ndim - 1;
  if (loop.sizes[inner] % pack != 0) return false;
  for (int k = 0; k < kOut + kIn; ++k) {
    const int64_t step = loop.strides[k][inner];
    if (step != 1 && (k < kOut || step != 0)) return false;
    if (step == 0) continue;
    if (reinterpret_cast<uintptr_t>(loop.data[k]) % (pack * size) != 0) return false;
    for (int d = 0; d < inner; ++d) {
      if (loop.strides[k][d] % pack != 0) return false;
    }
  }
  return true;
}

// Both functors compute the same; see Fast.
template <class T, int kFast, int kOut, int kIn, class F, class Slow>
inline void map_loop(Stream stream, const F& f, const Slow& slow, Loop<kOut + kIn> loop,
                     int64_t first) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (loop.numel > kMost) {
    // Halves of the outermost dimension, until 32 bits count the elements.
    Loop<kOut + kIn> half = loop;
    half.sizes[0] = loop.sizes[0] / 2;
    half.numel = loop.numel / loop.sizes[0] * half.sizes[0];
    map_loop<T, kFast, kOut, kIn>(stream, f, slow, half, first);
    for (int k = 0; k < kOut + kIn; ++k) {
      loop.data[k] = static_cast<T*>(loop.data[k]) + half.sizes[0] * loop.strides[k][0];
    }
    loop.sizes[0] -= half.sizes[0];
    loop.numel -= half.numel;
    return map_loop<T, kFast, kOut, kIn>(stream, f, slow, loop, first + half.numel);
  }
  constexpr int kPack = 16 / sizeof(T);
  const auto blocks = [](int64_t n) {
    return dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads));
  };
  if constexpr ((kFast & kPackedFast) != 0 && sizeof(T) <= 4) {
    if (packs<kOut, kIn>(loop, kPack, sizeof(T))) {
      const auto kernel = &map_strided_kernel<T, F, kOut, kIn, kPack>;
      PYDL_LAUNCH(kernel, blocks(loop.numel / kPack), dim3(kThreads), 0, stream, f, loop, first);
      return;
    }
  }
  const auto kernel = &map_strided_kernel<T, Slow, kOut, kIn, 1>;
  PYDL_LAUNCH(kernel, blocks(loop.numel), dim3(kThreads), 0, stream, slow, loop, first);
}

template <class T, int kOut, int kIn, class F>
inline void map_flat(Stream stream, const F& f, const Loop<kOut + kIn>& loop) {
  Pointers<kOut, kIn> p;
  for (int k = 0; k < kOut; ++k) p.out[k] = loop.data[k];
  for (int k = 0; k < kIn; ++k) p.in[k] = loop.data[kOut + k];
  constexpr int64_t kTile = int64_t{kThreads} * (16 / sizeof(T)) * unroll<kOut + kIn>();
  const auto kernel = &map_flat_kernel<T, F, kOut, kIn>;
  PYDL_LAUNCH(kernel, dim3(static_cast<unsigned>((loop.numel + kTile - 1) / kTile)), dim3(kThreads),
              0, stream, f, p, loop.numel);
}

template <int kFast, int kOut, int kIn, class F, class Slow>
inline void map(Stream stream, const char* op, const F& f, const Slow& slow,
                const Out (&outs)[kOut], const View (&ins)[kIn]) {
  const View* views[kOut + kIn];
  for (int k = 0; k < kOut; ++k) views[k] = &outs[k];
  for (int k = 0; k < kIn; ++k) views[kOut + k] = &ins[k];
  const Loop<kOut + kIn> loop = collapse<kOut + kIn>(op, views);
  if (loop.numel == 0) return;
  bool flat = loop.flat();
  for (int k = 0; k < kOut + kIn; ++k)
    flat = flat && reinterpret_cast<uintptr_t>(loop.data[k]) % 16 == 0;
  dispatch_float(op, outs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!flat) return map_loop<T, kFast, kOut, kIn>(stream, f, slow, loop, 0);
    if constexpr ((kFast & kFlatFast) != 0 && sizeof(T) <= 4) {
      map_flat<T, kOut, kIn>(stream, f, loop);
    } else {
      map_flat<T, kOut, kIn>(stream, slow, loop);
    }
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
