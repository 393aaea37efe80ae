// The gradient of a convolution's weight, with the squared norms and the sum of the squares of
// every sample's from the same tiles.
#pragma once

#include "cpu/conv_plan.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// What of every sample is wanted beside the sum of the gradients.
enum class PerSample { nothing, norms, norms_and_squares };

// Sums over the samples, tile by tile: a slab of samples has [group][row tile][piece][row][lane].
// Work is cut into slabs, groups and ranges of row blocks, in numbers that depend on the sizes
// only, and each task owns its sums: no result depends on the number of threads.
struct Tasks {
  int64_t slabs, ranges, chunk;  // samples that a task packs at once
  int64_t held;                  // samples whose images are packed ahead, all tasks sharing them
  int64_t lines;                 // of positions that a row tile of a sample goes through
  int64_t vectors, tile, slab;   // of a row tile; elements of its sums, and of those of a slab
  int64_t count(const Plan& p) const { return slabs * p.sizes.groups * ranges; }
};

// Sums that one task adds to should stay in the L2 cache, together with a chunk of samples.
constexpr int64_t kSumBytes = 256 << 10, kChunkBytes = 384 << 10;
constexpr int64_t kHeldBytes = 16 << 20;
constexpr int64_t kTasks = 16, kFewTasks = 8;
// Positions after which adding a tile to memory costs nothing (5 % at 64, 24 adds for 24 products).
constexpr int64_t kChunkPositions = 256;

template <typename scalar_t>
Tasks cut_tasks(const Plan& p) {
  constexpr int64_t RB = row_block<scalar_t>(), W = Simd<scalar_t>::width;
  int64_t size = sizeof(scalar_t), batch = p.sizes.batch;
  Tasks t{};
  for (int64_t i = 0; i < p.piece_count; i++) {
    t.vectors += p.pieces[i].vectors;
    t.lines += p.pieces[i].count[0] * p.pieces[i].count[1];
  }
  t.tile = TILE_ROWS * t.vectors * W;
  t.slab = p.sizes.groups * ceil_div(p.rows, TILE_ROWS) * t.tile;
  int64_t blocks = ceil_div(p.rows, RB), group_bytes = blocks * RB * t.vectors * W * size;
  t.ranges = least(ceil_div(group_bytes, kSumBytes), ceil_div(p.rows, 64));
  int64_t pieces = t.ranges * p.sizes.groups;
  t.slabs = t.slab * size * kTasks <= kSumBytes * kTasks / 4 ? kTasks : ceil_div(kFewTasks, pieces);
  t.slabs = most(1, least(t.slabs, batch));
  int64_t sample = (p.image_scratch + RB * p.length) * size;
  t.chunk = least(ceil_div(kChunkPositions, p.length), kChunkBytes / sample);
  t.chunk = most(1, least(t.chunk, ceil_div(batch, t.slabs)));
  t.held = batch;
  if (t.ranges > 1)
    t.held = most(1, least(batch, kHeldBytes / (p.sizes.groups * p.image_scratch * size)));
  return t;
}

// Adds the tile's lanes to the doubles at `out`.
template <typename scalar_t>
FM_INLINE void add_wide(double* out, typename Simd<scalar_t>::vec v) {
  typedef double wide
      __attribute__((vector_size(8 * Simd<scalar_t>::width), aligned(8), may_alias));
  *reinterpret_cast<wide*>(out) += __builtin_convertvector(v, wide);
}

