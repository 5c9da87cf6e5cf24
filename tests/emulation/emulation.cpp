// The barriers and warp steps behind emulation.h. One machine runs one block at a time, or the
// blocks of a cluster, as if they were one whose threads have barriers of their own.
//
// A worker is a fiber that runs threads one after another. A thread that waits keeps its worker,
// and another worker goes on with the threads that have not started; so a kernel that never waits
// is a loop on one stack. The launcher's own stack only starts blocks and cleans up after failures.
#include "emulation.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#if defined(PYDL_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#endif

dim3 blockDim, gridDim;

namespace pydl::emulation {

Seat running;
uint3 first_block;
int cluster_blocks = 1, block_threads = 1;
const Seat *next_seat, *last_seat;

#if defined(PYDL_EMULATION_POISON)
// edge.cpp, linked before and after the kernel files.
extern __thread char shared_begin[64], shared_end[64];
#endif

namespace {

constexpr int kMaxBlock = 1024, kMaxCluster = 8, kMaxThreads = kMaxBlock * kMaxCluster;
constexpr int kClusterBarrier = 4;  // the kinds before are a block's
constexpr size_t kMaxShared = 227 * 1024;
constexpr size_t kCanary = 256;  // bytes after the dynamic shared memory that nobody may change

// Thrown where threads wait, to unwind them after another one failed.
struct Abandon {};

// Lanes that wait for each other. Steps of one warp that are open at once have disjoint masks, or
// else nobody can go on.
struct Step {
  const char* name;
  Combine combine;
  unsigned mask, arrived;
};
struct Warp {
  unsigned exited;
  int open;
  Step steps[32];
};

struct Machine {
  std::mutex one_launch;
  Fiber main;
  std::vector<Fiber*> idle;

  void (*run)(void*) = nullptr;
  void* body = nullptr;
  std::exception_ptr error;
  bool unwinding = false;

  int threads = 0, exited = 0, exited_of[kMaxCluster] = {};  // of all, and of each block
  // Until a thread of the block waits, next_thread starts one after the other and the seats tell
  // who has exited. From then on `waited` holds and the seats that are left are moved here.
  bool waited = false;
  const Seat *first_seat, *next_seat, *last_seat;
  int newest = 0;            // how far back among the ready threads to choose
  uint64_t ready_first = 0;  // of 2^32: how often a ready thread goes before a new one
  int ready_count = 0;
  uint16_t ready[kMaxThreads];
  Fiber* fiber_of[kMaxThreads] = {};  // of the threads that wait or are ready
  void* brought[kMaxThreads];
  Seat all[kMaxThreads];
  Seat order[2 * kMaxThreads];  // the starting order, twice, so that it can begin anywhere
  Warp warps[kMaxThreads / 32];
  // By kind of barrier and block; the cluster's is its first block's.
  int arrived[kClusterBarrier + 1][kMaxCluster] = {}, votes[kClusterBarrier + 1][kMaxCluster] = {};
  int barrier_result[kMaxCluster] = {};

  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;

  uint64_t seed = 0, launches = 0, random_state = 1;

  Machine() {
    const char* given = getenv("PYDL_EMULATION_SEED");
    seed = given == nullptr ? 20250701u : strtoull(given, nullptr, 0);
  }

