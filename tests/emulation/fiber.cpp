#include "fiber.h"

#include <sys/mman.h>

#include <new>

#include "emulation.h"

#if defined(PYDL_EMULATION_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(PYDL_EMULATION_ASM)
// Saves what the ABI makes a callee keep, stores the stack pointer in *from and goes on at `to`.
// The control words of the FPU stay as they are: they belong to the OS thread. It ends in a return,
// not in a jump, because nearly every switch is left at the place where it was entered: the
// processor then predicts it, and the returns that follow.
extern "C" void pydl_emulation_switch(void** from, void* to) asm("pydl_emulation_switch");
asm(R"(
.text
.p2align 4
.hidden pydl_emulation_switch
.type pydl_emulation_switch, @function
pydl_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pydl_emulation_switch, . - pydl_emulation_switch
)");
#endif

namespace pydl::emulation {

Fiber* fiber = nullptr;

namespace {

#if defined(PYDL_EMULATION_ASAN)
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr size_t kGuard = 16 * 1024;  // no access below a stack: an overflow faults at once

Fiber* previous = nullptr;  // the one that ran before

void after_switch() {
#if defined(PYDL_EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &previous->bottom, &previous->size);
#endif
}

[[noreturn]] void begin() {
  after_switch();
  fiber->entry();
  __builtin_unreachable();
}

}  // namespace

void switch_to(Fiber* to) {
  Fiber* from = fiber;
  previous = from;
  fiber = to;
#if defined(PYDL_EMULATION_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
#if defined(PYDL_EMULATION_ASM)
  pydl_emulation_switch(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
  after_switch();
}

Fiber* new_fiber(void (*entry)()) {
  const size_t bytes = kGuard + kStack;
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("emulation: no memory for another stack");
  char* bottom = static_cast<char*>(memory) + kGuard;
  if (mprotect(bottom, kStack, PROT_READ | PROT_WRITE) != 0) {
    munmap(memory, bytes);
    fail("emulation: no memory for another stack");
  }
  // At the upper end of its stack; tops at the same place in every page would meet in the same few
  // sets of the cache.
  static size_t count = 0;
  char* end = bottom + kStack - count++ * 320 % 4096 - (sizeof(Fiber) + 63) / 64 * 64;
  Fiber* made = new (end) Fiber;
  made->entry = entry;
  made->bottom = bottom;
  made->size = kStack;
#if defined(PYDL_EMULATION_ASM)
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // the place of a return address: keeps the ABI's alignment
  *--top = reinterpret_cast<void*>(&begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  made->stack_pointer = top;
#else
  getcontext(&made->context);
  made->context.uc_stack.ss_sp = bottom;
  made->context.uc_stack.ss_size = static_cast<size_t>(end - bottom);
  made->context.uc_link = nullptr;
  makecontext(&made->context, begin, 0);
#endif
  return made;
}

}  // namespace pydl::emulation
