// Fibers, one for each CUDA thread of a block, and the state of the machine that runs them.
//
// The sanitizers are told of each switch; only barriers and fences order memory for
// ThreadSanitizer, never the scheduler.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ON_CPU_ASAN(...) __VA_ARGS__
#else
#define ON_CPU_ASAN(...)
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define ON_CPU_TSAN(...) __VA_ARGS__
#define ON_CPU_MACHINE __attribute__((no_sanitize("thread"), noinline))
#else
#define ON_CPU_TSAN(...)
#define ON_CPU_MACHINE
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  template <typename I>
  dim3(I a, unsigned b = 1, unsigned c = 1) : x(unsigned(a)), y(b), z(c) {}
};

namespace cuda_on_cpu {

enum class State { running, at_block_barrier, at_warp_barrier, done };

struct Place {  // in the source
  const char* file;
  int line;
};

struct Fiber {
  void* top = nullptr;
  char* stack = nullptr;
  State state = State::done;
  uint3 index{};
  unsigned linear = 0;
  uint32_t mask = 0;  // that it waits with
  Place place{"", 0};
  const void* asan_stack = nullptr;
  size_t asan_size = 0;
  void* tsan = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

struct Warp {
  uint32_t arrived = 0, alive = 0, votes = 0;
  uint64_t slot[32], generation = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  Fiber host;
  Fiber* current = nullptr;
  unsigned count = 0, alive = 0, at_barrier = 0;
  uint64_t generation = 0;
  uint3 grid{}, block{}, block_index{};
  void* dynamic_shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<std::pair<const void*, void*>> variables;
  std::vector<void*> heap;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  bool has_failed = false;
  std::string schedule = "forward";  // or "reverse", "random": of threads and blocks
  std::mt19937 random{1};
  // Addresses that stand for what orders memory.
  char block_sync[2], warp_sync[32][2], fence, begin, end;
};

inline Machine& machine() {
  static Machine it;
  return it;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif

#if defined(__x86_64__)
extern "C" void cuda_on_cpu_switch(void** save, void* load);
__asm__(
    ".text\n.weak cuda_on_cpu_switch\n.type cuda_on_cpu_switch,@function\ncuda_on_cpu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size cuda_on_cpu_switch,.-cuda_on_cpu_switch\n");
#endif

ON_CPU_MACHINE inline void jump(Fiber& from, Fiber& to) {
  ON_CPU_TSAN(__tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);)
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;  // a finished fiber frees its fake stack
  const bool is_last = from.state == State::done && from.stack;
  __sanitizer_start_switch_fiber(is_last ? nullptr : &fake, to.stack ? to.stack : to.asan_stack,
                                 to.stack ? kStack : to.asan_size);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  ON_CPU_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

}  // namespace cuda_on_cpu
