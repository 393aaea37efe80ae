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

// Adds to a sum; the first block finds none there.
template <typename scalar_t>
FM_INLINE void put(const Moment<scalar_t>& m, scalar_t* sum, typename Simd<scalar_t>::vec x) {
  store(sum, m.block == 0 ? x : load(sum) + x);
}

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
        for (int j = 0; j < vecs; j++) put(m, out + j * W, s[j]);
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
          for (int k = 0; k < vecs; k++) put(m, out + j * T::cols + k * T::width, s[j][k]);
      }
  }
};

template <template <typename> class way, typename scalar_t, int vecs = way<scalar_t>::most>
void with_width(int64_t wanted, const Moment<scalar_t>& m) {
  if (wanted == vecs) return way<scalar_t>::template run<vecs>(m);
  if constexpr (vecs > 1) with_width<way, scalar_t, vecs - 1>(wanted, m);
}

// Columns of the left side whose sums stay in the second cache while samples are added to them.
constexpr int64_t kColumns = 512;

// Of one row a sample, one is on the left and one on the right: total[o, i] += g[o]^2 a[i]^2.
template <typename scalar_t>
struct RowProduct {
  const scalar_t* left;
  int64_t left_stride, left_width;
  const scalar_t* right;
  int64_t right_stride, right_width, batch;
  scalar_t* total;
  bool is_transposed;  // the inputs are on the left
};

// Writes sums [columns of the left side, stride] as the weight is laid out.
template <typename scalar_t>
void write_sums(const RowProduct<scalar_t>& x, int64_t first, int64_t end, int64_t column,
                int64_t count, const scalar_t* sums, int64_t stride) {
  constexpr int W = Simd<scalar_t>::width;
  if (!x.is_transposed) {
    for (int64_t i = first; i < end; i++, sums += stride)
      memcpy(x.total + i * x.right_width + column, sums, count * sizeof(scalar_t));
    return;
  }
  int64_t width = x.left_width;
  for (int64_t i = first; i < end; i += W, sums += W * stride)
    for (int64_t j = 0; j < count; j += W) {
      scalar_t* out = x.total + (column + j) * width + i;
      if (i + W <= end && j + W <= count)
        transpose_square<scalar_t, true>(sums + j, stride, W, out, width);
      else
        for (int64_t k = 0; k < least(count - j, W); k++)
          for (int64_t l = 0; l < least(end - i, W); l++)
            out[k * width + l] = sums[l * stride + j + k];
    }
}

// Some vectors of the right side for chunks `first` to `last` of the left one.
template <template <typename> class way, typename scalar_t>
void moment_part(const RowProduct<scalar_t>& x, const Squares<scalar_t>& squares, int64_t origin,
                 int64_t first, int64_t last, int64_t vector, int vecs, scalar_t* right,
                 scalar_t* sums) {
  constexpr int W = Simd<scalar_t>::width, C = Squares<scalar_t>::chunk;
  int64_t column = vector * W, count = least(x.right_width - column, vecs * W);
  int64_t stride = way<scalar_t>::stride(vecs);
  if (x.batch == 0) memset(sums, 0, (last - first) * C * stride * sizeof(scalar_t));
  for (int64_t block = 0; block < squares.blocks(); block++) {
    const scalar_t* rows = x.right + block * kBlock * x.right_stride + column;
    int64_t samples = squares.samples(block);
    bool is_finite = pack_squared_right(rows, x.right_stride, samples, count, stride, right);
    with_width<way>(vecs, Moment<scalar_t>{squares, first, last, right, block, is_finite, sums});
  }
  int64_t end = least(x.left_width, origin + last * C);
  write_sums(x, origin + first * C, end, column, count, sums, stride);
}

template <template <typename> class way, typename scalar_t>
void moment_of(const RowProduct<scalar_t>& x, const Squares<scalar_t>& squares, int64_t origin,
               int threads) {
  constexpr int W = Simd<scalar_t>::width, C = Squares<scalar_t>::chunk;
  constexpr int most = way<scalar_t>::most;
  int64_t vectors = (x.right_width + W - 1) / W, parts = (vectors + most - 1) / most;
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
      moment_part<way>(x, squares, origin, first, last, vector, vecs, right, sums);
    }
    free(sums);
    free(right);
  }
}