// One tile of `count` packed samples: added to `total`, its squares to `moment`, and the sum of
// those of sample n, lane by lane, to squares[n * width].
template <PerSample wanted, int M, int NV, typename scalar_t>
FM_INLINE void fused_tile(const Plan& p, const Piece& piece, const scalar_t* blocks,
                          const scalar_t* images, int64_t count, scalar_t* total, scalar_t* moment,
                          double* squares, Ahead* ahead) {
  using vec = typename Simd<scalar_t>::vec;
  constexpr int W = Simd<scalar_t>::width;
  const int64_t block = row_block<scalar_t>() * p.length;
  vec acc[M][NV];
  if constexpr (wanted == PerSample::nothing) {
    gradient_tile<M, NV>(p, piece, blocks, images, acc, ahead);
    for (int64_t n = 1; n < count; n++)
      add_gradient_tile<M, NV>(p, piece, blocks + n * block, images + n * p.image_scratch, acc,
                               ahead);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 3
      for (int j = 0; j < NV; j++) {
        scalar_t* at = total + (i * NV + j) * W;
        store<scalar_t>(at, load(at) + acc[i][j]);
      }
    return;
  }
  for (int64_t n = 0; n < count; n++) {
    gradient_tile<M, NV>(p, piece, blocks + n * block, images + n * p.image_scratch, acc, ahead);
    vec sums[NV]{};
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 3
      for (int j = 0; j < NV; j++) {
        scalar_t* at = total + (i * NV + j) * W;
        vec square = acc[i][j] * acc[i][j];
        store<scalar_t>(at, load(at) + acc[i][j]);
        sums[j] += square;
        if constexpr (wanted == PerSample::norms_and_squares) {
          scalar_t* at2 = moment + (i * NV + j) * W;
          store<scalar_t>(at2, load(at2) + square);
        }
      }
    vec sum{};
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++)
      sum += piece.lanes[j] == W ? sums[j] : first_lanes<scalar_t>(sums[j], piece.lanes[j]);
    add_wide<scalar_t>(squares + n * W, sum);
  }
}

// All columns of up to TILE_ROWS rows.
template <PerSample wanted, int M, typename scalar_t>
void fused_row_tile(const Plan& p, const scalar_t* blocks, const scalar_t* images, int64_t count,
                    scalar_t* total, scalar_t* moment, double* squares, Ahead* ahead) {
  for (int64_t i = 0; i < p.piece_count; i++) {
    const Piece& piece = p.pieces[i];
#define FM_USE(NV) \
  fused_tile<wanted, M, NV>(p, piece, blocks, images, count, total, moment, squares, ahead)
    FM_FOR_PIECE(piece.vectors, FM_USE)
#undef FM_USE
    int64_t size = TILE_ROWS * piece.vectors * Simd<scalar_t>::width;
    total += size;
    if (moment) moment += size;
  }
}

// out[c] = the sum of the n elements of channel c, one after the other at g.
template <typename scalar_t>
void channel_sums(const scalar_t* g, int64_t channels, int64_t n, scalar_t* out) {
  constexpr int W = Simd<scalar_t>::width;
  for (int64_t c = 0; c < channels; c++, g += n) {
    typename Simd<scalar_t>::vec s0{}, s1{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) s0 += load(g + i), s1 += load(g + i + W);
    scalar_t s = i > 0 ? sum<scalar_t>(s0 + s1) : scalar_t(0);
    for (; i < n; i++) s += g[i];
    out[c] = s;
  }
}

// The inputs and outputs of all tasks, and the memory of one thread for a chunk of samples.
template <typename scalar_t>
struct Fused {
  const Plan& p;
  const Tasks& t;
  const scalar_t *rows, *image;
  const ConvResults<scalar_t>& results;
  scalar_t *shared, *totals, *moments;  // `shared` images [held][group], null: packed in each task
  double* partial;                      // [batch][group, range]
  scalar_t *images, *blocks;
  double* squares;

  const scalar_t* sample_rows(int64_t n) const { return rows + n * p.sizes.rows * p.length; }
  const scalar_t* sample_image(int64_t n) const { return image + n * p.sizes.channels * p.pixels; }

  // The images of `count` samples, `step` elements apart.
  const scalar_t* packed(int64_t n, int64_t at, int64_t count, int64_t group) {
    if (shared) return shared + (group * t.held + at) * p.image_scratch;
    for (int64_t k = 0; k < count; k++)
      pack_image(p, sample_image(n + k), group, images + k * p.image_scratch);
    return images;
  }

