// Marks where the thread-local shared memory of the kernel files begins and ends: linked before and
// after them, because a linker lays thread-local variables out in the order of its inputs.
namespace pydl::emulation {
extern __thread char PYDL_EDGE[64];
__thread char PYDL_EDGE[64];
}  // namespace pydl::emulation
