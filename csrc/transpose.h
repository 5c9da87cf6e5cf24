// CPU: transposes a small matrix in registers, so that products read both factors by rows.
#pragma once

#include "gemm.h"

namespace pydl {
inline namespace PYDL_ISA {

// One step of transposing a square of registers: of each two rows kHalf apart, the upper half of
// every 2 kHalf lanes of the first changes places with the lower half of the second.
template <int kHalf>
PYDL_HD void exchange(vfloat* x) {
  const vint first = places([](int l) { return l & kHalf ? l - kHalf + kLanes : l; }, EachLane{});
  const vint second = places([](int l) { return l & kHalf ? l + kLanes : l + kHalf; }, EachLane{});
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const vfloat a = x[i], b = x[i + kHalf];
    x[i] = __builtin_shuffle(a, b, first);
    x[i + kHalf] = __builtin_shuffle(a, b, second);
  }
}

// to (columns x rows) = from (rows x columns), whose rows can be read to the end of a register
// where `kPadded`. Rows of `to` are padded with zeros.
template <class A, bool kPadded = true>
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
          const float* const at = from + (r + i) * from_row + c;
          x[i] = r + i >= rows ? vfloat{} : kPadded ? load(at) : load_some(at, columns - c);
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
