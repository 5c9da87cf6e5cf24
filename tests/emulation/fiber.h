// Stacks that one OS thread switches between. At any time one launch uses them.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && defined(__ELF__) && !defined(PYDL_EMULATION_UCONTEXT)
#define PYDL_EMULATION_ASM 1
#else
#include <ucontext.h>
#endif

namespace pydl::emulation {

struct Fiber {
#if defined(PYDL_EMULATION_ASM)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void (*entry)() = nullptr;
  const void* bottom = nullptr;  // of its stack, for ASan
  size_t size = 0;
  void* fake_stack = nullptr;
};

extern Fiber* fiber;  // the running one

// Its entry must not return, nor let an exception out. Fibers are never freed.
Fiber* new_fiber(void (*entry)());
void switch_to(Fiber* to);

}  // namespace pydl::emulation
