// How one sample of a convolution is laid out so that every kernel tap is a shifted pointer.
//
// The image becomes zero-padded pixels of `pixel` channels each, so the inputs under a tap are
// runs of contiguous channels; the rows become blocks of ROW_BLOCK rows, position by position.
#pragma once

#include "cpu/conv.h"
#include "cpu/conv_layout.h"
#include "cpu/conv_tile.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Up to three vectors of columns (tap, channel), and the positions where their taps can lie inside
// the image.
struct Piece {
  int vectors;
  int lanes[TILE_VECTORS];
  int64_t offset[TILE_VECTORS];  // into the padded image, at position 0
  int64_t column[TILE_VECTORS];  // tap * channels + channel of the first lane
  int64_t first[3], count[3];
};

template <typename scalar_t>
constexpr int row_block() {
  return Simd<scalar_t>::width > TILE_ROWS ? Simd<scalar_t>::width : TILE_ROWS;
}

// One group of one sample; the same for all of them.
struct Plan {
  ConvSizes sizes;
  int64_t rows, channels, taps, columns;  // of a group
  int64_t pixels, length;                 // of the image and of the rows
  int64_t pixel, padded[3], step[3], image_scratch, row_scratch;
  int64_t* pixel_at;     // where each pixel of the image goes
  int64_t* position_at;  // where each position of the rows goes
  Piece* pieces;
  int64_t piece_count;
};

template <typename T>
FM_INLINE T* allocate(int64_t n) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, size_t(n > 0 ? n : 1) * sizeof(T)) != 0) abort();
  return static_cast<T*>(p);
}

// Positions [lo, hi) of one axis whose input under tap k lies inside the image.
FM_INLINE void inside(const ConvSizes& s, int axis, int64_t k, int64_t* lo, int64_t* hi) {
  int64_t shift = k * s.dilation[axis] - s.padding[axis], step = s.stride[axis];
  *lo = shift < 0 ? ceil_div(-shift, step) : 0;
  *hi = s.image[axis] > shift ? least(s.out[axis], ceil_div(s.image[axis] - shift, step)) : 0;
}

// Positions of a run of taps k[axis] .. last[axis]; false when there are none.
FM_INLINE bool span(const ConvSizes& s, const int64_t* k, const int64_t* last, int64_t* first,
                    int64_t* count) {
  for (int axis = 0; axis < 3; axis++) {
    int64_t lo = s.out[axis], hi = 0, from, to;
    for (int64_t tap = k[axis]; tap <= last[axis]; tap++) {
      inside(s, axis, tap, &from, &to);
      if (from < to) lo = least(lo, from), hi = most(hi, to);
    }
    first[axis] = lo, count[axis] = hi - lo;
    if (hi <= lo) return false;
  }
  return true;
}

// Adds a vector of columns to the last piece, or to a new one.
FM_INLINE void add_vector(Plan& p, bool starts_piece, int64_t offset, int64_t column, int lanes,
                          const int64_t* first, const int64_t* count) {
  if (starts_piece) {
    p.pieces[p.piece_count].vectors = 0;
    p.piece_count++;
  }
  Piece& piece = p.pieces[p.piece_count - 1];
  int j = piece.vectors++;
  piece.offset[j] = offset, piece.column[j] = column, piece.lanes[j] = lanes;
  for (int axis = 0; axis < 3; axis++) {
    if (j == 0) {
      piece.first[axis] = first[axis], piece.count[axis] = count[axis];
      continue;
    }
    int64_t end = most(piece.first[axis] + piece.count[axis], first[axis] + count[axis]);
    piece.first[axis] = least(piece.first[axis], first[axis]);
    piece.count[axis] = end - piece.first[axis];
  }
}

// Cuts the columns into pieces. A run is one tap, or all taps of a kernel row where their channels
// are neighbours in the padded image (`merged`).
FM_INLINE void cut_columns(Plan& p, int width, bool merged) {
  const ConvSizes& s = p.sizes;
  int64_t run_taps = merged ? s.kernel[2] : 1;
  int64_t run = run_taps * p.channels, vectors = ceil_div(run, width);
  p.pieces = allocate<Piece>(p.taps * vectors);
  p.piece_count = 0;
  int64_t k[3];
  for (k[0] = 0; k[0] < s.kernel[0]; k[0]++)
    for (k[1] = 0; k[1] < s.kernel[1]; k[1]++)
      for (k[2] = 0; k[2] < s.kernel[2]; k[2] += run_taps) {
        int64_t last[3] = {k[0], k[1], k[2] + run_taps - 1}, first[3], count[3];
        if (!span(s, k, last, first, count)) continue;
        int64_t at = 0;
        for (int axis = 0; axis < 3; axis++) at = at * p.padded[axis] + k[axis] * s.dilation[axis];
        int64_t tap = (k[0] * s.kernel[1] + k[1]) * s.kernel[2] + k[2];
        int64_t parts = ceil_div(vectors, TILE_VECTORS), part = -1;
        bool joins = merged && vectors == 1 && p.piece_count > 0 &&
                     p.pieces[p.piece_count - 1].vectors < TILE_VECTORS;
        for (int64_t v = 0; v < vectors; v++) {
          bool starts = v * parts / vectors != part && !(v == 0 && joins);
          part = v * parts / vectors;
          add_vector(p, starts, at * p.pixel + v * width, tap * p.channels + v * width,
                     int(least(width, run - v * width)), first, count);
        }
      }
}

template <typename scalar_t>
void make_plan(Plan& p, const ConvSizes& s) {
  constexpr int W = Simd<scalar_t>::width;
  p.sizes = s;
  p.rows = s.rows / s.groups, p.channels = s.channels / s.groups;
  p.taps = s.kernel[0] * s.kernel[1] * s.kernel[2], p.columns = p.taps * p.channels;
  p.pixels = s.image[0] * s.image[1] * s.image[2], p.length = s.out[0] * s.out[1] * s.out[2];
  // Taps side by side fill vectors better, but share one range of positions: on narrow images
  // that multiplies too many zeros.
  bool fills = p.channels % W == 0 && (s.out[2] < 8 || p.channels >= 8 * W);
  bool merged = s.dilation[2] == 1 && !fills;
  p.pixel = p.channels;
  // Pixels a multiple of 1 KiB apart would share a few cache sets.
  if (!merged && p.channels * sizeof(scalar_t) % 1024 == 0) p.pixel += W;
  for (int axis = 0; axis < 3; axis++) {
    p.step[axis] = s.kernel[axis] == 1 ? 1 : s.stride[axis];
    p.padded[axis] = (s.out[axis] - 1) * p.step[axis] + (s.kernel[axis] - 1) * s.dilation[axis] + 1;
  }
  int64_t unread = p.padded[0] * p.padded[1] * p.padded[2] * p.pixel;
  p.image_scratch = unread + p.pixel + (TILE_VECTORS + 1) * W;
  p.row_scratch = ceil_div(p.rows, row_block<scalar_t>()) * row_block<scalar_t>() * p.length;
  p.pixel_at = allocate<int64_t>(p.pixels);
  int64_t n = 0, i[3];
  for (i[0] = 0; i[0] < s.image[0]; i[0]++)
    for (i[1] = 0; i[1] < s.image[1]; i[1]++)
      for (i[2] = 0; i[2] < s.image[2]; i[2]++) {
        int64_t at = 0;
        bool is_read = true;
        for (int axis = 0; axis < 3; axis++) {
          int64_t skip = s.stride[axis] / p.step[axis], q = i[axis] + s.padding[axis];
          is_read = is_read && q % skip == 0 && q / skip < p.padded[axis];
          at = at * p.padded[axis] + q / skip;
        }
        p.pixel_at[n++] = is_read ? at * p.pixel : unread;
      }
  p.position_at = allocate<int64_t>(p.length);
  for (int64_t t = 0; t < p.length; t++) p.position_at[t] = t * row_block<scalar_t>();
  cut_columns(p, W, merged);
}

FM_INLINE void free_plan(Plan& p) {
  free(p.pixel_at);
  free(p.position_at);
  free(p.pieces);
}

// Lines of positions that the tiles of a sample go through.
FM_INLINE int64_t tile_lines(const Plan& p) {
  int64_t lines = 0;
  for (int64_t i = 0; i < p.piece_count; i++) lines += p.pieces[i].count[0] * p.pieces[i].count[1];
  return lines * ceil_div(p.rows, TILE_ROWS) * p.sizes.groups;
}

// Samples in a row that one thread takes; of all but the last it knows the next one.
FM_INLINE int64_t samples_in_a_row(int64_t count, int threads) {
  return count >= 8 * threads ? 4 : 1;
}

// Group `group` of a sample's image, as the plan lays it out; dst is zero outside the image.
template <typename scalar_t>
FM_INLINE void pack_image(const Plan& p, const scalar_t* sample, int64_t group, scalar_t* dst) {
  if (p.sizes.image_last)
    scatter_pixels(sample + group * p.channels, p.sizes.channels, p.channels, p.pixels, p.pixel_at,
                   dst);
  else
    scatter_transposed(sample + group * p.channels * p.pixels, p.channels, p.pixels, p.pixel_at,
                       dst);
}

// Rows [row, row + row_block) of a group of a sample's rows, missing ones zero.
template <typename scalar_t>
FM_INLINE void pack_rows(const Plan& p, const scalar_t* sample, int64_t group, int64_t row,
                         scalar_t* dst) {
  int64_t present = least(row_block<scalar_t>(), p.rows - row);
  if (present < row_block<scalar_t>())
    memset(dst, 0, sizeof(scalar_t) * row_block<scalar_t>() * p.length);
  if (p.sizes.rows_last)
    scatter_pixels(sample + group * p.rows + row, p.sizes.rows, present, p.length, p.position_at,
                   dst);
  else
    scatter_transposed(sample + (group * p.rows + row) * p.length, present, p.length, p.position_at,
                       dst);
}

// acc[i][j] += dW[row + i, column[j] ...] where `block` holds the rows from `row` on.
template <int M, int NV, typename scalar_t>
FM_INLINE void add_gradient_tile(const Plan& p, const Piece& piece, const scalar_t* block,
                                 const scalar_t* image, typename Simd<scalar_t>::vec (&acc)[M][NV],
                                 Ahead* ahead = nullptr) {
  constexpr int RB = row_block<scalar_t>();
  const int64_t* out = p.sizes.out;
  Walk walk = {{piece.count[0], piece.count[1], piece.count[2]},
               {out[1] * out[2] * RB, out[2] * RB, RB},
               {p.step[0] * p.padded[1] * p.padded[2] * p.pixel, p.step[1] * p.padded[2] * p.pixel,
                p.step[2] * p.pixel}};
  int64_t a = 0, b = 0;
  for (int axis = 0; axis < 3; axis++) {
    a += piece.first[axis] * walk.a_step[axis];
    b += piece.first[axis] * walk.b_step[axis];
  }
  const scalar_t* columns[NV];
  for (int j = 0; j < NV; j++) columns[j] = image + piece.offset[j] + b;
  multiply_add<scalar_t, M, NV>(block + a, columns, walk, acc, ahead);
}

template <int M, int NV, typename scalar_t>
FM_INLINE void gradient_tile(const Plan& p, const Piece& piece, const scalar_t* block,
                             const scalar_t* image, typename Simd<scalar_t>::vec (&acc)[M][NV],
                             Ahead* ahead = nullptr) {
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) acc[i][j] = typename Simd<scalar_t>::vec{};
  add_gradient_tile<M, NV>(p, piece, block, image, acc, ahead);
}

// Calls use(M, NV) with the piece's number of vectors and the rows that a tile takes as constants.
#define FM_FOR_PIECE(vectors, USE) \
  switch (vectors) {               \
    case 1:                        \
      USE(1);                      \
      break;                       \
    case 2:                        \
      USE(2);                      \
      break;                       \
    default:                       \
      USE(3);                      \
  }

// |sum over positions|^2 summed over channels: the squared norm of a bias gradient.
template <typename scalar_t>
scalar_t bias_sq_norm(const scalar_t* g, int64_t channels, int64_t n) {
  constexpr int W = Simd<scalar_t>::width;
  double total = 0;
  for (int64_t c = 0; c < channels; c++, g += n) {
    typename Simd<scalar_t>::vec s0{}, s1{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) s0 += load(g + i), s1 += load(g + i + W);
    scalar_t s = i > 0 ? sum<scalar_t>(s0 + s1) : scalar_t(0);
    for (; i < n; i++) s += g[i];
    total += double(s) * s;
  }
  return scalar_t(total);
}

template <typename scalar_t>
FM_INLINE scalar_t bias_of_sample(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
                                  int64_t n) {
  int64_t length = s.out[0] * s.out[1] * s.out[2], pixels = s.image[0] * s.image[1] * s.image[2];
  return s.is_transposed ? bias_sq_norm(image + n * s.channels * pixels, s.channels, pixels)
                         : bias_sq_norm(rows + n * s.rows * length, s.rows, length);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
