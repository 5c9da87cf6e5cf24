// See pool.h. Blocks are multiples of 2 MiB, aligned to 2 MiB.
#include "pool.h"

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace pydl {
namespace {

constexpr size_t kHuge = 2u << 20;

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> waiting;
  PoolInfo info{};
};

// What PYDL_POOL_BYTES asks for, 1 GiB where it is not set.
int64_t first_cap() {
  const char* text = std::getenv("PYDL_POOL_BYTES");
  if (text == nullptr || *text == 0) return int64_t{1} << 30;
  int64_t bytes = 0;
  const char* end = text + std::strlen(text);
  const auto [rest, error] = std::from_chars(text, end, bytes);
  if (error != std::errc{} || rest != end || bytes < 0) {
    throw std::runtime_error(std::string("pydl: PYDL_POOL_BYTES is ") + text +
                             ", wants a number of bytes, 0 or more, in digits");
  }
  return bytes;
}

// Never destroyed: tensors may die after static destructors ran.
Pool& state() {
  static Pool* pool = [] {
    const int64_t cap = first_cap();
    auto* made = new Pool;
    made->info.cap = cap;
    return made;
  }();
  return *pool;
}

void* map_block(size_t bytes) {
  char* start = static_cast<char*>(
      mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  TORCH_CHECK_WITH(OutOfMemoryError, start != MAP_FAILED, "pydl: no memory for ", bytes, " bytes");
  const size_t before = (kHuge - reinterpret_cast<uintptr_t>(start) % kHuge) % kHuge;
  if (before > 0) munmap(start, before);
  if (before < kHuge) munmap(start + before + bytes, kHuge - before);
#ifdef MADV_HUGEPAGE
  madvise(start + before, bytes, MADV_HUGEPAGE);
#endif
  return start + before;
}

void give_back_over_cap(Pool& pool) {
  while (pool.info.cached > pool.info.cap && !pool.waiting.empty()) {
    const auto largest = std::prev(pool.waiting.end());
    munmap(largest->second, largest->first);
    pool.info.cached -= static_cast<int64_t>(largest->first);
    pool.waiting.erase(largest);
  }
}

struct Block {
  void* data;
  size_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  Pool& pool = state();
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    pool.info.in_use -= static_cast<int64_t>(block->bytes);
    pool.info.cached += static_cast<int64_t>(block->bytes);
    pool.waiting.emplace(block->bytes, block->data);
    give_back_over_cap(pool);
  }
  delete block;
}

struct PoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t wanted) override {
    const size_t bytes = (wanted + kHuge - 1) / kHuge * kHuge;
    auto block = std::make_unique<Block>(Block{nullptr, bytes});
    Pool& pool = state();
    {
      const std::lock_guard<std::mutex> lock(pool.mutex);
      ++pool.info.requests;
      // A block up to a quarter too large will do.
      const auto found = pool.waiting.lower_bound(bytes);
      if (found != pool.waiting.end() && found->first <= bytes + bytes / 4) {
        *block = {found->second, found->first};
        pool.info.cached -= static_cast<int64_t>(found->first);
        pool.waiting.erase(found);
        ++pool.info.reused;
      }
      pool.info.in_use += static_cast<int64_t>(block->bytes);
    }
    if (block->data == nullptr) {
      try {
        block->data = map_block(bytes);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(pool.mutex);
        pool.info.in_use -= static_cast<int64_t>(bytes);
        throw;
      }
    }
    void* data = block->data;
    return {data, block.release(), &release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

c10::Allocator* pool() {
  static auto* allocator = new PoolAllocator;
  return allocator;
}

PoolInfo pool_info() {
  Pool& pool = state();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  return pool.info;
}

void pool_empty() {
  Pool& pool = state();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  const int64_t cap = pool.info.cap;
  pool.info.cap = 0;
  give_back_over_cap(pool);
  pool.info.cap = cap;
}

void pool_set_cap(int64_t bytes) {
  Pool& pool = state();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  pool.info.cap = bytes;
  give_back_over_cap(pool);
}

}  // namespace pydl
