// Sums over samples with one row each: the weight's gradient sum_n g[n] (x) a[n] and its second
// moment sum_n g[n]^2 (x) a[n]^2, squares made while they are packed.
#include "cpu/dense_rows.h"

#include "cpu/dense_products.h"
#include "parallel.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Columns of the left side whose sums stay in the second cache while samples are added to them.
constexpr int64_t kColumns = 512;

// Of output gradients and inputs one is on the left, and the other on the right.
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
template <template <typename> class way, int power, typename scalar_t>
void sum_part(const RowProduct<scalar_t>& x, const Chunks<scalar_t>& left, int64_t origin,
              int64_t first, int64_t last, int64_t vector, int vecs, scalar_t* right,
              scalar_t* sums) {
  constexpr int W = Simd<scalar_t>::width, C = Chunks<scalar_t>::chunk;
  int64_t column = vector * W, count = least(x.right_width - column, vecs * W);
  int64_t stride = way<scalar_t>::stride(vecs);
  if (x.batch == 0) memset(sums, 0, (last - first) * C * stride * sizeof(scalar_t));
  for (int64_t block = 0; block < left.blocks(); block++) {
    const scalar_t* rows = x.right + block * kBlock * x.right_stride + column;
    int64_t samples = left.samples(block);
    bool is_finite = pack_finite<power>(rows, x.right_stride, samples, count, stride, right);
    with_width<way>(vecs, Part<scalar_t>{left, first, last, right, block, is_finite, sums});
  }
  int64_t end = least(x.left_width, origin + last * C);
  write_sums(x, origin + first * C, end, column, count, sums, stride);
}

template <template <typename> class way, int power, typename scalar_t>
void sum_of(const RowProduct<scalar_t>& x, const Chunks<scalar_t>& left, int64_t origin,
            int threads) {
  constexpr int W = Simd<scalar_t>::width, C = Chunks<scalar_t>::chunk;
  constexpr int most = way<scalar_t>::most;
  int64_t vectors = (x.right_width + W - 1) / W, parts = (vectors + most - 1) / most;
  int64_t pieces = least(threads, left.chunks);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    scalar_t* right = scratch<scalar_t>(kBlock * most * W);
    scalar_t* sums = scratch<scalar_t>((left.chunks / pieces + 1) * C * most * W);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < parts * pieces; i++) {
      int64_t part = i / pieces, piece = i % pieces, vector = vectors * part / parts;
      int vecs = static_cast<int>(vectors * (part + 1) / parts - vector);
      int64_t first = left.chunks * piece / pieces, last = left.chunks * (piece + 1) / pieces;
      sum_part<way, power>(x, left, origin, first, last, vector, vecs, right, sums);
    }
    free(sums);
    free(right);
  }
}

// Each element is summed by one thread, in the same order whatever their number.
template <template <typename> class way, int power, typename scalar_t>
void multiply_rows(const RowProduct<scalar_t>& x, int threads) {
  constexpr int C = Chunks<scalar_t>::chunk;
  for (int64_t origin = 0; origin < x.left_width; origin += kColumns) {
    int64_t columns = least(x.left_width - origin, kColumns);
    Chunks<scalar_t> left(x.batch, columns);
    int64_t pieces = left.blocks() * left.chunks;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < pieces; i++) {
      int64_t block = i / left.chunks, c = i % left.chunks;
      const scalar_t* rows = x.left + block * kBlock * x.left_stride + origin + c * C;
      pack_chunk<power>(rows, x.left_stride, left.samples(block), least(columns - c * C, C),
                        left.at(block, c), left.masks_at(block, c));
    }
    sum_of<way, power>(x, left, origin, threads);
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

// What is made of the rows of one side and the other, the cheapest way.
template <typename scalar_t>
struct Chosen {
  RowProduct<scalar_t> product;
  bool skips;

  Chosen(const RowProduct<scalar_t>& x, const RowProduct<scalar_t>& transposed)
      : product(x), skips(false) {
    double costs[] = {tiled_cost(x), skipping_cost(x), tiled_cost(transposed),
                      skipping_cost(transposed)};
    int best = 0;
    for (int i = 1; i < 4; i++)
      if (costs[i] < costs[best]) best = i;
    if (best > 1) product = transposed;
    skips = best % 2 == 1;
  }

  template <int power>
  void write(scalar_t* total, int threads) {
    product.total = total;
    if (skips)
      multiply_rows<Skipping, power>(product, threads);
    else
      multiply_rows<Tiled, power>(product, threads);
  }
};

// grad[o, i] = sum_n g[n, o] a[n, i] and moment[o, i] = sum_n g[n, o]^2 a[n, i]^2, unless null.
template <typename scalar_t>
void row_sums(const scalar_t* a, int64_t a_stride, const scalar_t* g, int64_t g_stride,
              int64_t batch, int64_t d_in, int64_t d_out, scalar_t* grad, scalar_t* moment,
              int threads) {
  threads = useful_threads(threads, batch * (d_in + d_out) * sizeof(scalar_t));
  Chosen<scalar_t> chosen({g, g_stride, d_out, a, a_stride, d_in, batch, nullptr, false},
                          {a, a_stride, d_in, g, g_stride, d_out, batch, nullptr, true});
  if (grad) chosen.template write<1>(grad, threads);
  if (moment) chosen.template write<2>(moment, threads);
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                                \
  void row_sums_##suffix(const scalar_t* a, int64_t a_stride, const scalar_t* g, int64_t g_stride, \
                         int64_t batch, int64_t d_in, int64_t d_out, scalar_t* grad,               \
                         scalar_t* moment, int threads) {                                          \
    row_sums(a, a_stride, g, g_stride, batch, d_in, d_out, grad, moment, threads);                 \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima
