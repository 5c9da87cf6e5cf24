// Emulated twins of what mma.cuh asks of sm_80: a product in tensor cores, ldmatrix, and
// asynchronous copies, whose bytes arrive only where they are waited for.
#pragma once

#include <vector>

#include "emulation.h"

namespace pydl::emulation {

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
  float (*number)(uint16_t);
};

// Collects the operands of all lanes as matrices, multiplies, and hands each lane its part.
inline void multiply_matrices(unsigned, void* const lanes[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] =
            p.number(static_cast<uint16_t>(p.a[r] >> (16 * half)));
        if (r < 2) {
          b[2 * t + half + 8 * r][g] = p.number(static_cast<uint16_t>(p.b[r] >> (16 * half)));
        }
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const c = static_cast<Product*>(lanes[lane])->c;
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[r] += sum;
    }
  }
}

template <class Number>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Number) {
  Product mine{c, a, {b0, b1}, +[](uint16_t bits) { return Number{}(bits); }};
  warp_step("mma", 0xffffffffu, &mine, multiply_matrices);
}

// Rounds to 11 bits, halves away from zero.
inline uint32_t tf32_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x007fffffu ? 0x7fffe000u : bits;
  return (bits + 0x1000u) & ~0x1fffu;
}
inline float tf32_number(uint32_t bits) {
  bits &= ~0x1fffu;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline void multiply_matrices_tf32(unsigned, void* const lanes[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32_number(p.a[r]);
      if (r < 2) b[t + 4 * r][g] = tf32_number(p.b[r]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const c = static_cast<Product*>(lanes[lane])->c;
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      c[r] += sum;
    }
  }
}
inline void mma_16x8x8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product mine{c, a, {b0, b1}, nullptr};
  warp_step("mma.tf32", 0xffffffffu, &mine, multiply_matrices_tf32);
}

struct Matrices {
  uint32_t* to;
  const void* row;
  bool transposed;
};
inline void gather_matrices(unsigned, void* const lanes[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const Matrices& mine = *static_cast<Matrices*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      uint16_t two[2];
      for (int half = 0; half < 2; ++half) {
        const int row = mine.transposed ? 2 * t + half : g;
        const int column = mine.transposed ? g : 2 * t + half;
        const auto* from =
            static_cast<const uint16_t*>(static_cast<Matrices*>(lanes[8 * m + row])->row);
        two[half] = from[column];
      }
      mine.to[m] = two[0] | static_cast<uint32_t>(two[1]) << 16;
    }
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  Matrices mine{r, row, transposed};
  warp_step(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &mine, gather_matrices);
}

// A thread's copies under way, each with the number of its group.
struct Copy {
  void* to;
  const void* from;
  bool there;
  int group;
};
struct Copies {
  std::vector<Copy> pending;
  int group = 0;
};
inline Copies& copies() {
  static Copies of_thread[1024];  // not thread-local, where shared memory lies; launches take turns
  return of_thread[running.thread];
}
inline void copy_async(void* to, const void* from, bool there) {
  memset(to, 0xff, 16);
  copies().pending.push_back({to, from, there, copies().group});
}
inline void copies_commit() { ++copies().group; }
inline void copies_wait(int left) {
  Copies& mine = copies();
  std::vector<Copy> later;
  for (const Copy& copy : mine.pending) {
    if (copy.group >= mine.group - left) {
      later.push_back(copy);
    } else if (copy.there) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
  mine.pending.swap(later);
}

}  // namespace pydl::emulation
