// CPU: transposes a small matrix in registers, so that products read both factors by rows.
#pragma once

#include "gemm.h"

namespace pydl {
inline namespace PYDL_ISA {

// One step of transposing a square of registers: of each two rows kHalf apart, the upper half of
// every 2 kHalf lanes of the first changes places with the lower half of the second.
template <int kHalf>
inline __attribute__((always_inline)) void exchange(vfloat* x) {
  vint first, second;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    first[l] = l & kHalf ? l - kHalf + kLanes : l;
    second[l] = l & kHalf ? l + kLanes : l + kHalf;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const vfloat a = x[i], b = x[i + kHalf];
    x[i] = __builtin_shuffle(a, b, first);
    x[i + kHalf] = __builtin_shuffle(a, b, second);
  }
}

// to (columns x rows) = from (rows x columns), whose rows can be read to the end of a register.
// Rows of `to` are padded with zeros.
template <class A>
void transpose(const A* from, int64_t from_row, int64_t rows, int64_t columns, A* to,
               int64_t to_row) {
  constexpr int64_t kWidth = Register<A>::lanes;
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      if constexpr (kWidth == 1) {
        to[c * to_row + r] = from[r * from_row + c];
      } else {
        vfloat x[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          x[i] = r + i < rows ? load(from + (r + i) * from_row + c) : vfloat{};
        }
        if constexpr (kWidth > 8) exchange<8>(x);
        if constexpr (kWidth > 4) exchange<4>(x);
        exchange<2>(x);
        exchange<1>(x);
#pragma GCC unroll 16
        for (int j = 0; j < kWidth; ++j) {
          if (c + j < columns) store(to + (c + j) * to_row + r, x[j]);
        }
      }
    }
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
