// CUDA on the CPU: what a .cu file needs to be compiled and run by a host compiler. Blocks run one
// after another in shuffled order; the threads of a block are fibers that run until they wait, in
// shuffled order too, so that a missing barrier shows. cuda.h includes this under PYDL_EMULATION.
#pragma once

#include <math.h>
#include <stddef.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "registry.h"

#if defined(__SANITIZE_ADDRESS__)
#define PYDL_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PYDL_EMULATION_ASAN 1
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// Shared arrays are thread-local so that they, and nothing else of a kernel file, lie side by side
// between shared_begin and shared_end and can be poisoned. ASan sets red zones around static
// storage only, so there they are static and start as zeros.
#if defined(__ELF__) && !defined(PYDL_EMULATION_ASAN)
#define PYDL_EMULATION_POISON 1
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

// Vectors, aligned as CUDA aligns them: a misaligned access fails here as it does there.
#define PYDL_VECTORS(T, name, align2, align4)                        \
  struct name##1 { T x; };                                           \
  struct __align__(align2) name##2 { T x, y; };                      \
  struct name##3 { T x, y, z; };                                     \
  struct __align__(align4) name##4 { T x, y, z, w; };                \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
PYDL_VECTORS(signed char, char, 2, 4)
PYDL_VECTORS(unsigned char, uchar, 2, 4)
PYDL_VECTORS(short, short, 4, 8)
PYDL_VECTORS(unsigned short, ushort, 4, 8)
PYDL_VECTORS(int, int, 8, 16)
PYDL_VECTORS(unsigned, uint, 8, 16)
PYDL_VECTORS(long long, longlong, 16, 16)
PYDL_VECTORS(unsigned long long, ulonglong, 16, 16)
PYDL_VECTORS(float, float, 8, 16)
PYDL_VECTORS(double, double, 16, 16)
#undef PYDL_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
#define threadIdx (::pydl::emulation::running.index)
#define blockIdx (::pydl::emulation::running_block())

namespace pydl::emulation {

// Runs body() once for each thread of each block, the blocks of a cluster at once. Serialised:
// several callers may launch at once.
void launch(int cluster, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*),
            void* body);

struct alignas(16) Seat {
  uint3 index;
  int thread;  // of the cluster, a block after the other
};
extern Seat running;       // copied at every switch
extern uint3 first_block;  // of the cluster
extern int cluster_blocks, block_threads;
inline int cluster_size() { return cluster_blocks; }
inline int cluster_rank() { return cluster_blocks == 1 ? 0 : running.thread / block_threads; }
inline uint3 running_block() {
  return {first_block.x + static_cast<unsigned>(cluster_rank()), first_block.y, first_block.z};
}
// The threads that have not started; none where it takes more than a copy to start one.
extern const Seat *next_seat, *last_seat;
bool leave();

// Ends the running thread; true where the next one may run on the same stack.
inline bool next_thread() {
  if (next_seat == last_seat) return leave();
  running = *next_seat++;
  return true;
}

template <class F>
void launch(int cluster, dim3 grid, dim3 block, size_t shared_bytes, F body) {
  const auto run = [](void* f) {
    do (*static_cast<F*>(f))();
    while (next_thread());
  };
  launch(cluster, grid, block, shared_bytes, run, &body);
}

// Each block has its own; the kernels of clusters keep all that they share there.
void* dynamic_shared();
double cluster_load(const double* mine, int rank);
inline int lane() { return running.thread & 31; }

// All threads of the block that have not exited wait here, at the same kind of barrier; returns how
// many of them came with predicate set.
enum class Barrier { plain, count, all, any };
int block_barrier(Barrier kind, bool predicate);
// The same for all threads of the cluster.
void cluster_sync();

// Every warp-wide operation: waits until all lanes of mask that have not exited called it under the
// same name. The last one then runs combine over what the lanes brought (null for an exited lane);
// a lane's own `mine` may lie on its stack. Emulated tensor-core instructions are built on it.
using Combine = void (*)(unsigned mask, void* const lanes[32]);
void warp_step(const char* name, unsigned mask, void* mine, Combine combine);

struct Exchange {
  uint64_t value;  // in: what this lane offers; out: what its source offered
  int source;
};
void exchange(unsigned mask, void* const lanes[32]);

template <class T>
inline T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  Exchange mine{0, source};
  memcpy(&mine.value, &value, sizeof value);
  warp_step(name, mask, &mine, exchange);
  memcpy(&value, &mine.value, sizeof value);
  return value;
}

// A lane's source as PTX defines shfl: only the low five bits count, and a source outside the
// segment of width lanes means the lane itself, though a butterfly may reach a lower segment.
inline int source_of(int source, int width) {
  return (lane() & ~(width - 1)) | (source & (width - 1));
}
inline int source_up(unsigned delta, int width) {
  const int from = lane() - static_cast<int>(delta & 31u);
  return from < (lane() & ~(width - 1)) ? lane() : from;
}
inline int source_down(unsigned delta, int width) {
  const int from = lane() + static_cast<int>(delta & 31u);
  return from > (lane() | (width - 1)) ? lane() : from;
}
inline int source_xor(int bits, int width) {
  const int from = lane() ^ (bits & 31);
  return from > (lane() | (width - 1)) ? lane() : from;
}

