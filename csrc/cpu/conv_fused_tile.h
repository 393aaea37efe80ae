// One tile of the weight gradient of a chunk of samples, added up and, sample by sample, squared.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// What of every sample is wanted beside the sum of the gradients.
enum class PerSample { nothing, norms, norms_and_squares };

// Packed samples: some rows, `row_block` of them by position, and the images.
template <typename scalar_t>
struct Chunk {
  const scalar_t *blocks, *images;
  int64_t count;
};

// Where results go: `total` and `moment` (unless null) are tiles, [piece][row][lane], squares is
// [sample][lane].
template <typename scalar_t>
struct Sums {
  scalar_t *total, *moment;
  double* squares;
  bool is_first;  // of the chunks that are added to the tiles: they hold nothing yet
};

// Adds the lanes of v to the doubles at `out`.
template <typename scalar_t>
FM_INLINE void add_wide(double* out, typename Simd<scalar_t>::vec v) {
  typedef double wide
      __attribute__((vector_size(8 * Simd<scalar_t>::width), aligned(8), may_alias));
  *reinterpret_cast<wide*>(out) += __builtin_convertvector(v, wide);
}

template <int M, int NV, typename scalar_t>
FM_INLINE void add_tile(const typename Simd<scalar_t>::vec (&tile)[M][NV], scalar_t* total) {
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) {
      scalar_t* at = total + (i * NV + j) * Simd<scalar_t>::width;
      store<scalar_t>(at, load(at) + tile[i][j]);
    }
}

// The sum over a chunk, which never leaves the registers on the way.
template <int M, int NV, typename scalar_t>
FM_INLINE void sum_tile(const Plan& p, const Piece& piece, const Chunk<scalar_t>& chunk,
                        const Sums<scalar_t>& sums, Ahead* ahead) {
  const int64_t block = row_block<scalar_t>() * p.length;
  typename Simd<scalar_t>::vec acc[M][NV];
  gradient_tile<M, NV>(p, piece, chunk.blocks, chunk.images, acc, ahead);
  for (int64_t n = 1; n < chunk.count; n++)
    add_gradient_tile<M, NV>(p, piece, chunk.blocks + n * block, chunk.images + n * p.image_scratch,
                             acc, ahead);
  add_tile<M, NV>(acc, sums.total);
}

// The tile of each sample: added to the total, its squares to the moment and to the sample's own.
template <bool with_moment, int M, int NV, typename scalar_t>
FM_INLINE void square_tile(const Plan& p, const Piece& piece, const Chunk<scalar_t>& chunk,
                           const Sums<scalar_t>& sums, Ahead* ahead) {
  using vec = typename Simd<scalar_t>::vec;
  constexpr int W = Simd<scalar_t>::width;
  const int64_t block = row_block<scalar_t>() * p.length;
  for (int64_t n = 0; n < chunk.count; n++) {
    vec acc[M][NV], columns[NV]{}, all{};
    gradient_tile<M, NV>(p, piece, chunk.blocks + n * block, chunk.images + n * p.image_scratch,
                         acc, ahead);
    add_tile<M, NV>(acc, sums.total);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 3
      for (int j = 0; j < NV; j++) columns[j] += acc[i][j] *= acc[i][j];
    if (with_moment) add_tile<M, NV>(acc, sums.moment);
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++)
      all += piece.lanes[j] == W ? columns[j] : first_lanes<scalar_t>(columns[j], piece.lanes[j]);
    add_wide<scalar_t>(sums.squares + n * W, all);
  }
}

// All columns of M rows.
template <PerSample wanted, int M, typename scalar_t>
void row_tile(const Plan& p, const Chunk<scalar_t>& chunk, Sums<scalar_t> sums, Ahead* ahead) {
  constexpr bool with_moment = wanted == PerSample::norms_and_squares;
  for (int64_t i = 0; i < p.piece_count; i++) {
    const Piece& piece = p.pieces[i];
    int64_t size = TILE_ROWS * piece.vectors * Simd<scalar_t>::width;
    if (sums.is_first) memset(sums.total, 0, size * sizeof(scalar_t));
    if (sums.is_first && with_moment) memset(sums.moment, 0, size * sizeof(scalar_t));
#define FM_USE(NV)                                 \
  if constexpr (wanted == PerSample::nothing)      \
    sum_tile<M, NV>(p, piece, chunk, sums, ahead); \
  else                                             \
    square_tile<with_moment, M, NV>(p, piece, chunk, sums, ahead)
    FM_FOR_PIECE(piece.vectors, FM_USE)
#undef FM_USE
    sums.total += size;
    if (with_moment) sums.moment += size;
  }
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
