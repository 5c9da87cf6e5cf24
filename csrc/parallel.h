// Work shared among torch's threads, without a torch header in the kernel files.
#pragma once

#include <cstdint>

#include "registry.h"

namespace pydl {

// Defined in module.cpp with at::parallel_for: body(context, begin, end) over pieces of [0, n).
void parallel_run(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// From this many bytes of output on, stores bypass the cache (see pydl.cpu.set_stream_bytes).
extern int64_t stream_bytes;

inline namespace PYDL_ISA {

template <class Body>
inline void parallel_for(int64_t n, int64_t grain, Body&& body) {
  parallel_run(
      n, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      &body);
}

}  // namespace PYDL_ISA
}  // namespace pydl
