// How the fused gradient of a convolution is cut into tasks, and what becomes of their sums.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Work is cut into slabs of samples, groups, and ranges of row blocks, in numbers that depend on
// the sizes only. Each task owns its sums, so no result depends on the number of threads.
struct Tasks {
  int64_t slabs, ranges;
  int64_t chunk;          // samples that a task packs at once
  int64_t held;           // samples whose images are packed ahead where all ranges share them
  int64_t lines;          // of positions that a row tile of one sample goes through
  int64_t vectors, tile;  // of a row tile, and elements of its sums
  int64_t slab;           // elements of the sums of a slab, [group][row tile][piece][row][lane]
};

// What a task adds to should stay in the L2 cache, together with a chunk of samples.
constexpr int64_t kSumBytes = 256 << 10, kChunkBytes = 384 << 10;
constexpr int64_t kRangeRows = 64;  // fewer would make too little of each image that is read
constexpr int64_t kHeldBytes = 16 << 20;
// Enough for the threads of a desktop machine to share evenly; more only where the slabs are small.
constexpr int64_t kTasks = 8, kSmallSlabs = 16, kSmallSlabBytes = 64 << 10;
// Positions from which on a tile may be added to memory after each sample (24 loads and stores for
// 24 products a position).
constexpr int64_t kChunkPositions = 256;

template <typename scalar_t>
Tasks cut_tasks(const Plan& p) {
  constexpr int64_t RB = row_block<scalar_t>(), W = Simd<scalar_t>::width;
  int64_t size = sizeof(scalar_t), batch = p.sizes.batch, groups = p.sizes.groups;
  Tasks t{};
  for (int64_t i = 0; i < p.piece_count; i++) {
    t.vectors += p.pieces[i].vectors;
    t.lines += p.pieces[i].count[0] * p.pieces[i].count[1];
  }
  t.tile = TILE_ROWS * t.vectors * W;
  int64_t of_group = ceil_div(p.rows, TILE_ROWS) * t.tile;
  t.slab = groups * of_group;
  t.ranges = least(ceil_div(of_group * size, kSumBytes), ceil_div(p.rows, kRangeRows));
  t.ranges = most(1, t.ranges);
  t.held = batch;
  if (t.ranges > 1) t.held = most(1, least(batch, kHeldBytes / (groups * p.image_scratch * size)));
  t.slabs = t.slab * size <= kSmallSlabBytes ? kSmallSlabs : ceil_div(kTasks, t.ranges * groups);
  t.slabs = least(t.slabs, t.held);
  int64_t sample = (p.image_scratch + RB * p.length) * size;
  t.chunk = least(ceil_div(kChunkPositions, p.length), kChunkBytes / sample);
  t.chunk = most(1, least(t.chunk, ceil_div(t.held, t.slabs)));
  return t;
}

// Adds up the slabs of `totals` and lays them out as the weight, [row][channel][tap].
template <typename scalar_t>
void store_sums(const Plan& p, const Tasks& t, const scalar_t* totals, scalar_t* weight,
                int threads) {
  constexpr int W = Simd<scalar_t>::width;
  int64_t row_tiles = ceil_div(p.rows, TILE_ROWS);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    scalar_t* columns = allocate<scalar_t>(p.columns + W);
    memset(columns, 0, p.columns * sizeof(scalar_t));  // some taps see no position: no piece
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.sizes.rows; row++) {
      int64_t r = row % p.rows, tile = row / p.rows * row_tiles + r / TILE_ROWS;
      const scalar_t* at = totals + tile * t.tile;
      for (int64_t i = 0; i < p.piece_count; i++) {
        const Piece& piece = p.pieces[i];
        for (int j = 0; j < piece.vectors; j++) {
          typename Simd<scalar_t>::vec sum{};
          for (int64_t slab = 0; slab < t.slabs; slab++)
            sum += load(at + slab * t.slab + (r % TILE_ROWS * piece.vectors + j) * W);
          if (piece.lanes[j] == W)
            store<scalar_t>(columns + piece.column[j], sum);
          else
            for (int k = 0; k < piece.lanes[j]; k++) columns[piece.column[j] + k] = sum[k];
        }
        at += TILE_ROWS * piece.vectors * W;
      }
      taps_last(columns, p.channels, p.taps, weight + row * p.columns);
    }
    free(columns);
  }
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