// Each element is summed by one thread, in the same order whatever their number.
template <template <typename> class way, typename scalar_t>
void multiply_squares(const RowProduct<scalar_t>& x, int threads) {
  constexpr int C = Squares<scalar_t>::chunk;
  for (int64_t origin = 0; origin < x.left_width; origin += kColumns) {
    int64_t columns = least(x.left_width - origin, kColumns);
    Squares<scalar_t> squares(x.batch, columns);
    int64_t pieces = squares.blocks() * squares.chunks;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++) {
      int64_t block = i / squares.chunks, c = i % squares.chunks;
      const scalar_t* rows = x.left + block * kBlock * x.left_stride + origin + c * C;
      pack_squares(rows, x.left_stride, squares.samples(block), least(columns - c * C, C),
                   squares.at(block, c), squares.masks_at(block, c));
    }
    moment_of<way>(x, squares, origin, threads);
  }
}

// Share of the elements that are not zero, by every fourth row.
template <typename scalar_t>
double filled(const scalar_t* x, int64_t stride, int64_t rows, int64_t width) {
  int64_t found = 0, read = 0;
  for (int64_t n = 0; n < rows; n += 4, read += width)
    found += count_nonzero(x + n * stride, width);
  return read > 0 ? static_cast<double>(found) / static_cast<double>(read) : 1;
}

// What ways take, in vectors multiplied and added; without what both of them do. A row of few
// accumulators waits for each of its sums, and the end of a row is hard to foresee. Fitted to
// float32 on an AMD EPYC 9004 with AVX-512 and with AVX2, batches of 64 to 512.
template <typename scalar_t>
double skipping_cost(const RowProduct<scalar_t>& x) {
  constexpr int W = Simd<scalar_t>::width, most = Skipping<scalar_t>::most;
  double vectors = (x.right_width + W - 1) / W, parts = (x.right_width + W * most - 1) / (W * most);
  double vecs = vectors / parts, wait = vecs < 3 ? 4 : vecs + 1;
  double share = filled(x.left, x.left_stride, x.batch, x.left_width);
  double cost = x.left_width * parts * (share * wait + (20 + 2 * vecs) / kBlock);
  return x.is_transposed ? 1.1 * cost : cost;
}
template <typename scalar_t>
double tiled_cost(const RowProduct<scalar_t>& x) {
  constexpr int W = Simd<scalar_t>::width, R = Tile<scalar_t>::rows;
  int64_t rows = (x.left_width + R - 1) / R * R, vectors = (x.right_width + W - 1) / W;
  double cost = 1.08 * static_cast<double>(rows) * static_cast<double>(vectors);
  return x.is_transposed ? 1.1 * cost : cost;
}

// total[o, i] = sum_n g[n, o]^2 a[n, i]^2, the cheapest way, with either side on the left.
template <typename scalar_t>
void row_second_moment(const scalar_t* a, int64_t a_stride, const scalar_t* g, int64_t g_stride,
                       int64_t batch, int64_t d_in, int64_t d_out, scalar_t* total, int threads) {
  const RowProduct<scalar_t> sides[] = {
      {g, g_stride, d_out, a, a_stride, d_in, batch, total, false},
      {a, a_stride, d_in, g, g_stride, d_out, batch, total, true}};
  threads = useful_threads(threads, batch * (d_in + d_out) * sizeof(scalar_t));
  const RowProduct<scalar_t>* best = sides;
  bool skips = false;
  double least_cost = tiled_cost(sides[0]);
  for (const auto& side : sides)
    for (int way = 0; way < 2; way++) {
      bool is_skipping = way == 1;
      double cost = is_skipping ? skipping_cost(side) : tiled_cost(side);
      if (cost < least_cost) best = &side, skips = is_skipping, least_cost = cost;
    }
  if (skips)
    multiply_squares<Skipping>(*best, threads);
  else
    multiply_squares<Tiled>(*best, threads);
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                             \
  void row_second_moment_##suffix(const scalar_t* a, int64_t a_stride, const scalar_t* g,       \
                                  int64_t g_stride, int64_t batch, int64_t d_in, int64_t d_out, \
                                  scalar_t* total, int threads) {                               \
    row_second_moment(a, a_stride, g, g_stride, batch, d_in, d_out, total, threads);            \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima
