// CUDA: tiles in shared memory and a warp's products of them. A warp has 16 rows of a result;
// 16-bit types multiply in tensor cores, fp32 and fp64 with the same layout of the result.
#pragma once

#include "attention.h"
#include "elementwise.cuh"
#include "mma.cuh"

namespace pydl {
inline namespace PYDL_ISA {

constexpr int kLanesOfWarp = 32, kRowsOfWarp = 16;

template <class T>
constexpr bool kTensorCores = sizeof(T) == 2;

// Rows of kColumns elements. Chunks of 16 bytes are permuted within a row by its number, so that
// eight rows of a column lie in different banks.
template <class T, int kColumns>
struct Shared {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = kColumns / kChunk;
  static constexpr int kMask = kChunks >= 8 ? 7 : kChunks - 1;
  T* data;
  PYDL_DEVICE T* at(int row, int column) const {
    return data + row * kColumns + ((column / kChunk) ^ (row & kMask)) * kChunk + column % kChunk;
  }
};

// The lane's place in a result of 16 rows: rows g and g + 8, columns 2t and 2t + 1 of every eight.
struct Lane {
  int lane, g, t;
  PYDL_DEVICE Lane() {
    lane = threadIdx.x % kLanesOfWarp;
    g = lane / 4;
    t = lane % 4;
  }
};

// c += a b^T for the warp's 16 rows of a from row0 on, over `depth` columns of both (a multiple of
// 16, or of a chunk); kTiles x 8 rows of b.
template <class T, int kTiles, int kDepth, class A>
PYDL_DEVICE void product_rows(A (&c)[kTiles][4], const Shared<T, kDepth>& a, int row0,
                              const Shared<T, kDepth>& b, int depth, const Lane& l) {
  if constexpr (kTensorCores<T>) {
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k >= depth) break;
      uint32_t left[4];
      load_matrices(left, a.at(row0 + l.lane % 16, k + 8 * (l.lane / 16)));
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t right[4];
        load_matrices(right,
                      b.at(8 * j + l.lane % 8 + 8 * (l.lane / 16), k + 8 * (l.lane / 8 % 2)));
        mma(T{}, c[j], left, right[0], right[1]);
        mma(T{}, c[j + 1], left, right[2], right[3]);
      }
    }
  } else {
    constexpr int kChunk = Shared<T, kDepth>::kChunk;
    using Packed = Pack<T, kChunk>;
#pragma unroll 1
    for (int k = 0; k < depth; k += kChunk) {
      const Packed low = *reinterpret_cast<const Packed*>(a.at(row0 + l.g, k));
      const Packed high = *reinterpret_cast<const Packed*>(a.at(row0 + l.g + 8, k));
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const Packed right = *reinterpret_cast<const Packed*>(b.at(8 * j + 2 * l.t + side, k));
#pragma unroll
          for (int i = 0; i < kChunk; ++i) {
            c[j][side] += low.values[i] * right.values[i];
            c[j][2 + side] += high.values[i] * right.values[i];
          }
        }
      }
    }
  }
}

// A warp's 16 rows of numbers in shared memory, as wide as a result of kInner x 8 columns.
template <class A, int kInner>
struct Room : Shared<A, kInner * 8> {
  PYDL_DEVICE void put(const A (&c)[kInner][4], const Lane& l) const {
#pragma unroll
    for (int j = 0; j < kInner; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) *place(j, r, l) = c[j][r];
    }
  }
  PYDL_DEVICE void get(A (&c)[kInner][4], const Lane& l) const {
#pragma unroll
    for (int j = 0; j < kInner; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) c[j][r] = *place(j, r, l);
    }
  }
  PYDL_DEVICE A* place(int j, int r, const Lane& l) const {
    return this->at(l.g + 8 * (r / 2), 8 * j + 2 * l.t + r % 2);
  }
  // body(row, column, number) for every number, the warp's lanes along the columns.
  template <class Body>
  PYDL_DEVICE void each(const Lane& l, const Body& body) const {
    __syncwarp();
#pragma unroll 1
    for (int e = l.lane; e < kRowsOfWarp * kInner * 8; e += kLanesOfWarp) {
      const int row = e / (kInner * 8), column = e % (kInner * 8);
      body(row, column, *this->at(row, column));
    }
    __syncwarp();
  }
};

// The left operand made of a result: in registers for tensor cores, else where it lies in a room.
template <class T, int kInner>
struct Left {
  static constexpr int kSteps = kTensorCores<T> ? kInner / 2 : 1;
  uint32_t steps[kSteps][4];
  template <class A>
  PYDL_DEVICE void set(const A (&c)[kInner][4], const Room<A, kInner>& room, const Lane& l) {
    if constexpr (kTensorCores<T>) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        steps[k][0] = pack_two<T>(c[2 * k][0], c[2 * k][1]);
        steps[k][1] = pack_two<T>(c[2 * k][2], c[2 * k][3]);
        steps[k][2] = pack_two<T>(c[2 * k + 1][0], c[2 * k + 1][1]);
        steps[k][3] = pack_two<T>(c[2 * k + 1][2], c[2 * k + 1][3]);
      }
    } else {
      __syncwarp();
      room.put(c, l);
      __syncwarp();
    }
  }
};

