// Vectors for the CPU kernels: one register of the level that the file is compiled for, as a GCC
// vector type, so that a formula of math.h reads the same for a vector as for a float.
#pragma once

#include <utility>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pydl {
inline namespace PYDL_ISA {

#if PYDL_LEVEL == 2
constexpr int kVectorBytes = 64;
#elif PYDL_LEVEL == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vuint __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vulong __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vshort __attribute__((vector_size(kVectorBytes / 2)));
// The same, at any address.
typedef float vfloat_any __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint16_t vshort_any __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t vuint_any __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));

// A register of floats that will be rounded to the 8 bits of bf16: the same operators, but formulas
// that take its type may be off by 1e-4.
struct vlow {
  vfloat v;
};
struct vlow_mask {
  vint v;
};
PYDL_HD vlow operator-(vlow a) { return {-a.v}; }
PYDL_HD vlow operator+(vlow a, vlow b) { return {a.v + b.v}; }
PYDL_HD vlow operator-(vlow a, vlow b) { return {a.v - b.v}; }
PYDL_HD vlow operator*(vlow a, vlow b) { return {a.v * b.v}; }
PYDL_HD vlow& operator+=(vlow& a, vlow b) {
  a.v += b.v;
  return a;
}
PYDL_HD vlow_mask operator<(vlow a, vlow b) { return {a.v < b.v}; }
PYDL_HD vlow_mask operator>(vlow a, vlow b) { return {a.v > b.v}; }
PYDL_HD vlow_mask operator<=(vlow a, vlow b) { return {a.v <= b.v}; }

PYDL_HD vfloat select(vint where, vfloat a, vfloat b) { return where ? a : b; }
PYDL_HD vlow select(vlow_mask where, vlow a, vlow b) { return {where.v ? a.v : b.v}; }

// The lanes that one step computes, in the accumulation type: a register of floats, or one double.
template <class T>
struct Lanes {
  using type = vfloat;
  static constexpr int count = kLanes;
};
template <>
struct Lanes<bfloat16> {
  using type = vlow;
  static constexpr int count = kLanes;
};
template <>
struct Lanes<double> {
  using type = double;
  static constexpr int count = 1;
};

PYDL_HD vfloat load(const float* p) { return *reinterpret_cast<const vfloat_any*>(p); }
PYDL_HD void store(float* p, vfloat x) { *reinterpret_cast<vfloat_any*>(p) = x; }
PYDL_HD double load(const double* p) { return *p; }
PYDL_HD void store(double* p, double x) { *p = x; }

// GCC 12 takes conversions between vectors of different widths apart lane by lane; these are one
// instruction or two.
PYDL_HD vuint widen(vshort x) {
#if PYDL_LEVEL == 2
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x);
#elif PYDL_LEVEL == 1
  return (vuint)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vuint);
#endif
}
PYDL_HD vshort narrow(vuint x) {
#if PYDL_LEVEL == 2
  return (vshort)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)x);
#elif PYDL_LEVEL == 1
  const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (vshort)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(x, vshort);
#endif
}

PYDL_HD vlow load(const bfloat16* p) {
  return {(vfloat)(widen(*reinterpret_cast<const vshort_any*>(p)) << 16)};
}
// bf16 in the upper halves, rounded to nearest even; NaN stays NaN. The lower halves are anything.
PYDL_HD vuint round_upper(vlow x) {
  const vuint bits = (vuint)x.v;
#if PYDL_LEVEL == 2
  const __m512i wide = (__m512i)bits, one = _mm512_set1_epi32(1);
  const __mmask16 odd = _mm512_test_epi32_mask(wide, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x.v, (__m512)x.v, _CMP_UNORD_Q);
  __m512i t = _mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff));
  t = _mm512_mask_add_epi32(t, odd, t, one);
  return (vuint)_mm512_mask_or_epi32(t, nan, wide, _mm512_set1_epi32(0x400000));
#else
  const vuint rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (vuint)(x.v != x.v ? (vint)(bits | 0x400000u) : (vint)rounded);
#endif
}
PYDL_HD vshort round_to(const bfloat16*, vlow x) { return narrow(round_upper(x) >> 16); }
PYDL_HD void store(bfloat16* p, vlow x) { *reinterpret_cast<vshort_any*>(p) = round_to(p, x); }

// A register of bf16 as two of floats, those at even places and those at odd ones, and back: fewer
// instructions than keeping the order.
struct Pair {
  vlow even, odd;
};
PYDL_HD Pair load_pair(const bfloat16* p) {
  const vuint both = *reinterpret_cast<const vuint_any*>(p);
  return {{(vfloat)(both << 16)}, {(vfloat)(both & 0xffff0000u)}};
}
PYDL_HD vuint join(vlow even, vlow odd) {
  return (round_upper(even) >> 16) | (round_upper(odd) & 0xffff0000u);
}

PYDL_HD vfloat load(const float16* p) {
#if PYDL_LEVEL == 2
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PYDL_LEVEL == 1
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat x{};
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
PYDL_HD vshort round_f16(vfloat x) {
#if PYDL_LEVEL == 2
  return (vshort)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif PYDL_LEVEL == 1
  return (vshort)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vshort bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = from_float<float16>(x[i]).bits;
  return bits;
#endif
}
PYDL_HD void store(float16* p, vfloat x) { *reinterpret_cast<vshort_any*>(p) = round_f16(x); }

PYDL_HD vshort round_to(const float16*, vfloat x) { return round_f16(x); }

// A register of a formula's type from numbers of its accumulation type.
template <class V, class A>
PYDL_HD V load_as(const A* p) {
  if constexpr (std::is_same_v<V, vlow>) {
    return {load(p)};
  } else {
    return load(p);
  }
}

// Stores past the cache; p is aligned to 64 bytes. Two registers of a 16-bit type share a store.
#if defined(__x86_64__)
#define PYDL_STREAMS 1
PYDL_HD void stream(void* p, vuint x) {
#if PYDL_LEVEL == 2
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)x);
#elif PYDL_LEVEL == 1
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#else
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x);
#endif
}
template <class T>
PYDL_HD void stream64(T* p, const typename Lanes<T>::type* x) {
  if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 64 / kVectorBytes; ++i) stream(p + i * kLanes, (vuint)x[i]);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 64 / kVectorBytes; ++i) {
      const vshort low = round_to(p, x[2 * i]), high = round_to(p, x[2 * i + 1]);
#if PYDL_LEVEL == 2
      const __m512i pair =
          _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pair);
#elif PYDL_LEVEL == 1
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p + i * 16),
                          _mm256_set_m128i((__m128i)high, (__m128i)low));
#else
      const __m128i pair =
          _mm_unpacklo_epi64(_mm_set_epi64x(0, (int64_t)low), _mm_set_epi64x(0, (int64_t)high));
      _mm_stream_si128(reinterpret_cast<__m128i*>(p + i * 8), pair);
#endif
    }
  }
}
PYDL_HD void stream_fence() { _mm_sfence(); }
#else
#define PYDL_STREAMS 0
PYDL_HD void stream_fence() {}
PYDL_HD void stream(void* p, vuint x) { *static_cast<vuint_any*>(p) = x; }
#endif

// Stores kLines cache lines, past the cache or not.
template <int kLines, class T>
PYDL_HD void put(T* p, const typename Lanes<T>::type* x, bool stream) {
  constexpr int kWidth = Lanes<T>::count, kPerLine = 64 / static_cast<int>(sizeof(T));
#if PYDL_STREAMS
  if constexpr (sizeof(T) <= 4) {
    if (stream) {
#pragma GCC unroll 8
      for (int line = 0; line < kLines; ++line)
        stream64(p + line * kPerLine, x + line * (kPerLine / kWidth));
      return;
    }
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < kLines * kPerLine / kWidth; ++r) store(p + r * kWidth, x[r]);
}

PYDL_HD void prefetch(const void* p) { __builtin_prefetch(p); }

// A register of one value; subtracting zeros keeps the sign of -0.
template <>
PYDL_HD vfloat splat<vfloat>(double x) {
  return static_cast<float>(x) - vfloat{};
}

template <>
PYDL_HD vlow splat<vlow>(double x) {
  return {splat<vfloat>(x)};
}

// The first `count` lanes; the rest are 0.
template <class T>
PYDL_HD typename Lanes<T>::type load_some(const T* p, int64_t count) {
  if constexpr (Lanes<T>::count == 1) {
    return load(p);
  } else {
    if (count >= Lanes<T>::count) return load(p);
#if PYDL_LEVEL == 2
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) {
      return (vfloat)_mm512_maskz_loadu_ps(mask, p);
    } else {
      T part[Lanes<T>::count];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(mask, p));
      return load(part);
    }
#else
    T part[Lanes<T>::count] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return load(part);
#endif
  }
}
template <class T>
PYDL_HD void store_some(T* p, typename Lanes<T>::type x, int64_t count) {
  if (count >= Lanes<T>::count) return store(p, x);
#if PYDL_LEVEL == 2
  if constexpr (sizeof(T) <= 4) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, mask, (__m512)x);
    } else {
      _mm256_mask_storeu_epi16(p, mask, (__m256i)round_to(p, x));
    }
    return;
  }
#endif
  T part[Lanes<T>::count];
  store(part, x);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// Places of a register's lanes, known while compiling.
template <class Place, int... I>
PYDL_HD vint places(const Place& place, std::integer_sequence<int, I...>) {
  return vint{place(I)...};
}
using EachLane = std::make_integer_sequence<int, kLanes>;

// Lane l with lane l + kHalf, and so on by halves, in the first lane: a fixed tree.
template <int kHalf, class Meet>
PYDL_HD vfloat meet_lanes(const Meet& meet, vfloat x) {
  if constexpr (kHalf == 0) {
    return x;
  } else {
    const vint from = places([](int l) { return (l + kHalf) % kLanes; }, EachLane{});
    return meet_lanes<kHalf / 2>(meet, meet(x, (vfloat)__builtin_shuffle(x, from)));
  }
}
PYDL_HD double add_lanes(vfloat x) {
  return meet_lanes<kLanes / 2>([](vfloat a, vfloat b) { return a + b; }, x)[0];
}
PYDL_HD double add_lanes(vlow x) { return add_lanes(x.v); }
PYDL_HD double add_lanes(double x) { return x; }
PYDL_HD double lane(vfloat x, int64_t i) { return x[i]; }
PYDL_HD double lane(vlow x, int64_t i) { return x.v[i]; }
PYDL_HD double lane(double x, int64_t) { return x; }

// 1 / d for d in [1, 2^126]: an estimate of 12 to 14 bits and a Newton step, within 1.5 units of
// the last place.
PYDL_HD vfloat reciprocal(vfloat d) {
#if PYDL_LEVEL == 2
  const vfloat r = (vfloat)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}

// NaN passes through: the instructions return their second operand where one is NaN.
PYDL_HD vfloat at_most(vfloat x, double bound) {
  const vfloat b = splat<vfloat>(bound);
#if PYDL_LEVEL == 2
  return (vfloat)_mm512_maskz_min_ps(0xffff, (__m512)b, (__m512)x);
#elif PYDL_LEVEL == 1
  return (vfloat)_mm256_min_ps((__m256)b, (__m256)x);
#else
  return x > b ? b : x;
#endif
}
PYDL_HD vfloat at_least(vfloat x, double bound) {
  const vfloat b = splat<vfloat>(bound);
#if PYDL_LEVEL == 2
  return (vfloat)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)x);
#elif PYDL_LEVEL == 1
  return (vfloat)_mm256_max_ps((__m256)b, (__m256)x);
#else
  return x < b ? b : x;
#endif
}
PYDL_HD vfloat magnitude(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }
PYDL_HD vfloat with_sign_of(vfloat size, vfloat x) {
  return (vfloat)(((vint)size & 0x7fffffff) | ((vint)x & INT32_MIN));
}

PYDL_HD vlow at_most(vlow x, double bound) { return {at_most(x.v, bound)}; }
PYDL_HD vlow at_least(vlow x, double bound) { return {at_least(x.v, bound)}; }
PYDL_HD vlow magnitude(vlow x) { return {magnitude(x.v)}; }
PYDL_HD vlow with_sign_of(vlow size, vlow x) { return {with_sign_of(size.v, x.v)}; }
PYDL_HD vlow reciprocal(vlow d) {
#if PYDL_LEVEL == 2
  return {(vfloat)_mm512_maskz_rcp14_ps(0xffff, (__m512)d.v)};
#else
  return {1.0f / d.v};
#endif
}

// x in units of ln 2: x = n ln 2 + r with |r| <= ln 2 / 2; n comes as a float and as an integer.
struct Reduced {
  vfloat r, n;
  vint exponent;
};
PYDL_HD Reduced reduce_ln2(vfloat x) {
  const float magic =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const vfloat shifted = x * 1.44269504f + magic;
  const vfloat n = shifted - magic;
#if PYDL_LEVEL > 0
  // Fused, the product is exact, and ln 2 in fp32 is off by 2e-9 only.
  const vfloat r = x - n * 0.693147182f;
#else
  const vfloat r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // the first product is exact
#endif
  return {r, n, (vint)shifted - 0x4b400000};
}
PYDL_HD vfloat power_of_two(vint exponent) { return (vfloat)((exponent + 127) << 23); }

// e^x for x <= 88 within 2 units of the last place; 0, subnormals and NaN as they should be. The
// polynomial is a minimax fit on |r| <= ln 2 / 2, relative error 9.3e-8.
PYDL_HD vfloat exponential(vfloat x) {
  const Reduced t = reduce_ln2(at_least(x, -105));
  vfloat p = 0.00829005878f - vfloat{};
  p = p * t.r + 0.0418993129f;
  p = p * t.r + 0.166676478f;
  p = p * t.r + 0.499991394f;
  p = p * t.r + 0.999999702f;
  p = p * t.r + 1.0f;
#if PYDL_LEVEL == 2
  return (vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)t.n);
#else
  const vint half = t.exponent >> 1;
  return p * power_of_two(half) * power_of_two(t.exponent - half);
#endif
}

// e^x - 1 for x <= 80, accurate near 0 too: (e^r - 1 - r) / r^2 is a minimax fit, 1.4e-8 in the
// relative error of e^r - 1.
PYDL_HD vfloat exponential_minus_one(vfloat x) {
  const Reduced t = reduce_ln2(at_least(x, -20));
  vfloat q = 0.00138824975f - vfloat{};
  q = q * t.r + 0.00836664679f;
  q = q * t.r + 0.0416672039f;
  q = q * t.r + 0.166665427f;
  q = q * t.r + 0.499999981f;
  const vfloat scale = power_of_two(t.exponent);
  return scale * (t.r + t.r * t.r * q) + (scale - 1.0f);
}

// The same for bf16, within 8e-5.
PYDL_HD vlow exponential(vlow x) {
#if PYDL_LEVEL == 2
  // 2^t = 2^(t - floor t) 2^(floor t), for any t: both instructions know infinity and NaN.
  const __m512 t = (__m512)(x.v * 1.44269504f);
  const vfloat r = (vfloat)_mm512_maskz_reduce_ps(0xffff, t, 0x01);
  vfloat p = 0.07802446f - vfloat{};
  p = p * r + 0.22606725f;
  p = p * r + 0.69583351f;
  p = p * r + 0.99992522f;
  return {(vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)p, t)};
#else
  const Reduced t = reduce_ln2(at_least(x.v, -105));
  vfloat p = 0.16566829f - vfloat{};
  p = p * t.r + 0.50496326f;
  p = p * t.r + 1.0001642f;
  p = p * t.r + 0.99992807f;
  const vint half = t.exponent >> 1;
  return {p * power_of_two(half) * power_of_two(t.exponent - half)};
#endif
}

// Within 3e-5 of itself, near 0 too.
PYDL_HD vlow exponential_minus_one(vlow x) {
  const Reduced t = reduce_ln2(at_least(x.v, -20));
  vfloat q = 0.04161f - vfloat{};
  q = q * t.r + 0.16749629f;
  q = q * t.r + 0.50001653f;
  const vfloat scale = power_of_two(t.exponent);
  return {scale * (t.r + t.r * t.r * q) + (scale - 1.0f)};
}

}  // namespace PYDL_ISA
}  // namespace pydl
