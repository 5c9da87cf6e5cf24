// Storage types and their conversions. Arithmetic is done in the accumulation type: float for fp32,
// fp16 and bf16, double for fp64; a value is rounded once, at the store.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda.h"
#include "registry.h"

namespace pydl {
inline namespace PYDL_ISA {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

PYDL_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
PYDL_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

PYDL_HD float to_float(float x) { return x; }
PYDL_HD double to_float(double x) { return x; }
PYDL_HD float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
PYDL_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Shifting the fields into place leaves the exponent 112 too small; the product restores it and
  // normalises subnormals on the way.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_float(sign | rest | 0x70000000u);
  return bits_float(sign | float_bits(bits_float(rest) * bits_float(0x77800000u)));
#endif
}

template <class T>
PYDL_HD T from_float(float x);
template <class T>
PYDL_HD T from_float(double x) {
  return static_cast<T>(x);
}
template <>
PYDL_HD float from_float<float>(float x) {
  return x;
}
template <>
PYDL_HD bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_bits(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
PYDL_HD float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {
    // Adding 0.5 moves the bits of a subnormal result to the mantissa's end, rounded to nearest
    // even.
    const uint32_t moved = float_bits(bits_float(rest) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | moved)};
  }
  const uint32_t rounded = rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// A scalar of math.h as the type it computes in; vec.h adds the vectors.
template <class V>
PYDL_HD V splat(double x) {
  return static_cast<V>(x);
}

// Calls body(T{}) for the storage type of a dtype: the one typed switch of a launcher.
template <class Body>
inline void dispatch_float(const char* op, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f16:
      return body(float16{});
    case DType::bf16:
      return body(bfloat16{});
    case DType::f64:
      return body(double{});
    default:
      fail("%s: wants float32, float16, bfloat16 or float64 tensors", op);
  }
}

}  // namespace PYDL_ISA
}  // namespace pydl
