// Squared norms of weight gradients from tiles of them that never leave the registers.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Sum of the squares of a tile, lane by lane.
template <int M, int NV, typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec tile_squares(const Plan& p, const Piece& piece,
                                                    const scalar_t* block, const scalar_t* image,
                                                    Ahead* ahead) {
  typename Simd<scalar_t>::vec acc[M][NV], total{};
  gradient_tile<M, NV>(p, piece, block, image, acc, ahead);
#pragma GCC unroll 3
  for (int j = 0; j < NV; j++) {
    typename Simd<scalar_t>::vec squares{};
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) squares += acc[i][j] * acc[i][j];
    total += piece.lanes[j] == Simd<scalar_t>::width
                 ? squares
                 : first_lanes<scalar_t>(squares, piece.lanes[j]);
  }
  return total;
}

// |dW[row .. row + M)|^2 over all columns.
template <int M, typename scalar_t>
double rows_squares(const Plan& p, const scalar_t* block, const scalar_t* image, Ahead* ahead) {
  typename Simd<scalar_t>::vec total{};
  for (int64_t i = 0; i < p.piece_count; i++) {
#define FM_USE(NV) total += tile_squares<M, NV>(p, p.pieces[i], block, image, ahead)
    FM_FOR_PIECE(p.pieces[i].vectors, FM_USE)
#undef FM_USE
  }
  return sum<scalar_t>(total);
}

// Part `part` of `parts` of the row blocks of sample n.
template <typename scalar_t>
double sample_sq_norm(const Plan& p, const scalar_t* rows, const scalar_t* image, int64_t part,
                      int64_t parts, scalar_t* padded, scalar_t* block, Ahead* ahead) {
  constexpr int RB = row_block<scalar_t>(), M = TILE_ROWS, HALF = TILE_ROWS / 2;
  int64_t blocks = ceil_div(p.rows, RB);
  double total = 0;
  for (int64_t group = 0; group < p.sizes.groups; group++) {
    pack_image(p, image, group, padded);
    for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++) {
      pack_rows(p, rows, group, b * RB, block);
      for (int64_t r = 0; r < RB && b * RB + r < p.rows; r += M)
        total += p.rows - b * RB - r > HALF ? rows_squares<M>(p, block + r, padded, ahead)
                                            : rows_squares<HALF>(p, block + r, padded, ahead);
    }
  }
  return total;
}

// Norms of samples[0 .. count), or of samples 0 .. count where that is null.
template <typename scalar_t>
void direct_sq_norms(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
                     const int64_t* samples, int64_t count, scalar_t* weight, scalar_t* bias,
                     int threads) {
  Plan p;
  make_plan<scalar_t>(p, s);
  // With fewer samples than threads, each sample's rows are shared out.
  int64_t parts = count < threads ? ceil_div(threads, most(count, 1)) : 1;
  parts = most(1, least(parts, ceil_div(p.rows, row_block<scalar_t>())));
  int64_t chunk = samples_in_a_row(count, threads), lines = tile_lines(p);
  int64_t row_size = s.rows * p.length, image_size = s.channels * p.pixels;
  double* partial = allocate<double>(count * parts);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    scalar_t* padded = allocate<scalar_t>(p.image_scratch);
    scalar_t* block = allocate<scalar_t>(p.length * row_block<scalar_t>());
    memset(padded, 0, sizeof(scalar_t) * p.image_scratch);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < count * parts; i++) {
      int64_t n = samples ? samples[i / parts] : i / parts;
      bool has_next = !samples && (i + 1) % chunk != 0 && i + 1 < count;
      const scalar_t *of_rows = rows + n * row_size, *of_image = image + n * image_size;
      Ahead ahead = ahead_of(pieces(of_rows + row_size, has_next ? row_size : 0),
                             pieces(of_image + image_size, has_next ? image_size : 0), lines);
      if (bias && i % parts == 0) bias[n] = bias_of_sample(rows, image, s, n);
      partial[i] = sample_sq_norm(p, of_rows, of_image, i % parts, parts, padded, block, &ahead);
    }
    free(padded);
    free(block);
  }
  for (int64_t i = 0; i < count; i++) {
    double total = 0;
    for (int64_t part = 0; part < parts; part++) total += partial[i * parts + part];
    weight[samples ? samples[i] : i] = scalar_t(total);
  }
  free(partial);
  free_plan(p);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
