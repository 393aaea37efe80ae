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

// `count` pieces of memory, `step` bytes apart.
struct Pieces {
  const char* at;
  int64_t bytes, step, count;
};

template <typename scalar_t>
FM_INLINE Pieces pieces(const scalar_t* at, int64_t size, int64_t step = 0, int64_t count = 1) {
  constexpr int64_t bytes = sizeof(scalar_t);
  return {reinterpret_cast<const char*>(at), size * bytes, step * bytes, size > 0 ? count : 0};
}

// Memory that the next samples will read, asked for a few cache lines at a time while these are
// worked on: samples are too short for the processor to see them coming.
struct Ahead {
  Pieces of[2];
  int64_t lines;  // each time
  int64_t offset;
};

FM_INLINE void fetch(Ahead* ahead) {
  Pieces& now = ahead->of[0];
  for (int64_t i = 0; i < ahead->lines; i++, ahead->offset += 64) {
    if (ahead->offset >= now.bytes) now.at += now.step, now.count--, ahead->offset = 0;
    if (now.count <= 0) {
      now = ahead->of[1], ahead->of[1].count = 0;
      if (now.count <= 0) ahead->lines = 0;
      continue;
    }
    __builtin_prefetch(now.at + ahead->offset, 0, 2);
  }
}

// What `calls` of fetch can bring.
FM_INLINE Ahead ahead_of(const Pieces& a, const Pieces& b, int64_t calls) {
  // More lines at once than there are fill buffers (about 16) would stall.
  int64_t lines = (a.bytes * a.count + b.bytes * b.count) / 64 / (calls > 0 ? calls : 1) + 1;
  return {{a, b}, lines < 12 ? lines : 12, 0};
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
