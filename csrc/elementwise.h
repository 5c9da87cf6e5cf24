// The CPU skeleton of every elementwise kernel: one pass over tensors of any strides, in vectors,
// in parallel. F is called as f(in, out, index): arrays of one register per operand, and the
// position of the first lane in the output's memory.
#pragma once

#include <type_traits>

#include "loop.h"
#include "math.h"
#include "parallel.h"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int64_t kGrain = 16384;  // elements worth waking a thread for
constexpr int kPrefetchBytes = 4096;
// Registers of a block that are computed in one go. Loops over few, of a length that is known, are
// unrolled by name: GCC 12 at -O2 leaves them, and what they go over in memory.
constexpr int kUnrolled = PYDL_LEVEL == 2 ? 4 : 2;

template <int kIn, int kBlock, class T>
PYDL_HD void prefetch_block(const T* const (&in)[kIn], int64_t i) {
  constexpr int kPerLine = 64 / static_cast<int>(sizeof(T));
#pragma GCC unroll 8
  for (int at = 0; at < kBlock; at += kPerLine) {
#pragma GCC unroll 8
    for (int k = 0; k < kIn; ++k) prefetch(in[k] + i + at + kPrefetchBytes / sizeof(T));
  }
}

// kBlock elements of bf16, as pairs of registers.
template <class F, int kOut, int kIn, int kBlock>
PYDL_HD void pairs_block(const F& f, bfloat16* const (&out)[kOut], const bfloat16* const (&in)[kIn],
                         int64_t i, bool past_cache) {
  constexpr int kWidth = 2 * kLanes;
  vuint y[kOut][kBlock / kWidth];
#pragma GCC unroll kUnrolled
  for (int r = 0; r < kBlock / kWidth; ++r) {
    vlow x[2][kIn], one[2][kOut];
#pragma GCC unroll 8
    for (int k = 0; k < kIn; ++k) {
      const Pair pair = load_pair(in[k] + i + r * kWidth);
      x[0][k] = pair.even;
      x[1][k] = pair.odd;
    }
#pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) f(x[half], one[half], 0);
#pragma GCC unroll 8
    for (int k = 0; k < kOut; ++k) y[k][r] = join(one[0][k], one[1][k]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kOut; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kBlock / kWidth; ++r) {
      void* p = out[k] + i + r * kWidth;
      if (past_cache) {
        pydl::stream(p, y[k][r]);
      } else {
        *static_cast<vuint_any*>(p) = y[k][r];
      }
    }
  }
  if (past_cache) prefetch_block<kIn, kBlock>(in, i);
}

// Whether what a functor computes depends on where an element lies.
template <class F>
PYDL_HD bool by_position(const F& f) {
  if constexpr (requires { f.by_position(); }) return f.by_position();
  return false;
}

// Computes n elements that lie in one run in every operand. The only code that is made anew for
// each formula and type: the loops around it see it as a RunFn.
template <class T, class F, int kOut, int kIn>
__attribute__((noinline)) void map_run(const void* functor, void* const* outs,
                                       const void* const* ins, int64_t n, int64_t index,
                                       bool stream) {
  using V = typename Lanes<T>::type;
  constexpr int kWidth = Lanes<T>::count;
  // Four cache lines are computed before four are stored: a store past the cache waits for a full
  // line, and one line at a time leaves the memory idle between them.
  constexpr int kPerLine = 64 / static_cast<int>(sizeof(T)), kLines = 4, kBlock = kLines * kPerLine;
  const F& f = *static_cast<const F*>(functor);
  T* out[kOut];
  const T* in[kIn];
  for (int k = 0; k < kOut; ++k) out[k] = static_cast<T*>(outs[k]);
  for (int k = 0; k < kIn; ++k) in[k] = static_cast<const T*>(ins[k]);
  [[maybe_unused]] const bool in_pairs = !by_position(f);
  int64_t i = 0, head = 0;
  const auto misaligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % 64; };
  for (int k = 1; k < kOut; ++k) stream = stream && misaligned(out[k]) == misaligned(out[0]);
  stream = PYDL_STREAMS && sizeof(T) <= 4 && stream && n >= 8 * kBlock;
  if (stream) head = static_cast<int64_t>((64 - misaligned(out[0])) % 64 / sizeof(T));
  for (bool block = head == 0;; block = true) {
    if (block) {
      for (; i + kBlock <= n; i += kBlock) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          if (in_pairs) {
            pairs_block<F, kOut, kIn, kBlock>(f, out, in, i, stream);
            continue;
          }
        }
        V y[kOut][kBlock / kWidth];
#pragma GCC unroll kUnrolled
        for (int r = 0; r < kBlock / kWidth; ++r) {
          V x[kIn], one[kOut];
#pragma GCC unroll 8
          for (int k = 0; k < kIn; ++k) x[k] = load(in[k] + i + r * kWidth);
          f(x, one, index + i + r * kWidth);
#pragma GCC unroll 8
          for (int k = 0; k < kOut; ++k) y[k][r] = one[k];
        }
#pragma GCC unroll 8
        for (int k = 0; k < kOut; ++k) put<kLines>(out[k] + i, y[k], stream);
        if (stream) prefetch_block<kIn, kBlock>(in, i);
      }
    }
    const int64_t stop = block ? n : head;
    while (i < stop) {
      const int64_t count = stop - i < kWidth ? stop - i : kWidth;
      V x[kIn], y[kOut];
#pragma GCC unroll 8
      for (int k = 0; k < kIn; ++k) x[k] = load_some(in[k] + i, count);
      f(x, y, index + i);
#pragma GCC unroll 8
      for (int k = 0; k < kOut; ++k) store_some(out[k] + i, y[k], count);
      i += count;
    }
    if (block) break;
  }
  if (stream) stream_fence();
}

