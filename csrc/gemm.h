// CPU: products of small matrices. A block of the result lives in registers while both factors are
// read from the caches: one operand a number at a time, spread over a register, the other a row of
// registers at a time (Goto and van de Geijn 2008).
#pragma once

#include <cstdlib>

#include "vec.h"

namespace pydl {
inline namespace PYDL_ISA {

// The register that products are computed in: bf16 and fp16 are converted before.
template <class A>
struct Register {
  using type = vfloat;
  static constexpr int64_t lanes = kLanes;
};
template <>
struct Register<double> {
  using type = double;
  static constexpr int64_t lanes = 1;
};
template <class A>
constexpr int64_t kBlockRows = 6;
template <class A>
constexpr int kBlockRegisters = PYDL_LEVEL == 2 || sizeof(A) == 8 ? 4 : 2;
// Columns of the widest block.
template <class A>
constexpr int64_t kPanel = kBlockRegisters<A> * Register<A>::lanes;

PYDL_HD vfloat spread(float x) { return x - vfloat{}; }
PYDL_HD double spread(double x) { return x; }

PYDL_HD vfloat plain(vfloat x) { return x; }
PYDL_HD vfloat plain(vlow x) { return x.v; }
PYDL_HD double plain(double x) { return x; }

// n up to the next multiple of a register's lanes.
template <class A>
constexpr int64_t padded(int64_t n) {
  return (n + Register<A>::lanes - 1) / Register<A>::lanes * Register<A>::lanes;
}

// Memory of a call, not cleared, aligned to a cache line.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n > 0 ? n : 1) * sizeof(A) + 127) / 64 * 64;
    data_ = static_cast<A*>(std::aligned_alloc(64, bytes));
    if (!data_) fail("no memory for %lld numbers", static_cast<long long>(n));
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

// A matrix whose element (i, k) lies at i * row + k * column.
template <class A>
struct Strided {
  const A* data;
  int64_t row, column;
  Strided from(int64_t i, int64_t k) const { return {data + i * row + k * column, row, column}; }
};

// c = sums, or added to it where `add`.
template <class A, class V, int kRows, int kRegisters>
inline __attribute__((always_inline)) void put_block(const V (&sums)[kRows][kRegisters], A* c,
                                                     int64_t c_row, bool add) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) {
      A* const to = c + i * c_row + j * Register<A>::lanes;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

// c (kRows x kRegisters registers) = a b, added to c where `add`: as one number, so that a long sum
// put together from many calls loses few places.
template <class A, int kRows, int kRegisters>
inline __attribute__((always_inline)) void block(int64_t depth, const Strided<A>& a, const A* b,
                                                 int64_t b_row, A* c, int64_t c_row, bool add) {
  using V = typename Register<A>::type;
  constexpr int64_t kWidth = Register<A>::lanes;
  V sums[kRows][kRegisters];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) {
      sums[i][j] = spread(A(0));
    }
  }
  const A* from = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    V right[kRegisters];
#pragma GCC unroll 8
    for (int j = 0; j < kRegisters; ++j) right[j] = load(b + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V left = spread(from[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < kRegisters; ++j) sums[i][j] += left * right[j];
    }
    from += a.column;
    b += b_row;
  }
  put_block(sums, c, c_row, add);
}

template <class A, int kRegisters>
__attribute__((noinline)) void block_rows(int64_t rows, int64_t depth, Strided<A> a, const A* b,
                                          int64_t b_row, A* c, int64_t c_row, bool add) {
  for (; rows >= kBlockRows<A>; rows -= kBlockRows<A>) {
    block<A, kBlockRows<A>, kRegisters>(depth, a, b, b_row, c, c_row, add);
    a.data += kBlockRows<A> * a.row;
    c += kBlockRows<A> * c_row;
  }
  switch (rows) {
    case 5:
      return block<A, 5, kRegisters>(depth, a, b, b_row, c, c_row, add);
    case 4:
      return block<A, 4, kRegisters>(depth, a, b, b_row, c, c_row, add);
    case 3:
      return block<A, 3, kRegisters>(depth, a, b, b_row, c, c_row, add);
    case 2:
      return block<A, 2, kRegisters>(depth, a, b, b_row, c, c_row, add);
    case 1:
      return block<A, 1, kRegisters>(depth, a, b, b_row, c, c_row, add);
    default:
      return;
  }
}

