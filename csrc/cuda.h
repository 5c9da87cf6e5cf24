// The one switch between nvcc and the CPU emulation of tests/emulation. A .cu file includes this
// and no torch header; under PYDL_EMULATION it is compiled by a host compiler and runs block by
// block.
#pragma once

#include "registry.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define PYDL_HD __host__ __device__ __forceinline__
#define PYDL_DEVICE __device__ __forceinline__
#define PYDL_NOINLINE __device__ __noinline__
#define PYDL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                          \
  do {                                                                                       \
    ::pydl::allow_shared(reinterpret_cast<const void*>(kernel), (shared_bytes));             \
    kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>((stream).handle)>>>( \
        __VA_ARGS__);                                                                        \
    ::pydl::check_launch(#kernel);                                                           \
  } while (0)
// Dynamic shared memory of the running block, aligned for 16-byte accesses.
#define PYDL_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  T* name = reinterpret_cast<T*>(name##_bytes)

namespace pydl {
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail("%s: launch failed: %s", kernel, cudaGetErrorString(error));
}
// More than 48 KiB of dynamic shared memory a kernel must be allowed.
inline void allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    fail("a kernel wants %zu bytes of shared memory: %s", bytes, cudaGetErrorString(error));
  }
}
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}
}  // namespace pydl

#elif defined(PYDL_EMULATION)

#include "emulation.h"  // threadIdx, __syncthreads, shuffles, emulation::launch, ...

#define PYDL_HD inline __attribute__((always_inline))
#define PYDL_DEVICE inline __attribute__((always_inline))
#define PYDL_NOINLINE inline
#define PYDL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::pydl::emulation::launch((grid), (block), (shared_bytes), [&]() { kernel(__VA_ARGS__); })
#define PYDL_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::pydl::emulation::dynamic_shared())

namespace pydl {
inline int multiprocessors() { return 2; }
}  // namespace pydl

#else  // a C++ file of the CPU backend that shares math.h with the .cu files

#define PYDL_HD inline __attribute__((always_inline))

#endif
