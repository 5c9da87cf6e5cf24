// Warp-wide steps of sm_80 and later: products of 16 x 16 by 16 x 8 matrices in tensor cores, the
// loads that lay their operands out, and asynchronous copies into shared memory. Layouts as in the
// PTX manual: with g = lane / 4 and t = lane % 4 a lane has rows g and g + 8, columns 2t and 2t + 1
// (and 8 more) of the left operand and of the result.
#pragma once

#include "types.h"

#if defined(PYDL_EMULATION)
#include "tensor_core.h"
#endif

namespace pydl {
inline namespace PYDL_ISA {

#if !defined(PYDL_EMULATION)
PYDL_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

PYDL_DEVICE void mma(bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PYDL_DEVICE void mma(float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Products of fp32 in tensor cores, operands rounded to 11 bits: of 16 x 8 by 8 x 8. With g and t
// as above a lane has rows g and g + 8, columns t and t + 4 of the left operand, and rows t and t +
// 4, column g of the right one.
PYDL_DEVICE uint32_t tf32_of(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
PYDL_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16 bits; lane l brings the address of row l % 8 of matrix l / 8.
PYDL_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PYDL_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes into shared memory, zeros where not `there`; done after copies_commit and copies_wait.
PYDL_DEVICE void copy_async(void* to, const void* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
PYDL_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kLeft of this thread's groups are under way.
template <int kLeft>
PYDL_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
#else
template <class T>
PYDL_DEVICE void mma(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma_16x8x16(c, a, b0, b1, [](uint16_t bits) { return to_float(T{bits}); });
}
PYDL_DEVICE uint32_t tf32_of(float x) { return emulation::tf32_of(x); }
PYDL_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma_16x8x8(c, a, b0, b1);
}
PYDL_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices(r, row, false);
}
PYDL_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices(r, row, true);
}
PYDL_DEVICE void copy_async(void* to, const void* from, bool there) {
  emulation::copy_async(to, from, there);
}
PYDL_DEVICE void copies_commit() { emulation::copies_commit(); }
template <int kLeft>
PYDL_DEVICE void copies_wait() {
  emulation::copies_wait(kLeft);
}
#endif

// Two neighbours as one register.
template <class T>
PYDL_DEVICE uint32_t pack_two(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(low).bits) |
         static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

}  // namespace PYDL_ISA
}  // namespace pydl