// c += left b, b with kInner x 8 rows; columns first to first + kTiles x 8 of b, those past `width`
// left alone.
template <class T, int kInner, int kTiles, int kColumns, class A>
PYDL_DEVICE void product(A (&c)[kTiles][4], const Left<T, kInner>& left,
                         const Room<A, kInner>& room, const Shared<T, kColumns>& b, int first,
                         int width, const Lane& l) {
  if constexpr (kTensorCores<T>) {
#pragma unroll
    for (int k = 0; k < kInner / 2; ++k) {
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        if (first + 8 * j >= width) break;
        uint32_t right[4];
        load_matrices_transposed(right,
                                 b.at(16 * k + l.lane % 16, first + 8 * j + 8 * (l.lane / 16)));
        mma(T{}, c[j], left.steps[k], right[0], right[1]);
        mma(T{}, c[j + 1], left.steps[k], right[2], right[3]);
      }
    }
  } else {
    using Two = Pack<T, 2>;
#pragma unroll 1
    for (int k = 0; k < kInner * 8; ++k) {
      const A low = *room.at(l.g, k), high = *room.at(l.g + 8, k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (first + 8 * j >= width) break;
        const Two right = *reinterpret_cast<const Two*>(b.at(k, first + 8 * j + 2 * l.t));
        c[j][0] += low * right.values[0];
        c[j][1] += low * right.values[1];
        c[j][2] += high * right.values[0];
        c[j][3] += high * right.values[1];
      }
    }
  }
}

// Starts copying rows [0, kRows) of `width` elements into a tile, `count` of which there are; what
// is missing becomes zeros. `wide`: rows begin at multiples of 16 bytes.
template <int kThreadsOfBlock, int kRows, class T, int kColumns>
PYDL_DEVICE void load_tile(const Shared<T, kColumns>& to, const T* from, int64_t stride, int count,
                           int width, bool wide) {
  constexpr int kChunk = Shared<T, kColumns>::kChunk, kChunks = Shared<T, kColumns>::kChunks;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreadsOfBlock) {
    const int row = i / kChunks, column = i % kChunks * kChunk;
    T* const place = to.at(row, column);
    if (wide) {
      const bool there = row < count && column < width;
      copy_async(place, there ? from + row * stride + column : from, there);
    } else {
      for (int j = 0; j < kChunk; ++j) {
        place[j] = row < count && column + j < width ? from[row * stride + column + j] : T{};
      }
    }
  }
}

// Whether rows may be copied 16 bytes at a time.
template <class T>
inline bool rows_wide(const Quad& q) {
  constexpr int64_t kChunk = 16 / sizeof(T);
  bool wide = reinterpret_cast<uintptr_t>(q.data) % 16 == 0 && q.sizes[3] % kChunk == 0;
  for (int d = 0; d < 3; ++d) wide = wide && q.strides[d] % kChunk == 0;
  return wide;
}

template <class A>
PYDL_DEVICE A largest_of_row(A x) {
  for (int bit = 1; bit < 4; bit *= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, bit);
    x = other > x ? other : x;
  }
  return x;
}
template <class A>
PYDL_DEVICE A sum_of_row(A x) {
  for (int bit = 1; bit < 4; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}

PYDL_DEVICE float exponential_of(float16, float x) { return exponential(x); }
PYDL_DEVICE float exponential_of(bfloat16, float x) { return exponential(x); }
PYDL_DEVICE float exponential_of(float, float x) { return expf(x); }
PYDL_DEVICE double exponential_of(double, double x) { return exp(x); }

template <class A>
PYDL_DEVICE A nothing() {
  return -static_cast<A>(INFINITY);
}

// A mask's number for a score; -inf hides.
template <class A>
PYDL_DEVICE A mask_value(const Quad& m, int64_t at) {
  switch (m.dtype) {
    case DType::u8:
      return static_cast<const uint8_t*>(m.data)[at] ? A(0) : nothing<A>();
    case DType::f32:
      return static_cast<A>(static_cast<const float*>(m.data)[at]);
    case DType::f16:
      return static_cast<A>(to_float(static_cast<const float16*>(m.data)[at]));
    case DType::bf16:
      return static_cast<A>(to_float(static_cast<const bfloat16*>(m.data)[at]));
    default:
      return static_cast<A>(static_cast<const double*>(m.data)[at]);
  }
}

// What a score s (scaled) becomes for query i and key j, and what the softcap's derivative is.
template <class A>
struct Score {
  A value, slope;
};
template <class A>
PYDL_DEVICE Score<A> score_of(const Attention& a, const Attention::Sequence& s, int64_t b,
                              int64_t h, int64_t i, int64_t j, A x) {
  const Range64 seen = a.seen(s, i);
  if (i >= s.queries || j < seen.begin || j >= seen.end) return {nothing<A>(), A(0)};
  Score<A> found{x, A(1)};
  if (a.softcap > 0) {
    const A t = hyperbolic_tangent(x * static_cast<A>(1 / a.softcap));
    found = {t * static_cast<A>(a.softcap), A(1) - t * t};
  }
  if (a.relative.present()) {
    found.value += mask_value<A>(a.relative, a.relative.at(0, h, 0, j - (i + s.shift) + a.left));
  }
  if (a.mask.present()) found.value += mask_value<A>(a.mask, a.mask.at(b, h, i, j));
  return found;
}

}  // namespace PYDL_ISA
}  // namespace pydl
