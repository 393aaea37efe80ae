// Gram matrices over positions: how their operands are laid out, and their lower halves.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// The operand of a Gram matrix of n elements: blocks of row_block() of them, in each a channel
// every `step`, so that a tile reads memory in order.
template <typename scalar_t>
struct Operand {
  const scalar_t* data;
  int64_t channels, n, step, block_size;
};

template <typename scalar_t>
FM_INLINE const scalar_t* element(const Operand<scalar_t>& x, int64_t i) {
  constexpr int RB = row_block<scalar_t>();
  return x.data + i / RB * x.block_size + i % RB;
}

// Writes a line of n elements as channel c of an operand, zeros after the last.
template <typename scalar_t>
FM_INLINE void store_channel(const scalar_t* line, int64_t n, int64_t c, int64_t block_size,
                             scalar_t* dst) {
  constexpr int W = Simd<scalar_t>::width, RB = row_block<scalar_t>();
  dst += c * RB;
  int64_t i = 0;
  for (; i + RB <= n; i += RB, dst += block_size)
#pragma GCC unroll 8
    for (int j = 0; j < RB; j += W) store<scalar_t>(dst + j, load(line + i + j));
  for (int64_t j = 0; i < n; i++, j++) dst[j] = line[i];
}

// One more channel than there are: blocks a power of two apart would share cache sets.
template <typename scalar_t>
FM_INLINE int64_t operand_block(int64_t channels) {
  return (channels + 1) * row_block<scalar_t>();
}
template <typename scalar_t>
FM_INLINE int64_t operand_size(int64_t channels, int64_t n) {
  return ceil_div(n, row_block<scalar_t>()) * operand_block<scalar_t>(channels);
}

// An operand of planes of n elements; small ones are read where they are.
template <typename scalar_t>
Operand<scalar_t> pack_planes(const scalar_t* planes, int64_t channels, int64_t n,
                              scalar_t* scratch) {
  constexpr int RB = row_block<scalar_t>();
  if (n % RB == 0 && n <= 4 * RB) return {planes, channels, n, n, RB};
  int64_t block = operand_block<scalar_t>(channels);
  for (int64_t c = 0; c < channels; c++) store_channel(planes + c * n, n, c, block, scratch);
  return {scratch, channels, n, RB, block};
}

// line[t] = the plane under tap k at position t, zero outside it.
template <typename scalar_t>
FM_INLINE void unfold(const ConvSizes& s, const scalar_t* plane, const int64_t* k, scalar_t* line) {
  int64_t lo[3], hi[3], shift[3];
  for (int axis = 0; axis < 3; axis++) {
    inside(s, axis, k[axis], &lo[axis], &hi[axis]);
    shift[axis] = k[axis] * s.dilation[axis] - s.padding[axis];
  }
  memset(line, 0, sizeof(scalar_t) * s.out[0] * s.out[1] * s.out[2]);
  for (int64_t z = lo[0]; z < hi[0]; z++)
    for (int64_t y = lo[1]; y < hi[1]; y++) {
      int64_t at = (z * s.stride[0] + shift[0]) * s.image[1] + y * s.stride[1] + shift[1];
      const scalar_t* from = plane + at * s.image[2] + shift[2];
      scalar_t* to = line + (z * s.out[1] + y) * s.out[2];
      for (int64_t x = lo[2]; x < hi[2]; x++) to[x] = from[x * s.stride[2]];
    }
}

// The unfolded image as an operand, a channel for each channel and tap.
template <typename scalar_t>
Operand<scalar_t> pack_patches(const ConvSizes& s, const scalar_t* image, int64_t channels,
                               int64_t n, scalar_t* line, scalar_t* scratch) {
  int64_t pixels = s.image[0] * s.image[1] * s.image[2], c = 0, k[3];
  int64_t columns = channels * s.kernel[0] * s.kernel[1] * s.kernel[2];
  int64_t block = operand_block<scalar_t>(columns);
  for (int64_t channel = 0; channel < channels; channel++)
    for (k[0] = 0; k[0] < s.kernel[0]; k[0]++)
      for (k[1] = 0; k[1] < s.kernel[1]; k[1]++)
        for (k[2] = 0; k[2] < s.kernel[2]; k[2]++) {
          unfold(s, image + channel * pixels, k, line);
          store_channel(line, n, c++, block, scratch);
        }
  return {scratch, columns, n, row_block<scalar_t>(), block};
}

// gram[i .. i + M)[v * W .. (v + NV) * W) of the products of elements.
template <int NV, typename scalar_t>
void gram_tile(const Operand<scalar_t>& x, int64_t i, int64_t v, scalar_t* gram, int64_t stride) {
  constexpr int W = Simd<scalar_t>::width, M = TILE_ROWS;
  alignas(64) typename Simd<scalar_t>::vec acc[M][NV];
  const scalar_t* right[NV];
  for (int j = 0; j < NV; j++) right[j] = element(x, (v + j) * W);
  Walk walk = {{1, 1, x.channels}, {0, 0, x.step}, {0, 0, x.step}};
  multiply<scalar_t, M, NV>(element(x, i), right, walk, acc);
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) store<scalar_t>(gram + (i + r) * stride + (v + j) * W, acc[r][j]);
}

template <typename scalar_t>
FM_INLINE int64_t dense_stride(int64_t n) {
  return (ceil_div(n, row_block<scalar_t>()) + 1) * row_block<scalar_t>();
}

// gram[i][j] = sum_c x[c][i] x[c][j] for j <= i < n, and some j beyond.
template <typename scalar_t>
void lower_gram(const Operand<scalar_t>& x, scalar_t* gram, Ahead* ahead) {
  constexpr int W = Simd<scalar_t>::width, M = TILE_ROWS;
  int64_t stride = dense_stride<scalar_t>(x.n);
  for (int64_t i = 0; i < x.n; i += M) {
    int64_t vectors = ceil_div(least(i + M, x.n), W), parts = ceil_div(vectors, TILE_VECTORS);
    for (int64_t part = 0; part < parts; part++) {
      fetch(ahead);
      int64_t v = vectors * part / parts, end = vectors * (part + 1) / parts;
#define FM_USE(NV) gram_tile<NV>(x, i, v, gram, stride)
      FM_FOR_PIECE(end - v, FM_USE)
#undef FM_USE
    }
  }
}

// About the number of tiles of a lower_gram.
template <typename scalar_t>
int64_t gram_tiles(int64_t n) {
  int64_t tall = ceil_div(n, TILE_ROWS);
  return tall + tall * n / (2 * TILE_VECTORS * Simd<scalar_t>::width);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
