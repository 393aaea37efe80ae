// Second moments of dense weights with one row a sample: sum_n g[n]^2 (x) a[n]^2, squares made
// while they are packed.
#include "cpu/dense_moment.h"

#include "cpu/dense_squares.h"
#include "parallel.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Part of the sums, [outputs, panel_width], one right panel after the other.
template <typename scalar_t>
struct Moment {
  const Squares<scalar_t>& squares;
  int64_t first, last;  // of the chunks
  const scalar_t* right;
  int64_t block;
  bool is_finite;  // what the right panel holds
  scalar_t* sums;  // of the chunks from `first` on
};

// Skips what is zero: a row of sums at a time, a vector of the right panel loaded for each
// multiply-add, which processors do at the same rate. Nothing is skipped where zero times the
// other factor is NaN.
template <typename scalar_t>
struct Skipping {
  // Accumulators. The panel takes 28 KiB with AVX-512.
  static constexpr int most = FM_BYTES == 64 ? 7 : 8;
  static constexpr int stride(int vecs) { return vecs * Simd<scalar_t>::width; }

  template <int vecs>
  FM_INLINE void run(const Moment<scalar_t>& m) {
    using vec = typename Simd<scalar_t>::vec;
    constexpr int W = Simd<scalar_t>::width, C = Squares<scalar_t>::chunk;
    int64_t samples = m.squares.samples(m.block);
    uint64_t all = samples == 64 ? ~uint64_t{0} : (uint64_t{1} << samples) - 1;
    scalar_t* out = m.sums;
    for (int64_t c = m.first; c < m.last; c++) {
      const scalar_t* values = m.squares.at(m.block, c);
      const uint64_t* masks = m.squares.masks_at(m.block, c);
      for (int i = 0; i < C; i++, out += vecs * W) {
        vec s[vecs] = {};
        for (uint64_t mask = m.is_finite ? masks[i] : all; mask; mask &= mask - 1) {
          int64_t n = __builtin_ctzll(mask);
          const scalar_t* row = m.right + n * vecs * W;
          vec left = splat(values[n * C + i]);
#pragma GCC unroll 8
          for (int j = 0; j < vecs; j++) s[j] = left * load(row + j * W) + s[j];
        }
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) store(out + j * W, load(out + j * W) + s[j]);
      }
    }
  }
};

// Multiplies everything, in tiles.
template <typename scalar_t>
struct Tiled {
  static constexpr int most = Tile<scalar_t>::vecs;
  static constexpr int stride(int) { return Tile<scalar_t>::cols; }

  template <int vecs>
  FM_INLINE void run(const Moment<scalar_t>& m) {
    using T = Tile<scalar_t>;
    constexpr int C = Squares<scalar_t>::chunk;
    int64_t samples = m.squares.samples(m.block);
    scalar_t* out = m.sums;
    for (int64_t c = m.first; c < m.last; c++)
      for (int i = 0; i < C; i += T::rows, out += T::rows * T::cols) {
        typename Simd<scalar_t>::vec s[T::rows][vecs];
        multiply<scalar_t, vecs>(m.squares.at(m.block, c) + i, C, m.right, samples, s);
#pragma GCC unroll 8
        for (int j = 0; j < T::rows; j++)
#pragma GCC unroll 8
          for (int k = 0; k < vecs; k++) {
            scalar_t* at = out + j * T::cols + k * T::width;
            store(at, load(at) + s[j][k]);
          }
      }
  }
};

template <template <typename> class way, typename scalar_t, int vecs = way<scalar_t>::most>
void with_width(int64_t wanted, const Moment<scalar_t>& m) {
  if (wanted == vecs) return way<scalar_t>::template run<vecs>(m);
  if constexpr (vecs > 1) with_width<way, scalar_t, vecs - 1>(wanted, m);
}

// Outputs whose sums stay in the second cache while the samples are added to them.
constexpr int64_t kOutputs = 512;

// Share of squares other than zero from which on it is faster to multiply them all.
constexpr double kFull = 0.7;

template <typename scalar_t>
struct OneRow {
  const scalar_t* a;
  int64_t a_stride;
  const scalar_t* g;
  int64_t g_stride, batch, d_in, d_out;
};

