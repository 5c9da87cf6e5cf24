// CPU: products of bf16 numbers, two terms at a time, summed in fp32: AVX512-BF16's VDPBF16PS. Two
// terms that follow each other lie side by side in both factors. Needs AVX-512; where the processor
// lacks the instruction, others give the same to the last places, for tests.
#pragma once

#include <cstring>

#include "tiles.h"
#include "transpose.h"

namespace pydl {

// Who takes products of bf16: 0: fp32's instructions; 1: VDPBF16PS; 2: what stands for it.
extern int dot_mode;

inline namespace PYDL_ISA {

constexpr bool kDots = PYDL_LEVEL == 2;
// Terms of a product that lie side by side in the right factor.
template <class N>
constexpr int64_t kTerms = std::is_same_v<N, bfloat16> ? 2 : 1;

constexpr int64_t even(int64_t n) { return n + n % 2; }

#if PYDL_LEVEL == 2

#define PYDL_DOT __attribute__((target("avx512bf16")))

template <bool kOwn>
PYDL_DOT inline __attribute__((always_inline)) vfloat dot(vfloat sum, vuint a, vuint b) {
  if constexpr (kOwn) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  } else {
    constexpr uint32_t kUpper = 0xffff0000u;
    sum += (vfloat)(a & kUpper) * (vfloat)(b & kUpper);
    return sum + (vfloat)(a << 16) * (vfloat)(b << 16);
  }
}

// As `block` of gemm.h; a row of `b` is of two terms.
template <bool kOwn, int kRows, int kRegisters>
PYDL_DOT inline __attribute__((always_inline)) void dot_block(int64_t depth, const bfloat16* a,
                                                              int64_t a_row, const bfloat16* b,
                                                              int64_t b_row, float* c,
                                                              int64_t c_row, bool add) {
  vfloat sums[kRows][kRegisters] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    vuint right[kRegisters];
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) {
      right[j] = *reinterpret_cast<const vuint_any*>(b + j * 2 * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      uint32_t pair;
      std::memcpy(&pair, a + i * a_row + k, 4);
      const vuint left = pair - vuint{};
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; ++j) sums[i][j] = dot<kOwn>(sums[i][j], left, right[j]);
    }
    b += b_row;
  }
  put_block(sums, c, c_row, add);
}

template <bool kOwn, int kRegisters>
PYDL_DOT __attribute__((noinline)) void dot_rows(int64_t rows, int64_t depth, const bfloat16* a,
                                                 int64_t a_row, const bfloat16* b, int64_t b_row,
                                                 float* c, int64_t c_row, bool add) {
  for (; rows >= 6; rows -= 6) {
    dot_block<kOwn, 6, kRegisters>(depth, a, a_row, b, b_row, c, c_row, add);
    a += 6 * a_row;
    c += 6 * c_row;
  }
  switch (rows) {
    case 5:
      return dot_block<kOwn, 5, kRegisters>(depth, a, a_row, b, b_row, c, c_row, add);
    case 4:
      return dot_block<kOwn, 4, kRegisters>(depth, a, a_row, b, b_row, c, c_row, add);
    case 3:
      return dot_block<kOwn, 3, kRegisters>(depth, a, a_row, b, b_row, c, c_row, add);
    case 2:
      return dot_block<kOwn, 2, kRegisters>(depth, a, a_row, b, b_row, c, c_row, add);
    case 1:
      return dot_block<kOwn, 1, kRegisters>(depth, a, a_row, b, b_row, c, c_row, add);
    default:
      return;
  }
}

template <bool kOwn>
inline void dot_panels(int64_t rows, int64_t columns, int64_t depth, const bfloat16* a,
                       int64_t a_row, const bfloat16* b, int64_t b_row, float* c, int64_t c_row,
                       bool add) {
  by_panels<float>(columns, [&](auto registers, int64_t j) {
    dot_rows<kOwn, registers>(rows, depth, a, a_row, b + 2 * j, b_row, c + j, c_row, add);
  });
}

// c (rows x columns) = a b, added to c where `add`. `depth` is even; a's terms follow each other;
// b_row is from two terms of b to the next two, each register of which is padded, as c's rows.
// Where there are tile registers, they take what fills them; the thread has set them up.
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const Strided<bfloat16>& a,
                     const bfloat16* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  const auto dots = dot_mode == 1 ? &dot_panels<true> : &dot_panels<false>;
  const int64_t full_rows = rows / kTileRows * kTileRows;
  const int64_t full_depth = depth / kTileTerms * kTileTerms;
  if (!tile_mode || full_rows == 0 || full_depth == 0) {
    return dots(rows, columns, depth, a.data, a.row, b, b_row, c, c_row, add);
  }
  const auto tiles = tile_mode == 1 ? &tile_products<Tiles> : &tile_products<StandInTiles>;
  tiles(full_rows, columns, full_depth, a.data, a.row, b, b_row, c, c_row, add);
  if (full_depth < depth) {
    dots(full_rows, columns, depth - full_depth, a.data + full_depth, a.row,
         b + full_depth / 2 * b_row, b_row, c, c_row, true);
  }
  if (full_rows < rows) {
    dots(rows - full_rows, columns, depth, a.data + full_rows * a.row, a.row, b, b_row,
         c + full_rows * c_row, c_row, add);
  }
}

// Compares the processor's tile registers with the other products once, on numbers that leave no
// rounding, and does without them where they differ.
inline void check_tiles() {
  static const bool done = [] {
    constexpr int64_t kRows = 3 * kTileRows, kDepth = 2 * kTileTerms, kColumns = 3 * kTileColumns;
    bfloat16 a[kRows * kDepth], b[kDepth * kColumns];
    float c[2][kRows * kColumns];
    const auto whole = [](int64_t i) {
      return bfloat16{static_cast<uint16_t>(float_bits(static_cast<float>(i % 13 - 6)) >> 16)};
    };
    for (int64_t i = 0; i < kRows * kDepth; ++i) a[i] = whole(i * i);
    for (int64_t i = 0; i < kDepth * kColumns; ++i) b[i] = whole(i * 5 + i / 7);
    const TileUse registers(true);
    const int modes[] = {tile_mode, 0};
    for (const int mode : modes) {
      tile_mode = mode;
      for (const bool add : {false, true}) {
        multiply(kRows, kColumns, kDepth, {a, kDepth, 1}, b, 2 * kColumns, c[mode == 0], kColumns,
                 add);
      }
    }
    tile_mode = std::memcmp(c[0], c[1], sizeof c[0]) == 0 ? modes[0] : 0;
    return true;
  }();
  static_cast<void>(done);
}

// Numbers rounded to bf16, to the end of a register.
template <bool kOwn>
PYDL_DOT inline __attribute__((always_inline)) vshort rounded(vfloat x) {
  if constexpr (kOwn) return (vshort)_mm512_cvtneps_pbh((__m512)x);
  return round_to(static_cast<const bfloat16*>(nullptr), vlow{x});
}
template <bool kOwn>
PYDL_DOT __attribute__((noinline)) void narrow_row(const float* from, int64_t n, bfloat16* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    *reinterpret_cast<vshort_any*>(to + i) = rounded<kOwn>(load(from + i));
  }
}
template <bool kOwn>
PYDL_DOT __attribute__((noinline)) void pair_rows(const float* first, const float* second,
                                                  int64_t n, bfloat16* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const vuint low = widen(rounded<kOwn>(load(first + i)));
    const vuint high = widen(rounded<kOwn>(second ? load(second + i) : vfloat{})) << 16;
    *reinterpret_cast<vuint_any*>(to + 2 * i) = low | high;
  }
}
inline void narrow(const float* from, int64_t n, bfloat16* to) {
  (dot_mode == 1 ? narrow_row<true> : narrow_row<false>)(from, n, to);
}

// Two rows of n numbers side by side, term by term; the second may be null, for zeros.
inline void side_by_side(const float* first, const float* second, int64_t n, bfloat16* to) {
  (dot_mode == 1 ? pair_rows<true> : pair_rows<false>)(first, second, n, to);
}
inline void side_by_side(const bfloat16* first, const bfloat16* second, int64_t n, bfloat16* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const vuint low = (vuint)load_some(first + i, count).v;
    const vuint high = second ? (vuint)load_some(second + i, count).v : vuint{};
    *reinterpret_cast<vuint_any*>(to + 2 * i) = (low >> 16) | high;
  }
}

// `count` rows of n numbers as a right factor of as many terms: pairs of rows side by side, each of
// `wide` columns; `count` up to an even number.
inline void pack_rows(const bfloat16* from, int64_t stride, int64_t count, int64_t n, bfloat16* to,
                      int64_t wide) {
  for (int64_t j = 0; j < count; j += 2) {
    const bfloat16* const row = from + j * stride;
    side_by_side(row, j + 1 < count ? row + stride : nullptr, n, to + j * wide);
  }
}

// The same as `pack_panels` of gemm.h: rows become columns, of as many terms as a row has numbers,
// up to an even number. `room` holds a panel.
inline void pack_panels(const bfloat16* from, int64_t stride, int64_t count, int64_t n,
                        bfloat16* to, bfloat16* room) {
  const int64_t depth = even(n);
  for (int64_t p = 0; p < count; p += kPanel<float>) {
    const int64_t rows = count - p < kPanel<float> ? count - p : kPanel<float>;
    for (int64_t j = 0; j < rows; ++j) {
      std::memcpy(room + j * depth, from + (p + j) * stride, static_cast<size_t>(n) * 2);
      if (depth > n) room[j * depth + n] = {0};
    }
    transpose<float, false>(reinterpret_cast<const float*>(room), depth / 2, rows, depth / 2,
                            reinterpret_cast<float*>(to + p * depth), kPanel<float>);
  }
}

// to (n x count, up to an even number) = the transpose of `count` rows of n numbers; `room` holds
// as many.
inline void transpose_rows(const bfloat16* from, int64_t stride, int64_t count, int64_t n,
                           bfloat16* to, int64_t to_row, bfloat16* room) {
  const int64_t wide = padded<float>(n);
  pack_rows(from, stride, count, n, room, wide);
  transpose<float>(reinterpret_cast<const float*>(room), wide, even(count) / 2, n,
                   reinterpret_cast<float*>(to), to_row / 2);
}

#else

inline void check_tiles() {}

#endif

}  // namespace PYDL_ISA
}  // namespace pydl
