// A pool of large CPU blocks. Touching a fresh 64 MiB costs more than most elementwise kernels
// take, because the system maps and clears page by page and gives them back at the next free;
// blocks kept here are in huge pages and stay mapped. Capped, thread-safe, emptied by a call, and
// off where the cap is 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace c10 {
struct Allocator;
}

namespace pydl {

struct PoolInfo {
  int64_t cap;       // bytes that may wait for reuse
  int64_t cached;    // bytes that wait
  int64_t in_use;    // bytes handed out
  int64_t reused;    // requests served from the pool
  int64_t requests;  // requests in all
};

c10::Allocator* pool();
PoolInfo pool_info();
void pool_empty();
void pool_set_cap(int64_t bytes);  // gives back what is over

constexpr int64_t kPoolMinimum = 1 << 20;  // smaller tensors come from torch's own allocator

}  // namespace pydl
