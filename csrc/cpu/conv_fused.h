// The gradient of a convolution's weight, with the squared norms and the sum of the squares of
// every sample's from the same tiles.
#pragma once

#include "cpu/conv_fused_tasks.h"
#include "cpu/conv_fused_tile.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// What all tasks read and write.
template <typename scalar_t>
struct Fused {
  const Plan& p;
  const Tasks& t;
  const scalar_t *rows, *image;
  const ConvResults<scalar_t>& results;
  scalar_t* shared;            // images [group][held], or null: packed in each task
  scalar_t *totals, *moments;  // [slab]
  double* partial;             // [batch][group][range], or null

  const scalar_t* rows_of(int64_t n) const { return rows + n * p.sizes.rows * p.length; }
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

  // Channels [from, from + width) of `count` samples in a row.
  static Pieces of_channels(const scalar_t* x, int64_t channels, int64_t n, bool last, int64_t from,
                            int64_t width, int64_t count) {
    return last ? pieces(x + from, count > 0 ? width : 0, channels, count * n)
                : pieces(x + from * n, count > 0 ? width * n : 0, channels * n, count);
  }

  // What will be read of held samples [at, at + count), the next chunk.
  Ahead next_chunk(int64_t at, int64_t count) {
    int64_t row = group * p.rows + from * RB, height = least(to * RB, p.rows) - from * RB;
    const ConvSizes& s = p.sizes;
    Pieces of_rows =
        of_channels(f.rows_of(n0 + at), s.rows, p.length, s.rows_last, row, height, count);
    Pieces of_image = f.shared ? pieces(packed(at, count), count * p.image_scratch)
                               : of_channels(f.image_of(n0 + at), s.channels, p.pixels,
                                             s.image_last, group * p.channels, p.channels, count);
    return ahead_of(of_rows, of_image, t.chunk * t.lines * ceil_div(height, TILE_ROWS));
  }

  // Rows [row, row + row_block) of held samples [at, at + count).
  template <PerSample wanted>
  void row_block_tiles(int64_t row, int64_t at, Chunk<scalar_t> chunk, Sums<scalar_t> sums,
                       Ahead* ahead) {
    constexpr int M = TILE_ROWS, HALF = TILE_ROWS / 2;
    int64_t first = group * p.rows + row, height = least(RB, p.rows - row);
    for (int64_t n = n0 + at, k = 0; k < chunk.count; n++, k++) {
      pack_rows(p, f.rows_of(n), group, row, blocks + k * RB * p.length);
      if (f.results.bias && !p.sizes.is_transposed)
        channel_sums(f.rows_of(n), p.sizes.rows, p.length, p.sizes.rows_last, first, height,
                     f.results.bias + n * p.sizes.rows);
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
        channel_sums(f.image_of(n), p.sizes.channels, p.pixels, p.sizes.image_last, 0,
                     p.sizes.channels, f.results.bias + n * p.sizes.channels);
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
  Fused<scalar_t> f{p,       t,      rows, image, results, nullptr, allocate<scalar_t>(size),
                    nullptr, nullptr};
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