unsigned ballot(const char* name, unsigned mask, bool predicate);

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace pydl::emulation

// Chooses the orders of all later launches; PYDL_EMULATION_SEED sets the first seed.
extern "C" __attribute__((visibility("default"))) void pydl_emulation_seed(uint64_t seed);

inline void __syncthreads() {
  ::pydl::emulation::block_barrier(::pydl::emulation::Barrier::plain, false);
}
inline int __syncthreads_count(int predicate) {
  return ::pydl::emulation::block_barrier(::pydl::emulation::Barrier::count, predicate != 0);
}
inline int __syncthreads_and(int predicate) {
  return ::pydl::emulation::block_barrier(::pydl::emulation::Barrier::all, predicate == 0) == 0;
}
inline int __syncthreads_or(int predicate) {
  return ::pydl::emulation::block_barrier(::pydl::emulation::Barrier::any, predicate != 0) != 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::pydl::emulation::warp_step("__syncwarp", mask, nullptr, nullptr);
}
// Which lanes happen to run together is nobody's promise: the answer is the least a GPU may give.
inline unsigned __activemask() { return 1u << ::pydl::emulation::lane(); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::pydl::emulation::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return ::pydl::emulation::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return ::pydl::emulation::ballot("__all_sync", mask, predicate == 0) == 0;
}

#define PYDL_SHUFFLE(T, name, parameter, source)                                                 \
  inline T name(unsigned mask, T value, parameter, int width = warpSize) {                       \
    return ::pydl::emulation::shuffle(#name "<" #T ">", mask, value, ::pydl::emulation::source); \
  }
#define PYDL_SHUFFLES(T)                                                       \
  PYDL_SHUFFLE(T, __shfl_sync, int from, source_of(from, width))               \
  PYDL_SHUFFLE(T, __shfl_up_sync, unsigned delta, source_up(delta, width))     \
  PYDL_SHUFFLE(T, __shfl_down_sync, unsigned delta, source_down(delta, width)) \
  PYDL_SHUFFLE(T, __shfl_xor_sync, int bits, source_xor(bits, width))
PYDL_SHUFFLES(int)
PYDL_SHUFFLES(unsigned)
PYDL_SHUFFLES(long)
PYDL_SHUFFLES(unsigned long)
PYDL_SHUFFLES(long long)
PYDL_SHUFFLES(unsigned long long)
PYDL_SHUFFLES(float)
PYDL_SHUFFLES(double)
#undef PYDL_SHUFFLES
#undef PYDL_SHUFFLE

// Threads switch only where they wait, so a fence only has to hold the compiler back, and an atomic
// operation is an ordinary one.
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { __threadfence(); }

#define PYDL_ATOMIC(T, name, updated) \
  inline T name(T* at, T value) {     \
    const T old = *at;                \
    *at = updated;                    \
    return old;                       \
  }
#define PYDL_ATOMICS(T)                                  \
  PYDL_ATOMIC(T, atomicAdd, old + value)                 \
  PYDL_ATOMIC(T, atomicMax, old < value ? value : old)   \
  PYDL_ATOMIC(T, atomicMin, value < old ? value : old)   \
  PYDL_ATOMIC(T, atomicExch, value)                      \
  inline T atomicCAS(T* at, T compare, T value) {        \
    return *at == compare ? atomicExch(at, value) : *at; \
  }
PYDL_ATOMICS(int)
PYDL_ATOMICS(unsigned)
PYDL_ATOMICS(unsigned long long)
PYDL_ATOMIC(float, atomicAdd, old + value)
PYDL_ATOMIC(double, atomicAdd, old + value)
#undef PYDL_ATOMICS
#undef PYDL_ATOMIC

// Cache hints of loads and stores say nothing here.
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldca(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
inline void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
inline void __stwb(T* p, T value) {
  *p = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline int __float_as_int(float x) { return ::pydl::emulation::bit_cast<int>(x); }
inline float __int_as_float(int x) { return ::pydl::emulation::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return ::pydl::emulation::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return ::pydl::emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) {
  return ::pydl::emulation::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) { return ::pydl::emulation::bit_cast<double>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }

// glibc declares these names for itself, so they cannot be functions.
#define __expf(x) ::expf(x)
#define __exp10f(x) ::powf(10.0f, x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
#define __powf(x, y) ::powf(x, y)

#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)  // where C23 brings them
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#endif
inline float normcdff(float x) { return 0.5f * erfcf(-0.70710678118654752f * x); }
inline double normcdf(double x) { return 0.5 * erfc(-0.70710678118654752 * x); }

#define PYDL_EXTREMES(T)                           \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
PYDL_EXTREMES(int)
PYDL_EXTREMES(unsigned)
PYDL_EXTREMES(long)
PYDL_EXTREMES(unsigned long)
PYDL_EXTREMES(long long)
PYDL_EXTREMES(unsigned long long)
#undef PYDL_EXTREMES
// A NaN loses against a number, as on the device.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