  // What a task will read of the `count` samples after a chunk, if any.
  Ahead next_chunk(int64_t n0, int64_t at, int64_t count, int64_t group, int64_t from, int64_t to) {
    constexpr int64_t RB = row_block<scalar_t>();
    if (count <= 0) return ahead_of(pieces(rows, 0), pieces(rows, 0), 1);
    int64_t row = group * p.rows + from * RB, rows = least(to * RB, p.rows) - from * RB;
    Pieces of_rows = pieces(sample_rows(n0 + at) + row * p.length, rows * p.length,
                            p.sizes.rows * p.length, count);
    Pieces of_image = shared ? pieces(packed(n0 + at, at, count, group), count * p.image_scratch)
                             : pieces(sample_image(n0 + at) + group * p.channels * p.pixels,
                                      p.channels * p.pixels, p.sizes.channels * p.pixels, count);
    return ahead_of(of_rows, of_image, t.chunk * t.lines * ceil_div(rows, TILE_ROWS));
  }

  // Rows [row, row + row_block) of a chunk of samples.
  template <PerSample wanted>
  void row_block_tiles(int64_t n, int64_t count, int64_t group, int64_t row,
                       const scalar_t* packed_images, int64_t at, Ahead& ahead) {
    constexpr int RB = row_block<scalar_t>(), M = TILE_ROWS, HALF = TILE_ROWS / 2;
    for (int64_t k = 0; k < count; k++)
      pack_rows(p, sample_rows(n + k), group, row, blocks + k * RB * p.length);
    if (results.bias && !p.sizes.is_transposed)
      for (int64_t k = 0; k < count; k++)
        channel_sums(sample_rows(n + k) + (group * p.rows + row) * p.length,
                     least(RB, p.rows - row), p.length,
                     results.bias + (n + k) * p.sizes.rows + group * p.rows + row);
    for (int64_t r = 0; r < RB && row + r < p.rows; r += M, at += t.tile) {
      scalar_t *total = totals + at, *moment = moments ? moments + at : nullptr;
      if (p.rows - row - r > HALF)
        fused_row_tile<wanted, M>(p, blocks + r, packed_images, count, total, moment, squares,
                                  &ahead);
      else
        fused_row_tile<wanted, HALF>(p, blocks + r, packed_images, count, total, moment, squares,
                                     &ahead);
    }
  }

  // Samples [n0 + first, n0 + last) of one range of a group.
  template <PerSample wanted>
  void task(int64_t n0, int64_t first, int64_t last, int64_t slab, int64_t group, int64_t range) {
    constexpr int RB = row_block<scalar_t>(), W = Simd<scalar_t>::width;
    int64_t blocks_of_group = ceil_div(p.rows, RB), row_tiles = ceil_div(p.rows, TILE_ROWS);
    int64_t from = blocks_of_group * range / t.ranges,
            to = blocks_of_group * (range + 1) / t.ranges;
    for (int64_t i = first; i < last; i += t.chunk) {
      int64_t count = least(t.chunk, last - i);
      const scalar_t* of_chunk = packed(n0 + i, i, count, group);
      Ahead ahead =
          next_chunk(n0, i + t.chunk, least(t.chunk, last - i - t.chunk), group, from, to);
      memset(squares, 0, count * W * sizeof(double));
      for (int64_t b = from; b < to; b++)
        row_block_tiles<wanted>(n0 + i, count, group, b * RB, of_chunk,
                                slab * t.slab + (group * row_tiles + b * RB / TILE_ROWS) * t.tile,
                                ahead);
      for (int64_t k = 0; partial && k < count; k++) {
        double sum = 0;
        for (int64_t j = 0; j < W; j++) sum += squares[k * W + j];
        partial[((n0 + i + k) * p.sizes.groups + group) * t.ranges + range] = sum;
      }
    }
  }
};

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
      int64_t group = row / p.rows, r = row % p.rows;
      const scalar_t* at = totals + (group * row_tiles + r / TILE_ROWS) * t.tile;
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
      for (int64_t c = 0; c < p.channels; c++)
        for (int64_t tap = 0; tap < p.taps; tap++)
          weight[row * p.columns + c * p.taps + tap] = columns[tap * p.channels + c];
    }
    free(columns);
  }
}

