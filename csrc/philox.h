// Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Element i of a tensor
// takes word i % 4 of the block with counter (i / 4, offset) and key seed, on every backend alike.
#pragma once

#include "math.h"

namespace pydl {
inline namespace PYDL_ISA {

struct Dropout {
  uint64_t seed, offset;
  uint32_t threshold;  // an element is dropped where its word is below
  double scale;        // 1 / (1 - p)
};

PYDL_HD void philox(uint64_t counter, uint64_t offset, uint64_t seed, uint32_t (&out)[4]) {
  uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32);
  uint32_t c = static_cast<uint32_t>(offset), d = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = static_cast<uint64_t>(a) * 0xD2511F53u;
    const uint64_t right = static_cast<uint64_t>(c) * 0xCD9E8D57u;
    a = static_cast<uint32_t>(right >> 32) ^ b ^ k0;
    c = static_cast<uint32_t>(left >> 32) ^ d ^ k1;
    b = static_cast<uint32_t>(right);
    d = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

// factors[j] is 0 where element first + j is dropped, else the scale.
template <int kCount, class A>
PYDL_HD void dropout_factors(const Dropout& dropout, int64_t first, A (&factors)[kCount]) {
  uint32_t words[4] = {};
  int64_t block = -1;
  for (int j = 0; j < kCount; ++j) {
    const int64_t i = first + j;
    if (i / 4 != block) {
      block = i / 4;
      philox(static_cast<uint64_t>(block), dropout.offset, dropout.seed, words);
    }
    const int lane = static_cast<int>(i & 3);
    const uint32_t word = lane == 0 ? words[0] : lane == 1 ? words[1] : lane == 2 ? words[2] : words[3];
    factors[j] = word < dropout.threshold ? A(0) : static_cast<A>(dropout.scale);
  }
}

#if defined(__CUDACC__)
#define PYDL_KEEP PYDL_HD
#else
#define PYDL_KEEP inline __attribute__((noinline))  // rounds unrolled into every formula take long to compile
#endif
// The factor of every lane of V, the first at element `index`.
template <class V>
PYDL_KEEP V keep(const Dropout& dropout, int64_t index) {
#if !defined(__CUDACC__) && !defined(PYDL_EMULATION)
  if constexpr (std::is_same_v<V, vfloat>) {
    float factors[kLanes];
    dropout_factors(dropout, index, factors);
    return load(factors);
  } else
#endif
  {
    V factor[1];
    dropout_factors(dropout, index, factor);
    return factor[0];
  }
}

// seed: int64 of (seed, offset), or absent where p is 0.
inline Dropout dropout_of(const char* op, const View& seed, double p) {
  Dropout dropout{0, 0, 0, 1};
  if (p == 0) return dropout;
  if (seed.numel != 2 || seed.dtype != DType::i64) fail("%s: seed must be two int64 values", op);
  const int64_t* words = static_cast<const int64_t*>(seed.data);
  dropout.seed = static_cast<uint64_t>(words[0]);
  dropout.offset = static_cast<uint64_t>(words[1]);
  dropout.threshold = static_cast<uint32_t>(p * 4294967296.0 < 4294967295.0 ? p * 4294967296.0 : 4294967295.0);
  dropout.scale = p < 1 ? 1 / (1 - p) : 0;
  return dropout;
}

}  // namespace PYDL_ISA
}  // namespace pydl
