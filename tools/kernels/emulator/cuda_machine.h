// The machine behind cuda_on_cpu.h: blocks one by one, each with a fiber for each thread.
//
// Barriers, shuffles and votes are real meetings: a fiber waits in them until the others are there.
// One that can never take place, or whose threads stand at different ones, is an error.
#pragma once

#include "cuda_fibers.h"

namespace cuda_on_cpu {

struct Abandoned {};  // unwinds the other fibers after a failure

ON_CPU_MACHINE inline void wait() {
  Machine& m = machine();
  Fiber* const me = m.current;
  jump(*me, m.host);
  if (m.has_failed) throw Abandoned();
}

ON_CPU_MACHINE inline std::exception_ptr error_of(const std::string& message) {
  return std::make_exception_ptr(std::runtime_error("cuda_on_cpu: " + message));
}

[[noreturn]] ON_CPU_MACHINE inline void fail(const std::string& message) {
  Machine& m = machine();
  if (!m.has_failed) m.error = error_of(message);
  m.has_failed = true;
  throw Abandoned();
}

ON_CPU_MACHINE inline std::string where(const Fiber& f) {
  const char* const names[] = {" running ", " at __syncthreads ", " at a warp operation ",
                               " exited "};
  return "thread (" + std::to_string(f.index.x) + "," + std::to_string(f.index.y) + "," +
         std::to_string(f.index.z) + ")" + names[int(f.state)] + f.place.file + ":" +
         std::to_string(f.place.line);
}

// Everyone alive has arrived; at one and the same barrier, or it is an error.
ON_CPU_MACHINE inline void release_block() {
  Machine& m = machine();
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < m.count; i++) {
    const Fiber& f = m.fibers[i];
    if (f.state != State::at_block_barrier) continue;
    if (!first) first = &f;
    if (f.place.line != first->place.line || std::strcmp(f.place.file, first->place.file))
      fail("divergent __syncthreads: " + where(*first) + " but " + where(f));
  }
  for (unsigned i = 0; i < m.count; i++)
    if (m.fibers[i].state == State::at_block_barrier) m.fibers[i].state = State::running;
  m.at_barrier = 0;
  m.generation++;
}

ON_CPU_MACHINE inline void block_barrier(Place place) {
  Machine& m = machine();
  Fiber* const me = m.current;
  me->place = place;
  ON_CPU_TSAN(char* const sync = &m.block_sync[m.generation & 1]; __tsan_release(sync);)
  me->state = State::at_block_barrier;
  if (++m.at_barrier == m.alive)
    release_block();
  else
    wait();
  ON_CPU_TSAN(__tsan_acquire(sync);)
}

ON_CPU_MACHINE inline void check_mask(uint32_t mask, const Warp& warp, unsigned index) {
  const Machine& m = machine();
  const Fiber& me = *m.current;
  if (!(mask >> (me.linear & 31) & 1)) fail("caller is not in the mask it names: " + where(me));
  if (mask & ~warp.alive) fail("mask names an exited or absent lane: " + where(me));
  for (unsigned l = 0; l < 32; l++) {
    if (!(warp.arrived >> l & 1)) continue;
    const Fiber& other = m.fibers[index * 32 + l];
    if ((other.mask & mask) && other.mask != mask)
      fail("lanes of one warp name different masks: " + where(other) + " and " + where(me));
  }
}

ON_CPU_MACHINE inline void warp_barrier(uint32_t mask, Place place, bool orders_memory) {
  Machine& m = machine();
  Fiber* const me = m.current;
  me->place = place;
  const unsigned index = me->linear / 32;
  Warp& warp = m.warps[index];
  check_mask(mask, warp, index);
  ON_CPU_TSAN(char* const sync = &m.warp_sync[index][warp.generation & 1];
              if (orders_memory) __tsan_release(sync);)
  me->mask = mask;
  me->state = State::at_warp_barrier;
  warp.arrived |= 1u << (me->linear & 31);
  if ((warp.arrived & mask) == mask) {
    for (unsigned i = index * 32; i < index * 32 + 32 && i < m.count; i++)
      if (m.fibers[i].state == State::at_warp_barrier && (mask >> (i & 31) & 1))
        m.fibers[i].state = State::running;
    warp.arrived &= ~mask;
    warp.generation++;
  } else {
    wait();
  }
  ON_CPU_TSAN(if (orders_memory) __tsan_acquire(sync);)
  (void)orders_memory;
}

// Memory that is new and full of NaN; free when the kernel has ended, so that no address is reused.
ON_CPU_MACHINE inline void* fresh(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes ? bytes : 1)) std::abort();
  std::memset(p, 0xff, bytes);
  machine().heap.push_back(p);
  return p;
}

ON_CPU_MACHINE inline void ignore_accesses(bool on) {
  (void)on;
  ON_CPU_TSAN(if (on) AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
              else AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0);)
}

ON_CPU_MACHINE inline void* shared_variable(const void* key, size_t bytes) {
  ignore_accesses(true);
  void* found = nullptr;
  for (const auto& v : machine().variables)
    if (v.first == key) found = v.second;
  if (!found) machine().variables.emplace_back(key, found = fresh(bytes));
  ignore_accesses(false);
  return found;
}

ON_CPU_MACHINE inline void* dynamic_shared() { return machine().dynamic_shared; }

// Nobody may wait for the lane that leaves.
ON_CPU_MACHINE inline void check_exit(const Fiber& me) {
  const Machine& m = machine();
  for (unsigned i = me.linear / 32 * 32; i < me.linear / 32 * 32 + 32 && i < m.count; i++) {
    const Fiber& other = m.fibers[i];
    if (other.state == State::at_warp_barrier && other.mask >> (me.linear & 31) & 1)
      fail("mask names an exited or absent lane: " + where(other));
  }
}

