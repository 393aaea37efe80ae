// Vector types sized by the instruction set that this file is compiled for.
//
// Kernel files are compiled once per instruction set (setup.py), each time into the namespace
// fastminima::FM_ISA. They must not instantiate anything from the standard library or pybind11
// outside FM_BASELINE: the linker would be free to use an AVX-512 copy of it on every machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#define FM_BYTES 64
#elif defined(__AVX2__)
#define FM_BYTES 32
#else
#define FM_BYTES 16
#endif

#define FM_INLINE static inline __attribute__((always_inline))
#define FM_INLINE_MEMBER inline __attribute__((always_inline))

namespace fastminima {
namespace FM_ISA {

// Unaligned vectors of FM_BYTES; +, -, * and comparisons are elementwise, a * b + c contracts to FMA.
typedef float vec_f32 __attribute__((vector_size(FM_BYTES), aligned(4), may_alias));
typedef double vec_f64 __attribute__((vector_size(FM_BYTES), aligned(8), may_alias));
typedef int32_t index_f32 __attribute__((vector_size(FM_BYTES)));
typedef int64_t index_f64 __attribute__((vector_size(FM_BYTES)));

template <typename scalar_t>
struct Simd;
template <>
struct Simd<float> {
  using vec = vec_f32;
  using index = index_f32;
  static constexpr int width = FM_BYTES / 4;
};
template <>
struct Simd<double> {
  using vec = vec_f64;
  using index = index_f64;
  static constexpr int width = FM_BYTES / 8;
};

template <typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec load(const scalar_t* p) {
  return *reinterpret_cast<const typename Simd<scalar_t>::vec*>(p);
}
template <typename scalar_t>
FM_INLINE void store(scalar_t* p, typename Simd<scalar_t>::vec v) {
  *reinterpret_cast<typename Simd<scalar_t>::vec*>(p) = v;
}
template <typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec splat(scalar_t x) {
  return x - typename Simd<scalar_t>::vec{};
}
template <typename scalar_t>
FM_INLINE scalar_t sum(typename Simd<scalar_t>::vec v) {
  scalar_t s = 0;
  for (int i = 0; i < Simd<scalar_t>::width; i++) s += v[i];
  return s;
}

// The first n < width elements at p, then zeros.
template <typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec load_first(const scalar_t* p, int64_t n) {
  typename Simd<scalar_t>::vec v{};
  for (int64_t i = 0; i < n; i++) v[i] = p[i];
  return v;
}

// |x|^2 of n contiguous elements, four accumulators deep.
template <typename scalar_t>
FM_INLINE scalar_t sq_norm(const scalar_t* x, int64_t n) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    auto x0 = load(x + i), x1 = load(x + i + W), x2 = load(x + i + 2 * W), x3 = load(x + i + 3 * W);
    s0 += x0 * x0, s1 += x1 * x1, s2 += x2 * x2, s3 += x3 * x3;
  }
  for (; i + W <= n; i += W) s0 += load(x + i) * load(x + i);
  scalar_t s = sum<scalar_t>((s0 + s1) + (s2 + s3));
  for (; i < n; i++) s += x[i] * x[i];
  return s;
}

// The first `lanes` elements of v, zeros after them (whatever v holds there, NaN included).
template <typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec first_lanes(typename Simd<scalar_t>::vec v, int lanes) {
  typename Simd<scalar_t>::vec index, zero{};
  for (int i = 0; i < Simd<scalar_t>::width; i++) index[i] = scalar_t(i);
  return index < splat(scalar_t(lanes)) ? v : zero;
}

#if defined(__clang__)
#define FM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (typename Simd<scalar_t>::index){__VA_ARGS__})
#endif

// a0 b0 a1 b1 ... of the lower halves, then of the upper halves.
template <typename scalar_t>
FM_INLINE void interleave(typename Simd<scalar_t>::vec a, typename Simd<scalar_t>::vec b,
                          typename Simd<scalar_t>::vec& low, typename Simd<scalar_t>::vec& high) {
  if constexpr (Simd<scalar_t>::width == 16) {
    low = FM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = FM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (Simd<scalar_t>::width == 8) {
    low = FM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = FM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (Simd<scalar_t>::width == 4) {
    low = FM_SHUFFLE(a, b, 0, 4, 1, 5);
    high = FM_SHUFFLE(a, b, 2, 6, 3, 7);
  } else {
    low = FM_SHUFFLE(a, b, 0, 2);
    high = FM_SHUFFLE(a, b, 1, 3);
  }
}

// Transposes a square of width x width: a perfect shuffle of the rows, log2(width) times.
template <typename scalar_t>
FM_INLINE void transpose(typename Simd<scalar_t>::vec (&v)[Simd<scalar_t>::width]) {
  constexpr int W = Simd<scalar_t>::width;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    typename Simd<scalar_t>::vec next[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++)
      interleave<scalar_t>(v[i], v[i + W / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) v[i] = next[i];
  }
}

}  // namespace FM_ISA
}  // namespace fastminima