  uint64_t random() {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1dull;
  }
  uint32_t random_bits() { return static_cast<uint32_t>(random() >> 32); }
  int random_below(int n) {
    return static_cast<int>(static_cast<uint64_t>(random_bits()) * static_cast<uint32_t>(n) >> 32);
  }
};

Machine machine;

const char* const kBarriers[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                 "__syncthreads_or", "cluster_sync"};

Fiber* next();

void work() {
  for (;;) {
    try {
      machine.run(machine.body);
    } catch (const Abandon&) {
    } catch (...) {
      machine.error = std::current_exception();
    }
    machine.idle.push_back(fiber);
    Fiber* to = machine.error != nullptr || machine.unwinding ? &machine.main : next();
    if (to != fiber) switch_to(to);
  }
}

Fiber* idle_fiber() {
  if (machine.idle.empty()) return new_fiber(work);
  Fiber* worker = machine.idle.back();
  machine.idle.pop_back();
  return worker;
}

bool starts_next() {
  Machine& m = machine;
  if (m.next_seat == m.last_seat) return false;
  return m.ready_count == 0 || m.random_bits() >= m.ready_first;
}

void exit_thread(int thread) {
  ++machine.exited;
  ++machine.exited_of[thread / block_threads];
  machine.warps[thread / 32].exited |= 1u << (thread % 32);
}

// Before the first thread of a block waits.
void begin_waiting() {
  Machine& m = machine;
  m.waited = true;
  m.next_seat = std::exchange(next_seat, last_seat);
  m.last_seat = last_seat;
  for (const Seat* seat = m.first_seat; seat < m.next_seat - 1; ++seat) exit_thread(seat->thread);
}

// Chooses who runs next; the launcher where nobody can.
Fiber* next() {
  Machine& m = machine;
  if (starts_next()) {
    running = *m.next_seat++;
    return idle_fiber();
  }
  if (m.ready_count == 0) return &m.main;
  const int from = std::max(0, m.ready_count - m.newest);
  const int chosen = from + m.random_below(m.ready_count - from);
  const int thread = m.ready[chosen];
  m.ready[chosen] = m.ready[--m.ready_count];
  running = m.all[thread];
  return std::exchange(m.fiber_of[thread], nullptr);
}

void wait() {
  const int thread = running.thread;
  // Before the entry is made: should no stack be left, this thread fails like any other.
  Fiber* to = next();
  machine.fiber_of[thread] = fiber;
  switch_to(to);
  if (machine.unwinding) throw Abandon{};
}

void make_ready(int thread) {
  machine.ready[machine.ready_count++] = static_cast<uint16_t>(thread);
}

// Whether all have come to the barrier that have not exited.
bool met(int kind, int block) {
  const Machine& m = machine;
  if (kind == kClusterBarrier) return m.arrived[kind][0] + m.exited == m.threads;
  return m.arrived[kind][block] + m.exited_of[block] == block_threads;
}

// Lets all go that wait at the barrier; the current thread is the last to come, or has exited.
void finish_barrier(int kind, int block) {
  Machine& m = machine;
  const bool whole = kind == kClusterBarrier;
  m.barrier_result[block] = m.votes[kind][block];
  m.arrived[kind][block] = m.votes[kind][block] = 0;
  const Seat* from = m.order + m.random_below(m.threads);
  for (int i = 0; i < m.threads; ++i) {
    const int thread = from[i].thread;
    if (m.fiber_of[thread] != nullptr && (whole || thread / block_threads == block)) {
      make_ready(thread);
    }
  }
}

void finish_step(int warp_index, int open_index) {
  Machine& m = machine;
  Warp& warp = m.warps[warp_index];
  const Step step = warp.steps[open_index];
  warp.steps[open_index] = warp.steps[--warp.open];
  void* lanes[32];
  const int turn = static_cast<int>(m.random_bits() & 31u);
  for (int i = 0; i < 32; ++i) {
    const int lane = i ^ turn, thread = 32 * warp_index + lane;
    const bool here = step.arrived >> lane & 1u;
    lanes[lane] = here ? m.brought[thread] : nullptr;
    if (here && thread != running.thread) make_ready(thread);
  }
  if (step.combine != nullptr) step.combine(step.mask, lanes);
}

bool complete(const Warp& warp, const Step& step) {
  return ((step.arrived | warp.exited) & step.mask) == step.mask;
}

// How many threads wait where, for a message.
std::string situation() {
  const Machine& m = machine;
  std::map<std::string, int> counts;
  for (int kind = 0; kind <= kClusterBarrier; ++kind) {
    for (const int arrived : m.arrived[kind])
      counts[std::string("wait at ") + kBarriers[kind]] += arrived;
  }
  for (int w = 0; 32 * w < m.threads; ++w) {
    for (int i = 0; i < m.warps[w].open; ++i) {
      const Step& step = m.warps[w].steps[i];
      char where[96];
      snprintf(where, sizeof where, "wait at %s with mask 0x%08x", step.name, step.mask);
      counts[where] += __popc(step.arrived);
    }
  }
  counts["have exited"] = m.exited;
  std::string text;
  for (const auto& [where, count] : counts) {
    if (count == 0) continue;
    if (!text.empty()) text += ", ";
    text += std::to_string(count) + " " + where;
  }
  return text;
}

void draw_order(bool whole_warps) {
  Machine& m = machine;
  int order[kMaxThreads];
  for (int t = 0; t < m.threads; ++t) order[t] = t;
  const auto shuffle = [&](int begin, int end) {
    for (int i = end - 1; i > begin; --i)
      std::swap(order[i], order[begin + m.random_below(i - begin + 1)]);
  };
  if (whole_warps) {
    for (int w = m.threads / 32 - 1; w > 0; --w) {
      const int other = m.random_below(w + 1);
      if (other != w) std::swap_ranges(order + 32 * w, order + 32 * w + 32, order + 32 * other);
    }
    for (int t = 0; t < m.threads; t += 32) shuffle(t, std::min(t + 32, m.threads));
  } else {
    shuffle(0, m.threads);
  }
  for (int i = 0; i < m.threads; ++i) m.order[i] = m.order[i + m.threads] = m.all[order[i]];
}

void begin_block() {
  Machine& m = machine;
  // All as far as the next barrier; anything between; or, most telling, a warp as far as it gets.
  const uint32_t policy = m.random_bits() >> 30;
  m.ready_first = policy == 0 ? 0 : policy == 1 ? m.random_bits() : uint64_t{1} << 32;
  m.newest = policy == 0 ? kMaxThreads : policy == 1 ? 1 + m.random_below(m.threads) : 1;
  // Where threads are known to wait, an order for each block costs little beside the switches.
  if (m.waited) draw_order(policy > 1);
  m.waited = false;
  m.exited = 0;
  m.ready_count = 0;
  m.first_seat = m.next_seat = m.last_seat = m.order + m.random_below(m.threads);
  last_seat = m.first_seat + m.threads;
  next_seat = m.first_seat + 1;
  running = *m.first_seat;
  for (int w = 0; 32 * w < m.threads; ++w) {
    const int lanes = std::min(32, m.threads - 32 * w);
    m.warps[w].exited = lanes == 32 ? 0u : ~0u << lanes;  // the lanes that do not exist
    m.warps[w].open = 0;
  }
  memset(m.arrived, 0, sizeof m.arrived);
  memset(m.votes, 0, sizeof m.votes);
  memset(m.exited_of, 0, sizeof m.exited_of);
}

// Unwinds the threads that wait, so that their stacks are free and clean, and raises.
[[noreturn]] void give_up(std::exception_ptr error) {
  Machine& m = machine;
  m.unwinding = true;
  for (int t = 0; t < m.threads; ++t)
    if (m.fiber_of[t] != nullptr) switch_to(std::exchange(m.fiber_of[t], nullptr));
  m.unwinding = false;
  m.error = nullptr;
  std::rethrow_exception(error);
}

void run_block() {
  Machine& m = machine;
  begin_block();
  switch_to(idle_fiber());
  if (m.error == nullptr && m.exited != m.threads) {
    try {
      fail("block (%u, %u, %u): no thread can go on: of %d threads %s", first_block.x,
           first_block.y, first_block.z, m.threads, situation().c_str());
    } catch (...) {
      m.error = std::current_exception();
    }
  }
  if (m.error != nullptr) give_up(m.error);
}

void check(int cluster, dim3 grid, dim3 block, size_t shared_bytes) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    fail("launch: a grid of %u x %u x %u blocks; CUDA takes 1 to 2^31-1 x 65535 x 65535", grid.x,
         grid.y, grid.z);
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > kMaxBlock) {
    fail("launch: a block of %u x %u x %u threads; CUDA takes 1 to 1024 in all, z up to 64",
         block.x, block.y, block.z);
  }
  if (cluster < 1 || cluster > kMaxCluster || grid.x % static_cast<unsigned>(cluster) != 0 ||
      (cluster > 1 && threads % 32 != 0)) {
    fail(
        "launch: clusters of %d blocks of %u threads in a grid of %u; CUDA takes 1 to %d blocks, "
        "which divide the grid, and the emulation whole warps",
        cluster, static_cast<unsigned>(threads), grid.x, kMaxCluster);
  }
  if (shared_bytes > kMaxShared) {
    fail("launch: %zu bytes of dynamic shared memory; the largest GPUs have %zu", shared_bytes,
         kMaxShared);
  }
}

