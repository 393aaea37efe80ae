// The gradient of a convolution's weight, with the squared norms and the sum of the squares of
// every sample's from the same tiles.
#pragma once

#include "cpu/conv_fused_tile.h"

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
  if (t.ranges > 1)
    t.held = most(1, least(batch, kHeldBytes / (groups * p.image_scratch * size)));
  t.slabs = t.slab * size <= kSmallSlabBytes ? kSmallSlabs : ceil_div(kTasks, t.ranges * groups);
  t.slabs = least(t.slabs, t.held);
  int64_t sample = (p.image_scratch + RB * p.length) * size;
  t.chunk = least(ceil_div(kChunkPositions, p.length), kChunkBytes / sample);
  t.chunk = most(1, least(t.chunk, ceil_div(t.held, t.slabs)));
  return t;
}

// out[c] = the sum of the n elements of channel c.
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

// What all tasks read and write.
template <typename scalar_t>
struct Fused {
  const Plan& p;
  const Tasks& t;
  const scalar_t *rows, *image;
  const ConvResults<scalar_t>& results;
  scalar_t *shared;            // images [group][held], or null: packed in each task
  scalar_t *totals, *moments;  // [slab]
  double* partial;             // [batch][group][range], or null

  const scalar_t* rows_of(int64_t n, int64_t row) const {
    return rows + (n * p.sizes.rows + row) * p.length;
  }
  const scalar_t* image_of(int64_t n) const { return image + n * p.sizes.channels * p.pixels; }
};

// One thread at work: the task that it has, and memory for a chunk of samples.
template <typename scalar_t>
struct Worker {
  static constexpr int64_t RB = row_block<scalar_t>(), W = Simd<scalar_t>::width;
  const Fused<scalar_t>& f;
  const Plan& p;
  const Tasks& t;
  scalar_t *images, *blocks;
  double* squares;
  int64_t n0, slab, group, range, from, to;  // first of the samples that are held; row blocks

  explicit Worker(const Fused<scalar_t>& fused) : f(fused), p(fused.p), t(fused.t) {
    int64_t own = (f.shared ? 0 : t.chunk) * p.image_scratch;
    images = allocate<scalar_t>(own);
    blocks = allocate<scalar_t>(t.chunk * RB * p.length);
    squares = allocate<double>(t.chunk * W);
    memset(images, 0, own * sizeof(scalar_t));
  }

  void release() {
    free(images);
    free(blocks);
    free(squares);
  }

  void take(int64_t first, int64_t task) {
    n0 = first;
    slab = task / (p.sizes.groups * t.ranges);
    group = task / t.ranges % p.sizes.groups, range = task % t.ranges;
    int64_t all = ceil_div(p.rows, RB);
    from = all * range / t.ranges, to = all * (range + 1) / t.ranges;
  }

  // The images of held samples [at, at + count).
  const scalar_t* packed(int64_t at, int64_t count) {
    if (f.shared) return f.shared + (group * t.held + at) * p.image_scratch;
    for (int64_t k = 0; k < count; k++)
      pack_image(p, f.image_of(n0 + at + k), group, images + k * p.image_scratch);
    return images;
  }

  // What will be read of held samples [at, at + count), the next chunk.
  Ahead next_chunk(int64_t at, int64_t count) {
    int64_t row = group * p.rows + from * RB, height = least(to * RB, p.rows) - from * RB;
    Pieces of_rows = pieces(f.rows_of(n0 + at, row), count > 0 ? height * p.length : 0,
                            p.sizes.rows * p.length, count);
    int64_t plane = p.channels * p.pixels;
    Pieces of_image = f.shared ? pieces(packed(at, count), count * p.image_scratch)
                               : pieces(f.image_of(n0 + at) + group * plane, count > 0 ? plane : 0,
                                        p.sizes.channels * p.pixels, count);
    return ahead_of(of_rows, of_image, t.chunk * t.lines * ceil_div(height, TILE_ROWS));
  }

  // Rows [row, row + row_block) of held samples [at, at + count).
  template <PerSample wanted>
  void row_block_tiles(int64_t row, int64_t at, Chunk<scalar_t> chunk, Sums<scalar_t> sums,
                       Ahead* ahead) {
    constexpr int M = TILE_ROWS, HALF = TILE_ROWS / 2;
    int64_t first = group * p.rows + row, height = least(RB, p.rows - row);
    for (int64_t n = n0 + at, k = 0; k < chunk.count; n++, k++) {
      pack_rows(p, f.rows_of(n, 0), group, row, blocks + k * RB * p.length);
      if (f.results.bias && !p.sizes.is_transposed)
        channel_sums(f.rows_of(n, first), height, p.length,
                     f.results.bias + n * p.sizes.rows + first);
    }
    for (int64_t r = 0; r < height; r += M, sums.total += t.tile) {
      chunk.blocks = blocks + r;
      if (height - r > HALF)
        row_tile<wanted, M>(p, chunk, sums, ahead);
      else
        row_tile<wanted, HALF>(p, chunk, sums, ahead);
      if (sums.moment) sums.moment += t.tile;
    }
  }