// Calls body(registers, column) for panels of so many registers, a constant; of the last, which are
// fewer, they are rounded up.
template <class A, class Body>
inline void by_panels(int64_t columns, const Body& body) {
  constexpr int64_t kWidth = Register<A>::lanes;
  for (int64_t j = 0; j < columns; j += kPanel<A>) {
    const int64_t registers = (columns - j + kWidth - 1) / kWidth;
    if constexpr (kBlockRegisters<A> == 4) {
      if (registers >= 3) {
        if (registers == 3) {
          body(std::integral_constant<int, 3>{}, j);
        } else {
          body(std::integral_constant<int, 4>{}, j);
        }
        continue;
      }
    }
    if (registers >= 2) {
      body(std::integral_constant<int, 2>{}, j);
    } else {
      body(std::integral_constant<int, 1>{}, j);
    }
  }
}

// c (rows x columns) = a b, added to c where `add`. Rows of b and c are padded: `columns` is
// rounded up to a register's lanes.
template <class A>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Strided<A>& a, const A* b,
              int64_t b_row, A* c, int64_t c_row, bool add) {
  by_panels<A>(columns, [&](auto registers, int64_t j) {
    block_rows<A, registers>(rows, depth, a, b + j, b_row, c + j, c_row, add);
  });
}

// `count` rows of `n` numbers as they are computed with: where they lie, or converted and padded
// with zeros.
template <class A>
struct Matrix {
  const A* data;
  int64_t row;
};
template <class T, class N, class A>
inline void convert_row(const T* from, int64_t n, N* to, A scale) {
  constexpr int64_t kWidth = Register<A>::lanes;
  const int64_t end = padded<A>(n);
  for (int64_t i = 0; i < end; i += kWidth) {
    const auto x = plain(load_some(from + i, n - i < kWidth ? n - i : kWidth)) * spread(scale);
    store(to + i, typename Lanes<N>::type{x});
  }
}
template <class T, class A>
inline void convert_back(const A* from, int64_t n, T* to, A scale) {
  constexpr int64_t kWidth = Register<A>::lanes;
  for (int64_t i = 0; i < n; i += kWidth) {
    const typename Lanes<T>::type x{load(from + i) * spread(scale)};
    store_some(to + i, x, n - i < kWidth ? n - i : kWidth);
  }
}
template <class T, class N>
inline Matrix<N> in_place_or(const T* from, int64_t stride, int64_t count, int64_t n, N* room) {
  using A = acc_t<N>;
  if constexpr (std::is_same_v<T, N>) {
    if (n == padded<A>(n)) return {from, stride};
  }
  const int64_t row = padded<A>(n);
  for (int64_t i = 0; i < count; ++i) convert_row(from + i * stride, n, room + i * row, A(1));
  return {room, row};
}

// Transposes `count` rows of `n` numbers into panels of kPanel columns: panel p holds, for each of
// the n numbers, that of rows p * kPanel and on; zeros past the last.
template <class T, class A>
inline void pack_panels(const T* from, int64_t stride, int64_t count, int64_t n, A* to) {
  constexpr int64_t kTile = 16;
  for (int64_t p = 0; p < count; p += kPanel<A>) {
    const int64_t rows = count - p < kPanel<A> ? count - p : kPanel<A>;
    for (int64_t d = 0; d < n; d += kTile) {
      const int64_t end = n - d < kTile ? n : d + kTile;
      for (int64_t j = 0; j < kPanel<A>; ++j) {
        const T* const row = from + (p + j) * stride;
        for (int64_t k = d; k < end; ++k) {
          to[k * kPanel<A> + j] = j < rows ? static_cast<A>(to_float(row[k])) : A(0);
        }
      }
    }
    to += n * kPanel<A>;
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
