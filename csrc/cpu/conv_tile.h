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

// acc[i][j] = sum over the positions of the walk of a[i] * b[j][0 .. width).
template <typename scalar_t, int M, int NV>
FM_INLINE void multiply(const scalar_t* a, const scalar_t* const* b, const Walk& walk,
                        typename Simd<scalar_t>::vec (&acc)[M][NV]) {
  using vec = typename Simd<scalar_t>::vec;
  const scalar_t* base[NV];
#pragma GCC unroll 3
  for (int j = 0; j < NV; j++) base[j] = b[j];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) acc[i][j] = vec{};
  const int64_t n = walk.count[2], a_x = walk.a_step[2], b_x = walk.b_step[2];
  for (int64_t z = 0; z < walk.count[0]; z++)
    for (int64_t y = 0; y < walk.count[1]; y++) {
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

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
