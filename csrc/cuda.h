// The one switch between nvcc and the CPU emulation of tests/emulation. A .cu file includes this
// and no torch header; under PYDL_EMULATION it is compiled by a host compiler and runs block by
// block.
#pragma once

#include "registry.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

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
// The same for clusters of `cluster` blocks that follow each other, which run at once and read each
// other's shared memory.
#define PYDL_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...)              \
  do {                                                                                             \
    ::pydl::allow_shared(reinterpret_cast<const void*>(kernel), (shared_bytes));                   \
    cudaLaunchAttribute attribute = ::pydl::cluster_attribute(cluster);                            \
    const cudaLaunchConfig_t config = {(grid),         (block),                                    \
                                       (shared_bytes), static_cast<cudaStream_t>((stream).handle), \
                                       &attribute,     (cluster) > 1 ? 1u : 0u};                   \
    cudaLaunchKernelEx(&config, (kernel), __VA_ARGS__);                                            \
    ::pydl::check_launch(#kernel);                                                                 \
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

inline cudaLaunchAttribute cluster_attribute(int cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}
// Whether the device, and the code that was built for it, know clusters, and one has room. Asked
// once: the answers take longer than a launch.
template <class... Args>
bool clusters_fit(void (*kernel)(Args...), int cluster, dim3 block, size_t shared_bytes) {
  if (cluster == 1) return true;
  static std::mutex mutex;
  static std::map<std::tuple<void (*)(Args...), int, int>, bool> known;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, fresh] = known.try_emplace({kernel, cluster, device}, false);
  if (!fresh) return found->second;
  cudaFuncAttributes code;
  int major = 0, count = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major >= 9 && cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90) {
    allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
    cudaLaunchAttribute attribute = cluster_attribute(cluster);
    const cudaLaunchConfig_t config = {
        dim3(static_cast<unsigned>(cluster)), block, shared_bytes, nullptr, &attribute, 1u};
    found->second =
        cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess && count > 0;
  }
  cudaGetLastError();  // an answer of no is no error of the next launch
  return found->second;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
PYDL_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}
PYDL_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster wait here, and see what the others wrote before.
PYDL_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What another block of the cluster has where this one has *mine.
PYDL_DEVICE double cluster_load(const double* mine, int rank) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(mine));
  unsigned there;
  double value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(there) : "memory");
  return value;
}
#else  // no clusters: a block is one of its own
PYDL_DEVICE int cluster_size() { return 1; }
PYDL_DEVICE int cluster_rank() { return 0; }
PYDL_DEVICE void cluster_sync() {}
PYDL_DEVICE double cluster_load(const double* mine, int) { return *mine; }
#endif
}  // namespace pydl

#elif defined(PYDL_EMULATION)

#include "emulation.h"  // threadIdx, __syncthreads, shuffles, emulation::launch, ...

#define PYDL_HD inline __attribute__((always_inline))
#define PYDL_DEVICE inline __attribute__((always_inline))
#define PYDL_NOINLINE inline
#define PYDL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  PYDL_LAUNCH_CLUSTERS(kernel, 1, grid, block, shared_bytes, stream, __VA_ARGS__)
#define PYDL_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  ::pydl::emulation::launch((cluster), (grid), (block), (shared_bytes),               \
                            [&]() { kernel(__VA_ARGS__); })
#define PYDL_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::pydl::emulation::dynamic_shared())

namespace pydl {
inline int multiprocessors() { return 2; }
template <class... Args>
bool clusters_fit(void (*)(Args...), int, dim3, size_t) {
  return true;
}
using emulation::cluster_load;
using emulation::cluster_rank;
using emulation::cluster_size;
using emulation::cluster_sync;
}  // namespace pydl

#else  // a C++ file of the CPU backend that shares math.h with the .cu files

#define PYDL_HD inline __attribute__((always_inline))

#endif