// Of a block of the cluster; a canary follows it.
unsigned char* shared_of(int block) {
  return machine.shared + static_cast<size_t>(block) * (kMaxShared + kCanary);
}

void set_shared(size_t bytes) {
  Machine& m = machine;
  if (m.shared == nullptr) {
    m.shared =
        static_cast<unsigned char*>(aligned_alloc(128, kMaxCluster * (kMaxShared + kCanary)));
    if (m.shared == nullptr) fail("emulation: no memory for shared memory");
  }
  m.shared_bytes = bytes;
  for (int block = 0; block < cluster_blocks; ++block) {
    unsigned char* const own = shared_of(block);
#if defined(PYDL_EMULATION_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(own, kMaxShared + kCanary);
    ASAN_POISON_MEMORY_REGION(own + bytes, kMaxShared + kCanary - bytes);
#else
    memset(own + bytes, 0xa5, kCanary);
#endif
  }
}

#if defined(PYDL_EMULATION_POISON)
// The arrays in shared memory of all kernels.
std::pair<char*, size_t> static_shared() {
  char* begin = shared_begin + sizeof shared_begin;
  return {begin, begin < shared_end ? static_cast<size_t>(shared_end - begin) : 0};
}
#endif

// A float or double made of 0xff bytes is a NaN.
void poison_shared(uint64_t block_number) {
  for (int block = 0; block < cluster_blocks; ++block) {
    memset(shared_of(block), 0xff, machine.shared_bytes);
  }
#if defined(PYDL_EMULATION_POISON)
  // They may be large, and most blocks resemble the first ones.
  if ((block_number & (block_number - 1)) != 0) return;
  const auto [begin, bytes] = static_shared();
  memset(begin, 0xff, bytes);
#else
  (void)block_number;
#endif
}

