// CUDA C++ kernels on the CPU, for tests: the names of CUDA on the machine of cuda_machine.h.
//
// Shared memory is new for each block and full of NaN. AddressSanitizer sees accesses out of
// bounds, UBSan misaligned ones, ThreadSanitizer races between threads and between blocks.
// Not modelled: warps in lockstep, weak memory, tensor cores, textures, inline PTX.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda_machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_on_cpu {

// threadIdx and its like.
struct Index {
  enum Kind { thread, block, block_size, grid_size };
  struct Component {
    Kind kind;
    int axis;
    ON_CPU_MACHINE operator unsigned() const {
      const Machine& m = machine();
      const uint3* const all[] = {&m.current->index, &m.block_index, &m.block, &m.grid};
      const uint3& it = *all[kind];
      return axis == 0 ? it.x : axis == 1 ? it.y : it.z;
    }
  } x, y, z;
  constexpr explicit Index(Kind kind) : x{kind, 0}, y{kind, 1}, z{kind, 2} {}
};

ON_CPU_MACHINE inline unsigned lane() { return machine().current->linear & 31; }

ON_CPU_MACHINE inline uint64_t exchange(uint32_t mask, uint64_t value, unsigned source,
                                        Place place) {
  Fiber* const me = machine().current;
  Warp& warp = machine().warps[me->linear / 32];
  warp.slot[me->linear & 31] = value;
  warp_barrier(mask, place, false);
  if (!(mask >> source & 1))
    fail("shuffle reads lane " + std::to_string(source) + ", not in the mask: " + where(*me));
  const uint64_t read = warp.slot[source];
  warp_barrier(mask, place, false);
  return read;
}

template <typename T>
T shuffle(uint32_t mask, T value, unsigned source, Place place) {
  static_assert(sizeof(T) <= 8, "one slot of 8 bytes a lane");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

ON_CPU_MACHINE inline uint32_t ballot(uint32_t mask, bool vote, Place place) {
  Warp& warp = machine().warps[machine().current->linear / 32];
  const uint32_t bit = 1u << lane();
  warp.votes = vote ? warp.votes | bit : warp.votes & ~bit;
  warp_barrier(mask, place, false);
  const uint32_t votes = warp.votes & mask;
  warp_barrier(mask, place, false);
  return votes;
}

// Nearest float16, ties to even.
inline uint16_t half_bits(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
  int exponent;
  const float mantissa = std::frexp(size, &exponent);  // in [1/2, 1)
  const int steps = int(std::nearbyint(mantissa * 0x1p11f));
  return sign | uint16_t(((exponent + 13) << 10) + steps);
}

template <typename T, typename F>
T read_modify_write(T* p, F f) {
  using bits_t = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  bits_t* const q = reinterpret_cast<bits_t*>(p);
  ON_CPU_TSAN(__tsan_acquire(&machine().fence);)
  bits_t before = __atomic_load_n(q, __ATOMIC_RELAXED), after;
  T a, b;
  do {
    std::memcpy(&a, &before, sizeof(T));
    b = f(a);
    std::memcpy(&after, &b, sizeof(T));
  } while (
      !__atomic_compare_exchange_n(q, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return a;
}

}  // namespace cuda_on_cpu

inline constexpr cuda_on_cpu::Index threadIdx{cuda_on_cpu::Index::thread};
inline constexpr cuda_on_cpu::Index blockIdx{cuda_on_cpu::Index::block};
inline constexpr cuda_on_cpu::Index blockDim{cuda_on_cpu::Index::block_size};
inline constexpr cuda_on_cpu::Index gridDim{cuda_on_cpu::Index::grid_size};

// The caller's place in the source, as two default arguments.
#define ON_CPU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define ON_CPU_PLACE \
  cuda_on_cpu::Place { file, line }

inline void __syncthreads(ON_CPU_CALLER) { cuda_on_cpu::block_barrier(ON_CPU_PLACE); }
inline void __syncwarp(uint32_t mask = ~0u, ON_CPU_CALLER) {
  cuda_on_cpu::warp_barrier(mask, ON_CPU_PLACE, true);
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, ON_CPU_CALLER) {
  return cuda_on_cpu::shuffle(mask, value, unsigned(source) & 31, ON_CPU_PLACE);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, ON_CPU_CALLER) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ unsigned(bits), ON_CPU_PLACE);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, ON_CPU_CALLER) {
  const unsigned l = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, value, l + by < 32 ? l + by : l, ON_CPU_PLACE);
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, ON_CPU_CALLER) {
  return cuda_on_cpu::ballot(mask, vote, ON_CPU_PLACE);
}
ON_CPU_MACHINE inline void __threadfence() {
  ON_CPU_TSAN(char* const fence = &cuda_on_cpu::machine().fence; __tsan_acquire(fence);
              __tsan_release(fence);)
}
template <typename T, typename V>
T atomicAdd(T* p, V v) {
  return cuda_on_cpu::read_modify_write(p, [=](T a) { return T(a + v); });
}
inline int __ffs(int x) { return __builtin_ffs(x); }

inline void sincospif(float x, float* s, float* c) {
  *s = float(std::sin(M_PI * double(x)));
  *c = float(std::cos(M_PI * double(x)));
}
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(M_PI * x);
  *c = std::cos(M_PI * x);
}
