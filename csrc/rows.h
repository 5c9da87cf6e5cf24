// Dense rows, and what kernels over them check before they read.
#pragma once

#include <initializer_list>

#include "types.h"

namespace pydl {
inline namespace PYDL_ISA {

struct Rows {
  int64_t count, n;

  // x: (rows, columns). `alike` have its shape and dtype; `numbers` one number a row, in fp32 (fp64
  // for fp64).
  static Rows of(const char* op, const View& x, std::initializer_list<const View*> alike,
                 std::initializer_list<const View*> numbers) {
    if (x.ndim != 2) fail("%s: wants (rows, columns), got %d dimensions", op, x.ndim);
    const Rows rows{x.sizes[0], x.sizes[1]};
    rows.check_dense(op, x);
    for (const View* other : alike) {
      if (other->ndim != 2 || other->sizes[0] != rows.count || other->sizes[1] != rows.n ||
          other->dtype != x.dtype) {
        fail("%s: wants tensors of one dtype and of %lld rows of %lld", op,
             static_cast<long long>(rows.count), static_cast<long long>(rows.n));
      }
      rows.check_dense(op, *other);
    }
    const DType wide = x.dtype == DType::f64 ? DType::f64 : DType::f32;
    for (const View* number : numbers) {
      if (number != nullptr && (number->numel != rows.count || number->dtype != wide)) {
        fail("%s: wants a float32 number (float64 for float64) for each of %lld rows", op,
             static_cast<long long>(rows.count));
      }
    }
    return rows;
  }

  void check_same(const char* op, const Rows& other) const {
    if (other.count != count || other.n != n) {
      fail("%s: wants tensors of %lld rows of %lld", op, static_cast<long long>(count),
           static_cast<long long>(n));
    }
  }

  void check_dense(const char* op, const View& x) const {
    if (x.numel == 0) return;
    if ((n > 1 && x.strides[1] != 1) || (count > 1 && x.strides[0] != n)) {
      fail("%s: wants dense memory, got strides (%lld, %lld)", op,
           static_cast<long long>(x.strides[0]), static_cast<long long>(x.strides[1]));
    }
  }

  // Where the gradients of `n` weights go: as many or none, and partials of (pieces, 2, n) in fp64.
  void check_sums(const char* op, std::initializer_list<const View*> totals,
                  const View& partials) const {
    bool right = partials.ndim == 3 && partials.dtype == DType::f64 &&
                 (partials.sizes[0] == 0 || (partials.sizes[1] == 2 && partials.sizes[2] == n));
    for (const View* total : totals) {
      right = right && (total->numel == 0 || (total->numel == n && partials.numel > 0));
    }
    if (!right) {
      fail("%s: wants %lld sums, and float64 partials of (pieces, 2, %lld)", op,
           static_cast<long long>(n), static_cast<long long>(n));
    }
  }
};

// Calls body(T{}, R{}) for the dtypes of an input and of its residual: the same, or fp32 beside 16
// bits.
template <class Body>
inline void dispatch_residual(const char* op, DType input, DType residual, const Body& body) {
  dispatch_float(op, input, [&](auto zero) {
    if (residual == input) return body(zero, zero);
    if constexpr (sizeof(zero) == 2) {
      if (residual == DType::f32) return body(zero, float{});
    }
    fail("%s: wants a residual of the input's dtype, or float32 with an input of 16 bits", op);
  });
}

}  // namespace PYDL_ISA
}  // namespace pydl
