// Sum over the samples of the elementwise squared weight gradient.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Packed samples that are held at once, in bytes; the total is read and written once for them.
constexpr int64_t MOMENT_SCRATCH = 8 << 20;
// Of these, as many at a time as have the inputs of a piece in this part of the L1 cache.
constexpr int64_t PIECE_SCRATCH = 24 << 10;

// total[row + i][column] += sum over `count` packed samples of dW[row + i, column]^2.
template <int M, int NV, typename scalar_t>
FM_INLINE void moment_tile(const Plan& p, const Piece& piece, const scalar_t* blocks,
                           const scalar_t* images, int64_t count, int64_t present, scalar_t* total,
                           int64_t stride) {
  constexpr int W = Simd<scalar_t>::width;
  alignas(64) typename Simd<scalar_t>::vec acc[M][NV], squares[M][NV]{};
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

// Rows [first, last) of a group for one piece; both multiples of TILE_ROWS.
template <typename scalar_t>
void moment_rows(const Plan& p, const Piece& piece, const scalar_t* blocks, const scalar_t* images,
                 int64_t count, int64_t first, int64_t last, scalar_t* total) {
  constexpr int RB = row_block<scalar_t>(), M = TILE_ROWS, HALF = TILE_ROWS / 2;
  int64_t inputs = p.length * TILE_VECTORS * FM_BYTES, chunk = most(1, PIECE_SCRATCH / inputs);
  for (int64_t n = 0; n < count; n += chunk)
    for (int64_t row = first; row < least(last, p.rows); row += M) {
      int64_t present = least(M, p.rows - row), samples = least(chunk, count - n);
      const scalar_t* block = blocks + n * p.row_scratch + row / RB * RB * p.length + row % RB;
      const scalar_t* image = images + n * p.image_scratch;
      scalar_t* at = total + row * p.columns;
#define FM_USE(NV)                                                                             \
  present > HALF ? moment_tile<M, NV>(p, piece, block, image, samples, present, at, p.columns) \
                 : moment_tile<HALF, NV>(p, piece, block, image, samples, present, at, p.columns)
      FM_FOR_PIECE(piece.vectors, FM_USE)
#undef FM_USE
    }
}

// Lays total[row][tap][channel] out as the weight, [row][channel][tap].
template <typename scalar_t>
void store_moment(const Plan& p, const scalar_t* total, scalar_t* weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < p.sizes.rows; row++)
    taps_last(total + row * p.columns, p.channels, p.taps, weight + row * p.columns);
}

template <typename scalar_t>
void second_moment(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
                   scalar_t* weight, int threads) {
  constexpr int RB = row_block<scalar_t>(), M = TILE_ROWS;
  Plan p;
  make_plan<scalar_t>(p, s);
  int64_t sample = (p.image_scratch + p.row_scratch) * sizeof(scalar_t);
  int64_t held = most(1, least(s.batch, MOMENT_SCRATCH / sample));
  scalar_t* images = allocate<scalar_t>(held * p.image_scratch);
  scalar_t* blocks = allocate<scalar_t>(held * p.row_scratch);
  scalar_t* total = allocate<scalar_t>(s.rows * p.columns);
  memset(images, 0, sizeof(scalar_t) * held * p.image_scratch);
  memset(total, 0, sizeof(scalar_t) * s.rows * p.columns);
  // Enough items for the threads to share evenly.
  int64_t tiles = ceil_div(p.rows, M);
  int64_t splits = least(tiles, ceil_div(8 * threads, most(p.piece_count, 1)));
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
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < p.piece_count * splits; i++) {
        int64_t split = i % splits;
        moment_rows(p, p.pieces[i / splits], blocks, images, count, tiles * split / splits * M,
                    tiles * (split + 1) / splits * M, total + group * p.rows * p.columns);
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
