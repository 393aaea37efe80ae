// One kernel source, two compilers: nvcc for the device, any C++ compiler for tests on the host.
//
// Where nvcc does not compile, tools/kernels/emulator stands in for the device. Shared memory
// and launches go through macros, because the two worlds write them differently.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FM_SHARED(type, name, count) __shared__ type name[count]
#define FM_PARAMETER __grid_constant__
#define FM_DYNAMIC_SHARED(type, name)                      \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  type* name = reinterpret_cast<type*>(name##_)
#define FM_LAUNCH(kernel, grid, block, shared, stream, ...)                          \
  do {                                                                               \
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::fastminima::cuda::check_launch();                                              \
  } while (0)
#else
#include "cuda_on_cpu.h"
#define FM_PARAMETER
#define FM_SHARED(type, name, count) \
  static char name##_key;            \
  using name##_type = type[count];   \
  name##_type& name =                \
      *static_cast<name##_type*>(cuda_on_cpu::shared_variable(&name##_key, sizeof(name##_type)))
#define FM_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_on_cpu::dynamic_shared())
#define FM_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch(grid, block, shared, [=] { kernel(__VA_ARGS__); }))
#endif

#define FM_DEVICE __device__ __forceinline__

namespace fastminima {
namespace cuda {

#if defined(__CUDACC__)
// A launch that was refused: no driver, no device, an architecture that the build lacks.
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error("CUDA error " + std::to_string(int(error)) +
                             " at a kernel launch: " + cudaGetErrorString(error));
}
#endif

// Half precisions as their bits: cuda_bf16.h is needed on neither side.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a type is computed in, and its values there.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

FM_DEVICE float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  __builtin_memcpy(&f, &u, sizeof(f));
  return f;
#endif
}

FM_DEVICE uint32_t to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  __builtin_memcpy(&u, &f, sizeof(u));
  return u;
#endif
}

FM_DEVICE float widen(float x) { return x; }
FM_DEVICE double widen(double x) { return x; }
FM_DEVICE float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
FM_DEVICE float widen(Half x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000)
                                                                     << 16;
  const bool is_finite = magnitude < (0x1fu << 23);
  const float value =
      is_finite ? from_bits(magnitude) * 0x1p112f : from_bits(magnitude | 0x7f800000);
  return from_bits(to_bits(value) | sign);
#endif
}

FM_DEVICE void narrow(float x, float& out) { out = x; }
FM_DEVICE void narrow(double x, double& out) { out = x; }
FM_DEVICE void narrow(float x, BFloat16& out) {  // to nearest, ties to even
  const uint32_t u = to_bits(x);
  out.bits = x != x ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
FM_DEVICE void narrow(float x, Half& out) {
#if defined(__CUDACC__)
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  out.bits = cuda_on_cpu::half_bits(x);
#endif
}

FM_DEVICE float ln(float x) { return logf(x); }
FM_DEVICE double ln(double x) { return log(x); }
FM_DEVICE float ln_1p(float x) { return log1pf(x); }
FM_DEVICE double ln_1p(double x) { return log1p(x); }
FM_DEVICE float root(float x) { return sqrtf(x); }
FM_DEVICE double root(double x) { return sqrt(x); }
FM_DEVICE void sin_cos_pi(float x, float& s, float& c) { sincospif(x, &s, &c); }
FM_DEVICE void sin_cos_pi(double x, double& s, double& c) { sincospi(x, &s, &c); }

}  // namespace cuda
}  // namespace fastminima