// What a fiber runs.
ON_CPU_MACHINE inline void enter() {
  Machine& m = machine();
  Fiber* const me = m.current;
  ON_CPU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &m.host.asan_stack, &m.host.asan_size);)
  ON_CPU_TSAN(__tsan_acquire(&m.begin);)
  try {
    (*m.body)();
  } catch (const Abandoned&) {
  } catch (...) {
    if (!m.has_failed) m.error = std::current_exception();
    m.has_failed = true;
  }
  ON_CPU_TSAN(__tsan_release(&m.end);)
  me->state = State::done;
  m.alive--;
  m.warps[me->linear / 32].alive &= ~(1u << (me->linear & 31));
  try {
    if (!m.has_failed) check_exit(*me);
    if (!m.has_failed && m.alive && m.at_barrier == m.alive) release_block();
  } catch (const Abandoned&) {
  }
  jump(*me, m.host);
  std::abort();
}

ON_CPU_MACHINE inline void start(Fiber& f) {
#if defined(__SANITIZE_THREAD__)
  if (f.stack) munmap(f.stack, kStack);  // to forget who touched the old stack
  f.stack = nullptr;
#endif
  if (!f.stack)
    f.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  ON_CPU_ASAN(__asan_unpoison_memory_region(f.stack, kStack);)  // frames of a finished fiber
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStack - 64);  // 16-byte aligned
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.top = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
#endif
  ON_CPU_TSAN(f.tsan = __tsan_create_fiber(0);)
  f.state = State::running;
  f.place = {"", 0};
}

ON_CPU_MACHINE inline std::exception_ptr deadlock() {
  const Machine& m = machine();
  std::string message = "deadlock, nobody can go on:";
  int shown = 0, line = -1;
  for (unsigned i = 0; i < m.count && shown < 6; i++) {
    const Fiber& f = m.fibers[i];
    if (f.state == State::done || f.place.line == line) continue;
    message += "\n  " + where(f);
    line = f.place.line;
    shown++;
  }
  return error_of(message);
}

ON_CPU_MACHINE inline void run_block(uint3 index) {
  Machine& m = machine();
  m.block_index = index;
  m.alive = m.count;
  m.at_barrier = 0;
  m.variables.clear();
  m.dynamic_shared = fresh(m.shared_bytes);
  for (Warp& w : m.warps) w.arrived = w.alive = w.votes = 0;
  for (unsigned i = 0; i < m.count; i++) {
    start(m.fibers[i]);
    m.warps[i / 32].alive |= 1u << (i & 31);
  }
  while (m.alive) {
    bool has_moved = false;
    for (unsigned k = 0; k < m.count; k++) {
      Fiber& f = m.fibers[m.order[k]];
      if (f.state != State::running && !(m.has_failed && f.state != State::done)) continue;
      m.current = &f;
      has_moved = true;
      jump(m.host, f);
    }
    if (has_moved) continue;
    m.error = deadlock();
    m.has_failed = true;
  }
  ON_CPU_TSAN(for (unsigned i = 0; i < m.count; i++) __tsan_destroy_fiber(m.fibers[i].tsan);)
}

ON_CPU_MACHINE inline void prepare(dim3 grid, dim3 block, size_t shared_bytes) {
  Machine& m = machine();
  m.count = block.x * block.y * block.z;
  if (!m.count || m.count > 1024) throw std::runtime_error("cuda_on_cpu: bad block size");
  if (!grid.x || grid.x > 0x7fffffff || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535)
    throw std::runtime_error("cuda_on_cpu: bad grid size");
  if (shared_bytes > 48 * 1024)
    throw std::runtime_error("cuda_on_cpu: over 48 KiB of shared memory");
  m.grid = {grid.x, grid.y, grid.z};
  m.block = {block.x, block.y, block.z};
  m.shared_bytes = shared_bytes;
  if (m.fibers.size() < m.count) m.fibers.resize(m.count);
  m.warps.assign((m.count + 31) / 32, Warp{});
  m.order.resize(m.count);
  for (unsigned i = 0; i < m.count; i++) {
    m.order[i] = i;
    m.fibers[i].linear = i;
    m.fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
}

ON_CPU_MACHINE inline void launch(dim3 grid, dim3 block, size_t shared_bytes,
                                  const std::function<void()>& body) {
  Machine& m = machine();
  prepare(grid, block, shared_bytes);
  m.body = &body;
  m.has_failed = false;
  m.error = nullptr;
  m.host.state = State::running;
  // What the host wrote comes before the kernel, what the kernel wrote before what it does next.
  ON_CPU_TSAN(m.host.tsan = __tsan_get_current_fiber(); __tsan_release(&m.begin);)
  ignore_accesses(true);
  std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = unsigned(i);
  const bool is_random = m.schedule == "random";
  if (m.schedule == "reverse") {
    std::reverse(blocks.begin(), blocks.end());
    std::reverse(m.order.begin(), m.order.end());
  }
  if (is_random) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (unsigned i : blocks) {
    if (is_random) std::shuffle(m.order.begin(), m.order.end(), m.random);
    run_block({i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)});
    if (m.has_failed) break;
  }
  ON_CPU_TSAN(__tsan_acquire(&m.end);)
  for (void* p : m.heap) std::free(p);
  m.heap.clear();
  ignore_accesses(false);
  if (m.has_failed) std::rethrow_exception(m.error);
}

}  // namespace cuda_on_cpu
