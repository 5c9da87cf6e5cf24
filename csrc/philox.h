// Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Element i of a
// tensor takes word i % 4 of the block with counter (i / 4, offset) and key seed, on every backend
// alike.
#pragma once

#include "math.h"

namespace pydl {
inline namespace PYDL_ISA {

struct Dropout {
  const int64_t* seed;  // (seed, offset), read where the work is done
  uint32_t threshold;   // an element is dropped where its word is below; 0 where nothing is
  double scale;         // 1 / (1 - p)
#if defined(__CUDACC__) || defined(PYDL_EMULATION)
  // A thread's own copy keeps the block that its last element came from: neighbours share it.
  mutable int64_t block = -1;
  mutable uint32_t words[4] = {};
#endif
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

PYDL_HD uint32_t pick(const uint32_t (&words)[4], int64_t i) {
  const int lane = static_cast<int>(i & 3);
  return lane == 0 ? words[0] : lane == 1 ? words[1] : lane == 2 ? words[2] : words[3];
}

// The factor of every lane of V, the first at element `index`: 0 where it is dropped, else the
// scale.
#if defined(__CUDACC__) || defined(PYDL_EMULATION)
template <class V>
PYDL_DEVICE V keep(const Dropout& dropout, int64_t index) {
  if (index / 4 != dropout.block) {
    dropout.block = index / 4;
    philox(static_cast<uint64_t>(dropout.block), static_cast<uint64_t>(dropout.seed[1]),
           static_cast<uint64_t>(dropout.seed[0]), dropout.words);
  }
  return pick(dropout.words, index) < dropout.threshold ? V(0) : static_cast<V>(dropout.scale);
}
#else
// Not inlined: the rounds, unrolled into every formula, would take long to compile.
template <class V>
inline __attribute__((noinline)) V keep(const Dropout& dropout, int64_t index) {
  constexpr int kCount = sizeof(V) == kVectorBytes ? kLanes : 1;
  using A = std::conditional_t<kCount == 1, V, float>;
  A factors[kCount];
  uint32_t words[4] = {};
  int64_t block = -1;
  for (int j = 0; j < kCount; ++j) {
    const int64_t i = index + j;
    if (i / 4 != block) {
      block = i / 4;
      philox(static_cast<uint64_t>(block), static_cast<uint64_t>(dropout.seed[1]),
             static_cast<uint64_t>(dropout.seed[0]), words);
    }
    factors[j] = pick(words, i) < dropout.threshold ? A(0) : static_cast<A>(dropout.scale);
  }
  return load_as<V>(factors);
}
#endif

// seed: int64 of (seed, offset), or absent where p is 0.
inline Dropout dropout_of(const char* op, const View& seed, double p) {
  if (p == 0) return {nullptr, 0, 1};
  if (seed.numel != 2 || seed.dtype != DType::i64) fail("%s: seed must be two int64 values", op);
  const double threshold = p * 4294967296.0;
  return {static_cast<const int64_t*>(seed.data),
          static_cast<uint32_t>(threshold < 4294967295.0 ? threshold : 4294967295.0),
          p < 1 ? 1 / (1 - p) : 0};
}

}  // namespace PYDL_ISA
}  // namespace pydl
