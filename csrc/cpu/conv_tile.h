// The register tile that the convolution kernels are made of.
#pragma once

#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// 8 x 3 accumulators, 3 vectors and a broadcast fill 28 of 32 registers; 4 x 3 fill 16 of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_ROWS = 8;
#else
constexpr int TILE_ROWS = 4;
#endif
constexpr int TILE_VECTORS = 3;

// Three nested loops over positions, outermost first, and how far each step moves a and b.
struct Walk {
  int64_t count[3], a_step[3], b_step[3];
};

// Memory that the next sample will read, asked for a few cache lines at a time while this one is
// worked on: samples are too short for the processor to see them coming.
struct Ahead {
  const char *at[2], *end[2];
  int64_t lines;  // each time
};

FM_INLINE void fetch(Ahead* ahead) {
  for (int64_t i = 0; i < ahead->lines; i++) {
    if (ahead->at[0] >= ahead->end[0]) {
      ahead->at[0] = ahead->at[1], ahead->end[0] = ahead->end[1];
      if (ahead->at[0] >= ahead->end[0]) return;
      ahead->at[1] = ahead->end[1];
    }
    __builtin_prefetch(ahead->at[0], 0, 2);
    ahead->at[0] += 64;
  }
}

// What `count` calls of fetch can bring of two arrays of n elements.
template <typename scalar_t>
FM_INLINE Ahead next_sample(const scalar_t* a, int64_t n_a, const scalar_t* b, int64_t n_b,
                            int64_t count) {
  // More lines at once than there are fill buffers (about 16) would stall.
  int64_t lines = (n_a + n_b) * int64_t(sizeof(scalar_t)) / 64 / (count > 0 ? count : 1) + 1;
  return {{reinterpret_cast<const char*>(a), reinterpret_cast<const char*>(b)},
          {reinterpret_cast<const char*>(a + n_a), reinterpret_cast<const char*>(b + n_b)},
          lines < 12 ? lines : 12};
}

// acc[i][j] += sum over the positions of the walk of a[i] * b[j][0 .. width).
template <typename scalar_t, int M, int NV>
FM_INLINE void multiply_add(const scalar_t* a, const scalar_t* const* b, const Walk& walk,
                        typename Simd<scalar_t>::vec (&acc)[M][NV], Ahead* ahead = nullptr) {
  using vec = typename Simd<scalar_t>::vec;
  const scalar_t* base[NV];
#pragma GCC unroll 3
  for (int j = 0; j < NV; j++) base[j] = b[j];
  const int64_t n = walk.count[2], a_x = walk.a_step[2], b_x = walk.b_step[2];
  for (int64_t z = 0; z < walk.count[0]; z++)
    for (int64_t y = 0; y < walk.count[1]; y++) {
      if (ahead) fetch(ahead);
      const scalar_t* left = a + z * walk.a_step[0] + y * walk.a_step[1];
      int64_t at = z * walk.b_step[0] + y * walk.b_step[1];
      for (int64_t x = 0; x < n; x++, left += a_x, at += b_x) {
        vec right[NV];
#pragma GCC unroll 3
        for (int j = 0; j < NV; j++) right[j] = load(base[j] + at);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
          vec s = splat(left[i]);
#pragma GCC unroll 3
          for (int j = 0; j < NV; j++) acc[i][j] += s * right[j];
        }
      }
    }
}

template <typename scalar_t, int M, int NV>
FM_INLINE void multiply(const scalar_t* a, const scalar_t* const* b, const Walk& walk,
                        typename Simd<scalar_t>::vec (&acc)[M][NV], Ahead* ahead = nullptr) {
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) acc[i][j] = typename Simd<scalar_t>::vec{};
  multiply_add<scalar_t, M, NV>(a, b, walk, acc, ahead);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