void check_canary(uint64_t block_number) {
#if defined(PYDL_EMULATION_POISON)
  // There is one of each for all blocks of a cluster.
  const auto [begin, bytes] = static_shared();
  if (cluster_blocks > 1 && (block_number & (block_number - 1)) == 0) {
    for (size_t i = 0; i < bytes; ++i) {
      if (static_cast<unsigned char>(begin[i]) != 0xff) {
        fail("the kernel of a cluster wrote to static shared memory; here it may be dynamic only");
      }
    }
  }
#else
  (void)block_number;
#endif
#if !defined(PYDL_EMULATION_ASAN)
  const Machine& m = machine;
  for (int block = 0; block < cluster_blocks; ++block) {
    const unsigned char* after = shared_of(block) + m.shared_bytes;
    if (after[0] == 0xa5 && memcmp(after, after + 1, kCanary - 1) == 0) continue;
    for (size_t i = 0; i < kCanary; ++i) {
      if (after[i] != 0xa5) {
        fail("block (%u, %u, %u): wrote byte %zu of %zu bytes of dynamic shared memory",
             first_block.x + static_cast<unsigned>(block), first_block.y, first_block.z,
             m.shared_bytes + i, m.shared_bytes);
      }
    }
  }
#endif
}

uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
  while (b != 0) a = std::exchange(b, a % b);
  return a;
}

}  // namespace

void launch(int cluster, dim3 grid, dim3 block, size_t shared_bytes, void (*run)(void*),
            void* body) {
  check(cluster, grid, block, shared_bytes);
  Machine& m = machine;
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.random_state = (m.seed + 1) * 0x9e3779b97f4a7c15ull ^ (++m.launches * 0xd1342543de82ef95ull);
  if (m.random_state == 0) m.random_state = 1;
  for (int i = 0; i < 4; ++i) m.random();  // neighbouring seeds begin alike
  m.run = run;
  m.body = body;
  fiber = &m.main;
  cluster_blocks = cluster;
  block_threads = static_cast<int>(block.x * block.y * block.z);
  m.threads = cluster * block_threads;
  blockDim = block;
  gridDim = grid;
  for (int t = 0; t < m.threads; ++t) {
    const unsigned linear = static_cast<unsigned>(t % block_threads);
    m.all[t] = {{linear % block.x, linear / block.x % block.y, linear / block.x / block.y}, t};
  }
  m.waited = true;  // a new order for the first block
  set_shared(shared_bytes);

  // Steps of a stride that has no factor in common with the number of clusters visit each once.
  const unsigned along = grid.x / static_cast<unsigned>(cluster);
  const uint64_t blocks = uint64_t{along} * grid.y * grid.z;
  uint64_t at = m.random() % blocks, stride = 1 + m.random() % blocks;
  while (greatest_common_divisor(stride, blocks) != 1) ++stride;
  stride %= blocks;
  for (uint64_t i = 0; i < blocks; ++i) {
    first_block = {static_cast<unsigned>(at % along) * static_cast<unsigned>(cluster),
                   static_cast<unsigned>(at / along % grid.y),
                   static_cast<unsigned>(at / along / grid.y)};
    poison_shared(i);
    run_block();
    check_canary(i);
    at = at < blocks - stride ? at + stride : at - (blocks - stride);
  }
}