template <PerSample wanted, typename scalar_t>
void run_tasks(const Plan& p, const Tasks& t, const scalar_t* rows, const scalar_t* image,
               const ConvResults<scalar_t>& results, scalar_t* totals, scalar_t* moments,
               double* partial, int threads) {
  constexpr int RB = row_block<scalar_t>(), W = Simd<scalar_t>::width;
  int64_t groups = p.sizes.groups, of_groups = t.held * groups;
  scalar_t* shared = t.ranges > 1 ? allocate<scalar_t>(of_groups * p.image_scratch) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t own = (shared ? 0 : t.chunk) * p.image_scratch;
    scalar_t* images = allocate<scalar_t>(own);
    scalar_t* blocks = allocate<scalar_t>(t.chunk * RB * p.length);
    double* squares = allocate<double>(t.chunk * W);
    memset(images, 0, own * sizeof(scalar_t));
    Fused<scalar_t> fused{p,      t,       rows,    image,  results, shared,
                          totals, moments, partial, images, blocks,  squares};
    for (int64_t n0 = 0; n0 < p.sizes.batch; n0 += t.held) {
      int64_t count = least(t.held, p.sizes.batch - n0);
      if (shared) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * groups; i++) {
          int64_t n = i / groups, group = i % groups;
          scalar_t* to = shared + (group * t.held + n) * p.image_scratch;
          if (n0 == 0) memset(to, 0, p.image_scratch * sizeof(scalar_t));
          pack_image(p, fused.sample_image(n0 + n), group, to);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < t.count(p); i++) {
        int64_t slab = i / (groups * t.ranges);
        fused.template task<wanted>(n0, count * slab / t.slabs, count * (slab + 1) / t.slabs, slab,
                                    i / t.ranges % groups, i % t.ranges);
      }
    }
    if (results.bias && p.sizes.is_transposed) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.sizes.batch; n++)
        channel_sums(fused.sample_image(n), p.sizes.channels, p.pixels,
                     results.bias + n * p.sizes.channels);
    }
    free(images);
    free(blocks);
    free(squares);
  }
  free(shared);
}

template <typename scalar_t>
void fused(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
           const ConvResults<scalar_t>& results, int threads) {
  Plan p;
  make_plan<scalar_t>(p, s);
  Tasks t = cut_tasks<scalar_t>(p);
  int64_t size = t.slabs * t.slab, units = s.groups * t.ranges;
  scalar_t* totals = allocate<scalar_t>(size);
  scalar_t* moments = results.moment ? allocate<scalar_t>(size) : nullptr;
  double* partial = results.norms ? allocate<double>(s.batch * units) : nullptr;
  memset(totals, 0, size * sizeof(scalar_t));
  if (moments) memset(moments, 0, size * sizeof(scalar_t));
  auto run = results.moment  ? run_tasks<PerSample::norms_and_squares, scalar_t>
             : results.norms ? run_tasks<PerSample::norms, scalar_t>
                             : run_tasks<PerSample::nothing, scalar_t>;
  run(p, t, rows, image, results, totals, moments, partial, threads);
  store_sums(p, t, totals, results.grad, threads);
  if (moments) store_sums(p, t, moments, results.moment, threads);
  for (int64_t n = 0; results.norms && n < s.batch; n++) {
    double total = 0;
    for (int64_t i = 0; i < units; i++) total += partial[n * units + i];
    results.norms[n] = scalar_t(total);
  }
  free(totals);
  free(moments);
  free(partial);
  free_plan(p);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
