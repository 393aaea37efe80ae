// Sum over the samples of the elementwise squared weight gradient.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Packed samples together stay below this many bytes, to be read from the L2 cache.
constexpr int64_t MOMENT_SCRATCH = 1 << 20;

// total[row + i][column] += sum over `count` packed samples of dW[row + i, column]^2.
template <int M, int NV, typename scalar_t>
FM_INLINE void moment_tile(const Plan& p, const Piece& piece, const scalar_t* blocks,
                           const scalar_t* images, int64_t count, int64_t present, scalar_t* total,
                           int64_t stride) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec acc[M][NV], squares[M][NV]{};
  for (int64_t n = 0; n < count; n++) {
    gradient_tile<M, NV>(p, piece, blocks + n * p.row_scratch, images + n * p.image_scratch, acc);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 3
      for (int j = 0; j < NV; j++) squares[i][j] += acc[i][j] * acc[i][j];
  }
  for (int64_t i = 0; i < present; i++)
    for (int j = 0; j < NV; j++) {
      scalar_t* at = total + i * stride + piece.column[j];
      if (piece.lanes[j] == W)
        store<scalar_t>(at, load(at) + squares[i][j]);
      else
        for (int lane = 0; lane < piece.lanes[j]; lane++) at[lane] += squares[i][j][lane];
    }
}

// Lays total[row][tap][channel] out as the weight, [row][channel][tap].
template <typename scalar_t>
void store_moment(const Plan& p, const scalar_t* total, scalar_t* weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < p.sizes.rows; row++)
    for (int64_t c = 0; c < p.channels; c++)
      for (int64_t tap = 0; tap < p.taps; tap++)
        weight[row * p.columns + c * p.taps + tap] = total[row * p.columns + tap * p.channels + c];
}

template <typename scalar_t>
void second_moment(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
                   scalar_t* weight, int threads) {
  constexpr int RB = row_block<scalar_t>(), M = TILE_ROWS, HALF = TILE_ROWS / 2;
  Plan p;
  make_plan<scalar_t>(p, s);
  int64_t sample = (p.image_scratch + p.row_scratch) * sizeof(scalar_t);
  int64_t held = most(1, least(s.batch, MOMENT_SCRATCH / sample));
  scalar_t* images = allocate<scalar_t>(held * p.image_scratch);
  scalar_t* blocks = allocate<scalar_t>(held * p.row_scratch);
  scalar_t* total = allocate<scalar_t>(s.rows * p.columns);
  memset(images, 0, sizeof(scalar_t) * held * p.image_scratch);
  memset(total, 0, sizeof(scalar_t) * s.rows * p.columns);
  int64_t tiles = ceil_div(p.rows, M);
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t n0 = 0; n0 < s.batch; n0 += held)
    for (int64_t group = 0; group < s.groups; group++) {
      int64_t count = least(held, s.batch - n0), row_blocks = ceil_div(p.rows, RB);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * (row_blocks + 1); i++) {
        int64_t n = i / (row_blocks + 1), b = i % (row_blocks + 1);
        if (b == row_blocks)
          pack_image(p, image + (n0 + n) * s.channels * p.pixels, group,
                     images + n * p.image_scratch);
        else
          pack_rows(p, rows + (n0 + n) * s.rows * p.length, group, b * RB,
                    blocks + n * p.row_scratch + b * RB * p.length);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.piece_count * tiles; i++) {
        const Piece& piece = p.pieces[i / tiles];
        int64_t row = i % tiles * M, present = least(M, p.rows - row);
        const scalar_t* block = blocks + row / RB * RB * p.length + row % RB;
        scalar_t* at = total + (group * p.rows + row) * p.columns;
#define FM_USE(NV)                                                                       \
  present > HALF                                                                         \
      ? moment_tile<M, NV>(p, piece, block, images, count, present, at, p.columns)       \
      : moment_tile<HALF, NV>(p, piece, block, images, count, present, at, p.columns)
        FM_FOR_PIECE(piece.vectors, FM_USE)
#undef FM_USE
      }
    }
  store_moment(p, total, weight, threads);
  free(images);
  free(blocks);
  free(total);
  free_plan(p);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