bool leave() {
  Machine& m = machine;
  if (!m.waited) {
    m.exited = m.threads;
    return false;
  }
  exit_thread(running.thread);
  const int warp_index = running.thread / 32;
  const Warp& warp = m.warps[warp_index];
  for (int i = warp.open - 1; i >= 0; --i)
    if (complete(warp, warp.steps[i])) finish_step(warp_index, i);
  const int block = running.thread / block_threads;
  for (int kind = 0; kind <= kClusterBarrier; ++kind) {
    const int of = kind == kClusterBarrier ? 0 : block;
    if (m.arrived[kind][of] != 0 && met(kind, of)) finish_barrier(kind, of);
  }
  if (!starts_next()) return false;
  running = *m.next_seat++;
  return true;
}

namespace {

int meet(int kind, int block, bool predicate) {
  Machine& m = machine;
  if (!m.waited) begin_waiting();
  ++m.arrived[kind][block];
  m.votes[kind][block] += predicate;
  if (met(kind, block)) {
    finish_barrier(kind, block);
  } else {
    wait();
  }
  return m.barrier_result[block];
}

}  // namespace

int block_barrier(Barrier kind, bool predicate) {
  return meet(static_cast<int>(kind), cluster_rank(), predicate);
}

void cluster_sync() { meet(kClusterBarrier, 0, false); }

void warp_step(const char* name, unsigned mask, void* mine, Combine combine) {
  Machine& m = machine;
  if (!m.waited) begin_waiting();
  const int warp_index = running.thread / 32, lane = running.thread % 32;
  Warp& warp = m.warps[warp_index];
  if ((mask >> lane & 1u) == 0) {
    fail("block (%u, %u, %u): lane %d of warp %d calls %s with mask 0x%08x, which lacks it",
         blockIdx.x, blockIdx.y, blockIdx.z, lane, warp_index, name, mask);
  }
  m.brought[running.thread] = mine;
  int i = 0;
  while (i < warp.open && !(warp.steps[i].mask == mask && warp.steps[i].name == name &&
                            warp.steps[i].combine == combine)) {
    ++i;
  }
  if (i == warp.open) warp.steps[warp.open++] = {name, combine, mask, 0};
  warp.steps[i].arrived |= 1u << lane;
  if (complete(warp, warp.steps[i])) {
    finish_step(warp_index, i);
  } else {
    wait();
  }
}

void exchange(unsigned mask, void* const lanes[32]) {
  uint64_t values[32];
  for (int l = 0; l < 32; ++l)
    if (lanes[l] != nullptr) values[l] = static_cast<Exchange*>(lanes[l])->value;
  for (int l = 0; l < 32; ++l) {
    if (lanes[l] == nullptr) continue;
    Exchange& lane = *static_cast<Exchange*>(lanes[l]);
    if (lanes[lane.source] == nullptr) {
      fail("block (%u, %u, %u): lane %d of warp %d shuffles from lane %d, which %s the mask 0x%08x",
           blockIdx.x, blockIdx.y, blockIdx.z, l, running.thread / 32, lane.source,
           mask >> lane.source & 1u ? "has exited or does not exist in spite of" : "is not in",
           mask);
    }
    lane.value = values[lane.source];
  }
}

unsigned ballot(const char* name, unsigned mask, bool predicate) {
  struct Vote {
    bool predicate;
    unsigned all;
  } vote{predicate, 0};
  warp_step(name, mask, &vote, [](unsigned, void* const lanes[32]) {
    unsigned all = 0;
    for (int l = 0; l < 32; ++l)
      if (lanes[l] != nullptr && static_cast<Vote*>(lanes[l])->predicate) all |= 1u << l;
    for (int l = 0; l < 32; ++l)
      if (lanes[l] != nullptr) static_cast<Vote*>(lanes[l])->all = all;
  });
  return vote.all;
}

void* dynamic_shared() { return shared_of(cluster_rank()); }

double cluster_load(const double* mine, int rank) {
  const auto* at = reinterpret_cast<const unsigned char*>(mine);
  const unsigned char* own = shared_of(cluster_rank());
  if (at < own || at + sizeof *mine > own + machine.shared_bytes || rank < 0 ||
      rank >= cluster_blocks) {
    fail("cluster_load: wants dynamic shared memory of block 0 to %d, got block %d's",
         cluster_blocks - 1, rank);
  }
  double value;
  memcpy(&value, shared_of(rank) + (at - own), sizeof value);
  return value;
}

}  // namespace pydl::emulation

extern "C" void pydl_emulation_seed(uint64_t seed) {
  ::pydl::emulation::Machine& m = ::pydl::emulation::machine;
  const std::lock_guard<std::mutex> lock(m.one_launch);
  m.seed = seed;
  m.launches = 0;
}