  // Held samples [first, last).
  template <PerSample wanted>
  void run(int64_t first, int64_t last) {
    int64_t row_tiles = ceil_div(p.rows, TILE_ROWS);
    for (int64_t i = first; i < last; i += t.chunk) {
      Chunk<scalar_t> chunk{nullptr, nullptr, least(t.chunk, last - i)};
      chunk.images = packed(i, chunk.count);
      Ahead ahead = next_chunk(i + chunk.count, least(t.chunk, last - i - chunk.count));
      memset(squares, 0, chunk.count * W * sizeof(double));
      for (int64_t b = from; b < to; b++) {
        int64_t at = slab * t.slab + (group * row_tiles + b * RB / TILE_ROWS) * t.tile;
        Sums<scalar_t> sums{f.totals + at, f.moments ? f.moments + at : nullptr, squares,
                            n0 == 0 && i == first};
        row_block_tiles<wanted>(b * RB, i, chunk, sums, &ahead);
      }
      for (int64_t k = 0; f.partial && k < chunk.count; k++) {
        double sum = 0;
        for (int64_t j = 0; j < W; j++) sum += squares[k * W + j];
        f.partial[((n0 + i + k) * p.sizes.groups + group) * t.ranges + range] = sum;
      }
    }
  }
};

// out[c][tap] = in[tap][c], `out` being the memory of a whole row of the weight.
template <typename scalar_t>
void taps_last(const scalar_t* in, int64_t channels, int64_t taps, scalar_t* out) {
  constexpr int W = Simd<scalar_t>::width;
  int64_t c = 0;
  // Each channel is stored as a whole vector, the next one over what is too much of it.
  if (taps == 1) {
    memcpy(out, in, channels * sizeof(scalar_t));
    return;
  }
  if (taps <= W)
    for (; (c + W - 1) * taps + W <= channels * taps; c += W) {
      typename Simd<scalar_t>::vec v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        v[i] = i < taps ? load(in + i * channels + c) : typename Simd<scalar_t>::vec{};
      transpose<scalar_t>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store<scalar_t>(out + (c + i) * taps, v[i]);
    }
  for (; c < channels; c++)
    for (int64_t tap = 0; tap < taps; tap++) out[c * taps + tap] = in[tap * channels + c];
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

template <PerSample wanted, typename scalar_t>
void run_tasks(const Fused<scalar_t>& f, int threads) {
  const Plan& p = f.p;
  const Tasks& t = f.t;
  int64_t groups = p.sizes.groups;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker<scalar_t> worker(f);
    for (int64_t n0 = 0; n0 < p.sizes.batch; n0 += t.held) {
      int64_t count = least(t.held, p.sizes.batch - n0);
      if (f.shared) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * groups; i++) {
          scalar_t* to = f.shared + (i % groups * t.held + i / groups) * p.image_scratch;
          if (n0 == 0) memset(to, 0, p.image_scratch * sizeof(scalar_t));
          pack_image(p, f.image_of(n0 + i / groups), i % groups, to);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < t.slabs * groups * t.ranges; i++) {
        worker.take(n0, i);
        worker.template run<wanted>(count * worker.slab / t.slabs,
                                    count * (worker.slab + 1) / t.slabs);
      }
    }
    if (f.results.bias && p.sizes.is_transposed) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.sizes.batch; n++)
        channel_sums(f.image_of(n), p.sizes.channels, p.pixels,
                     f.results.bias + n * p.sizes.channels);
    }
    worker.release();
  }
}

template <typename scalar_t>
void fused(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
           const ConvResults<scalar_t>& results, int threads) {
  Plan p;
  make_plan<scalar_t>(p, s);
  Tasks t = cut_tasks<scalar_t>(p);
  int64_t units = s.groups * t.ranges, size = t.slabs * t.slab;
  Fused<scalar_t> f{p, t, rows, image, results, nullptr, allocate<scalar_t>(size), nullptr, nullptr};
  if (t.ranges > 1) f.shared = allocate<scalar_t>(t.held * s.groups * p.image_scratch);
  if (results.moment) f.moments = allocate<scalar_t>(size);
  if (results.norms) f.partial = allocate<double>(s.batch * units);
  auto run = results.moment  ? run_tasks<PerSample::norms_and_squares, scalar_t>
             : results.norms ? run_tasks<PerSample::norms, scalar_t>
                             : run_tasks<PerSample::nothing, scalar_t>;
  run(f, threads);
  store_sums(p, t, f.totals, results.grad, threads);
  if (results.moment) store_sums(p, t, f.moments, results.moment, threads);
  for (int64_t n = 0; results.norms && n < s.batch; n++) {
    double total = 0;
    for (int64_t i = 0; i < units; i++) total += f.partial[n * units + i];
    results.norms[n] = scalar_t(total);
  }
  free(f.shared);
  free(f.totals);
  free(f.moments);
  free(f.partial);
  free_plan(p);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