using RunFn = void (*)(const void* functor, void* const* outs, const void* const* ins, int64_t n,
                       int64_t index, bool stream);

// n copies of a number of 2, 4 or 8 bytes, in whole registers; `to` has room for them.
template <class Unit>
PYDL_HD void fill(Unit* to, Unit number, int64_t n) {
  uint64_t pattern = 0;
  for (size_t i = 0; i < 8; i += sizeof(Unit)) pattern |= uint64_t{number} << (8 * i);
  const vulong many = pattern - vulong{};
  for (int64_t i = 0; i < n; i += kVectorBytes / static_cast<int64_t>(sizeof(Unit))) {
    std::memcpy(to + i, &many, kVectorBytes);
  }
}

// The same where operands may step by any stride: those that do pass through a small buffer.
template <class Unit, int kOut, int kIn>
inline void map_strided(RunFn run, const void* functor, void* const* out, const void* const* in,
                        const int64_t* steps, int64_t n, int64_t index, bool stream) {
  constexpr int64_t kBlock = 1024;
  for (int k = 0; k < kOut; ++k) stream = stream && steps[k] == 1;
  Unit buffers[kOut + kIn][kBlock];
  for (int k = 0; k < kIn; ++k) {
    if (steps[kOut + k] != 0) continue;
    fill(buffers[kOut + k], *static_cast<const Unit*>(in[k]), n < kBlock ? n : kBlock);
  }
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    void* to[kOut];
    const void* from[kIn];
    for (int k = 0; k < kIn; ++k) {
      const int64_t step = steps[kOut + k];
      const Unit* p = static_cast<const Unit*>(in[k]);
      from[k] = step == 1 ? p + begin : buffers[kOut + k];
      if (step == 0 || step == 1) continue;
      for (int64_t j = 0; j < count; ++j) buffers[kOut + k][j] = p[(begin + j) * step];
    }
    for (int k = 0; k < kOut; ++k) {
      to[k] = steps[k] == 1 ? static_cast<Unit*>(out[k]) + begin : buffers[k];
    }
    run(functor, to, from, count, index + begin, stream);
    for (int k = 0; k < kOut; ++k) {
      if (steps[k] == 1) continue;
      for (int64_t j = 0; j < count; ++j)
        static_cast<Unit*>(out[k])[(begin + j) * steps[k]] = buffers[k][j];
    }
  }
}

// Unit is an unsigned integer of the element's size.
template <class Unit, int kOut, int kIn>
inline void map_loop(RunFn run, const void* functor, const Loop<kOut + kIn>& loop, bool stream) {
  constexpr int kAll = kOut + kIn;
  const int inner = loop.ndim - 1;
  const int64_t width = loop.sizes[inner];
  bool unit = true;
  int64_t steps[kAll];
  for (int k = 0; k < kAll; ++k) {
    steps[k] = loop.strides[k][inner];
    unit = unit && (steps[k] == 1 || width == 1);
  }
  parallel_for(loop.numel, kGrain, [&](int64_t begin, int64_t end) {
    int64_t at[kMaxDims], rest = begin;
    for (int d = inner; d >= 0; --d) {
      at[d] = rest % loop.sizes[d];
      rest /= loop.sizes[d];
    }
    while (begin < end) {
      void* out[kOut];
      const void* in[kIn];
      for (int k = 0; k < kAll; ++k) {
        int64_t offset = 0;
        for (int d = 0; d <= inner; ++d) offset += at[d] * loop.strides[k][d];
        Unit* p = static_cast<Unit*>(loop.data[k]) + offset;
        if (k < kOut) {
          out[k] = p;
        } else {
          in[k - kOut] = p;
        }
      }
      const int64_t count = width - at[inner] < end - begin ? width - at[inner] : end - begin;
      if (unit) {
        run(functor, out, in, count, begin, stream);
      } else {
        map_strided<Unit, kOut, kIn>(run, functor, out, in, steps, count, begin, stream);
      }
      begin += count;
      at[inner] += count;
      for (int d = inner; d > 0 && at[d] == loop.sizes[d]; --d) {
        at[d] = 0;
        ++at[d - 1];
      }
    }
  });
}

template <int kOut, int kIn>
inline void map_views(const char* op, RunFn run, const void* functor, int64_t size, const Out* outs,
                      const View* ins) {
  const View* views[kOut + kIn];
  for (int k = 0; k < kOut; ++k) views[k] = &outs[k];
  for (int k = 0; k < kIn; ++k) views[kOut + k] = &ins[k];
  const Loop<kOut + kIn> loop = collapse<kOut + kIn>(op, views);
  if (loop.numel == 0) return;
  bool stream = loop.numel * size * kOut >= stream_bytes;
  for (int k = 0; k < kOut; ++k) {
    for (int j = 0; j < kIn; ++j) stream = stream && outs[k].data != ins[j].data;
  }
  if (size == 2) return map_loop<uint16_t, kOut, kIn>(run, functor, loop, stream);
  if (size == 4) return map_loop<uint32_t, kOut, kIn>(run, functor, loop, stream);
  return map_loop<uint64_t, kOut, kIn>(run, functor, loop, stream);
}

template <class F, int kOut, int kIn>
inline void map(const char* op, const F& f, const Out (&outs)[kOut], const View (&ins)[kIn]) {
  dispatch_float(op, outs[0].dtype, [&](auto zero) {
    using T = decltype(zero);
    map_views<kOut, kIn>(op, &map_run<T, F, kOut, kIn>, &f, sizeof(T), outs, ins);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