// Some vectors of the rows of total [outputs, d_in], for chunks `first` to `last` of the outputs.
template <template <typename> class way, typename scalar_t>
void moment_part(const OneRow<scalar_t>& x, const Squares<scalar_t>& squares, int64_t first,
                 int64_t last, int64_t outs, int64_t vector, int vecs, scalar_t* right,
                 scalar_t* sums, scalar_t* total) {
  constexpr int W = Simd<scalar_t>::width, C = Squares<scalar_t>::chunk;
  int64_t column = vector * W, count = least(x.d_in - column, vecs * W);
  int64_t stride = way<scalar_t>::stride(vecs), end = least(outs, last * C);
  memset(sums, 0, (last - first) * C * stride * sizeof(scalar_t));
  for (int64_t block = 0; block < squares.blocks(); block++) {
    const scalar_t* a = x.a + block * kBlock * x.a_stride + column;
    int64_t samples = squares.samples(block);
    bool is_finite = pack_squared_right(a, x.a_stride, samples, count, stride, right);
    with_width<way>(vecs, Moment<scalar_t>{squares, first, last, right, block, is_finite, sums});
  }
  for (int64_t o = first * C; o < end; o++, sums += stride)
    memcpy(total + o * x.d_in + column, sums, count * sizeof(scalar_t));
}

template <template <typename> class way, typename scalar_t>
void moment_of(const OneRow<scalar_t>& x, const Squares<scalar_t>& squares, int64_t outs,
               scalar_t* total, int threads) {
  constexpr int W = Simd<scalar_t>::width, C = Squares<scalar_t>::chunk;
  constexpr int most = way<scalar_t>::most;
  int64_t vectors = (x.d_in + W - 1) / W, parts = (vectors + most - 1) / most;
  int64_t pieces = least(threads, squares.chunks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    scalar_t* right = scratch<scalar_t>(kBlock * most * W);
    scalar_t* sums = scratch<scalar_t>((squares.chunks / pieces + 1) * C * most * W);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < parts * pieces; i++) {
      int64_t part = i / pieces, piece = i % pieces, vector = vectors * part / parts;
      int vecs = static_cast<int>(vectors * (part + 1) / parts - vector);
      int64_t first = squares.chunks * piece / pieces, last = squares.chunks * (piece + 1) / pieces;
      moment_part<way>(x, squares, first, last, outs, vector, vecs, right, sums, total);
    }
    free(sums);
    free(right);
  }
}

// total[o, i] = sum_n g[n, o]^2 a[n, i]^2. Each element is summed by one thread, in the same order
// whatever their number.
template <typename scalar_t>
void row_second_moment(const OneRow<scalar_t>& x, scalar_t* total, int threads) {
  constexpr int C = Squares<scalar_t>::chunk;
  threads = useful_threads(threads, x.batch * (x.d_in + x.d_out) * sizeof(scalar_t));
  for (int64_t o = 0; o < x.d_out; o += kOutputs) {
    int64_t outs = least(x.d_out - o, kOutputs), found = 0;
    Squares<scalar_t> squares(x.batch, outs);
    int64_t pieces = squares.blocks() * squares.chunks;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : found) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++) {
      int64_t block = i / squares.chunks, c = i % squares.chunks;
      const scalar_t* g = x.g + block * kBlock * x.g_stride + o + c * C;
      found += pack_squares(g, x.g_stride, squares.samples(block), least(outs - c * C, C),
                            squares.at(block, c), squares.masks_at(block, c));
    }
    if (found < kFull * static_cast<double>(x.batch * outs))
      moment_of<Skipping>(x, squares, outs, total + o * x.d_in, threads);
    else
      moment_of<Tiled>(x, squares, outs, total + o * x.d_in, threads);
  }
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                             \
  void row_second_moment_##suffix(const scalar_t* a, int64_t a_stride, const scalar_t* g,       \
                                  int64_t g_stride, int64_t batch, int64_t d_in, int64_t d_out, \
                                  scalar_t* total, int threads) {                               \
    row_second_moment(OneRow<scalar_t>{a, a_stride, g, g_stride, batch, d_in, d_out}, total,    \
                      threads);                                                                 \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima
