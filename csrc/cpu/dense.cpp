// Per-sample statistics of the weight of a dense layer.
#include "cpu/dense.h"

#include "cpu/dense_panels.h"
#include "cpu/dense_short.h"
#include "parallel.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// weight[n] = |a[n]|^2 |g[n]|^2 and bias[n] = |g[n]|^2: one row a sample.
template <typename scalar_t>
void row_sq_norms(const scalar_t* a, int64_t a_stride, const scalar_t* g, int64_t g_stride,
                  int64_t batch, int64_t d_in, int64_t d_out, scalar_t* weight, scalar_t* bias,
                  int threads) {
  threads = streaming_threads(threads, batch * (d_in + d_out) * sizeof(scalar_t));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < batch; n++) {
    scalar_t gg = sq_norm(g + n * g_stride, d_out);
    bias[n] = gg;
    weight[n] = gg * sq_norm(a + n * a_stride, d_in);
  }
}

// |sum_t g[t]|^2, in columns of four vectors.
template <typename scalar_t>
double bias_sq_norm(const scalar_t* g, int64_t stride, int64_t time, int64_t width) {
  constexpr int W = Simd<scalar_t>::width;
  double total = 0;
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) {
    typename Simd<scalar_t>::vec s[4] = {};
    for (int64_t t = 0; t < time; t++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) s[j] += load(g + t * stride + i + j * W);
    total += sum<scalar_t>((s[0] * s[0] + s[1] * s[1]) + (s[2] * s[2] + s[3] * s[3]));
  }
  for (; i < width; i += W) {
    typename Simd<scalar_t>::vec s{};
    int64_t left = width - i;
    for (int64_t t = 0; t < time; t++)
      s += left >= W ? load(g + t * stride + i) : load_first(g + t * stride + i, left);
    total += sum<scalar_t>(s * s);
  }
  return total;
}

// sum (a_t . a_s)(g_t . g_s) over the entries of one tile, those left of the diagonal twice.
template <typename scalar_t>
struct GramTile {
  const scalar_t *a_left, *a_right, *g_left, *g_right;
  int64_t d_in, d_out;
  int64_t twice;     // columns left of the square on the diagonal
  int64_t diagonal;  // column of the first row's own time step, if it is in this tile
  double result, parts;

  template <int vecs>
  FM_INLINE_MEMBER void run() {
    using T = Tile<scalar_t>;
    typename Simd<scalar_t>::vec ca[T::rows][vecs], cg[T::rows][vecs];
    multiply<scalar_t, vecs>(a_left, T::cols, a_right, d_in, ca);
    multiply<scalar_t, vecs>(g_left, T::cols, g_right, d_out, cg);
#pragma GCC unroll 8
    for (int j = 0; j < vecs; j++) {
      typename Simd<scalar_t>::vec s{};
#pragma GCC unroll 8
      for (int i = 0; i < T::rows; i++) {
        ca[i][j] *= cg[i][j];
        s += ca[i][j];
      }
      result += (j * T::width < twice ? 2.0 : 1.0) * sum<scalar_t>(s);
    }
    if (diagonal >= vecs * T::width) return;
    const scalar_t* products = reinterpret_cast<const scalar_t*>(ca) + diagonal;
    for (int i = 0; i < T::rows; i++) parts += products[i * vecs * T::width + i];
  }
};

// The Gram sum of one sample over every `pieces`-th row of tiles, from transposed panels. The
// terms on its diagonal, |a_t|^2 |g_t|^2, are added to `parts`.
template <typename scalar_t>
double gram_sum(const scalar_t* a, int64_t d_in, const scalar_t* g, int64_t d_out, int64_t time,
                int64_t piece, int64_t pieces, double& parts) {
  using T = Tile<scalar_t>;
  GramTile<scalar_t> tile{};
  tile.d_in = d_in;
  tile.d_out = d_out;
  for (int64_t s0 = 0; s0 < time; s0 += T::cols) {
    tile.a_right = a + s0 * d_in;
    tile.g_right = g + s0 * d_out;
    int64_t first = (s0 / T::rows + pieces - 1 - piece) / pieces * pieces + piece;
    for (int64_t t0 = first * T::rows; t0 < time; t0 += pieces * T::rows) {
      int64_t panel = t0 / T::cols * T::cols, square = t0 / T::square * T::square;
      tile.a_left = a + panel * d_in + t0 % T::cols;
      tile.g_left = g + panel * d_out + t0 % T::cols;
      tile.twice = square - s0;
      tile.diagonal = t0 - s0;
      with_vecs<scalar_t>(least(square + T::square - s0, T::cols) / T::width, tile);
    }
  }
  parts = tile.parts;
  return tile.result;
}

// |left^T right|^2 for one right panel and one left panel after the other.
template <typename scalar_t>
struct DirectPanel {
  const scalar_t *left, *right;
  int64_t panels, time;
  double result;

  template <int vecs>
  FM_INLINE_MEMBER void run() {
    using T = Tile<scalar_t>;
    typename Simd<scalar_t>::vec s{};
    for (int64_t i = 0; i < panels; i++) {
      typename Simd<scalar_t>::vec c[T::rows][vecs];
      multiply<scalar_t, vecs>(left + i * T::rows * time, T::rows, right, time, c);
#pragma GCC unroll 8
      for (int j = 0; j < T::rows; j++)
#pragma GCC unroll 8
        for (int k = 0; k < vecs; k++) s += c[j][k] * c[j][k];
    }
    result += sum<scalar_t>(s);
  }
};

// Piece `piece` of |sum_t g[n,t] (x) a[n,t]|^2: some of the panels of the left side.
template <typename scalar_t>
double direct_piece(const Sequences<scalar_t>& x, int64_t n, int64_t piece, int64_t pieces,
                    scalar_t* memory) {
  using T = Tile<scalar_t>;
  Sides<scalar_t> side(x, n);
  int64_t panels = (side.left_width + T::rows - 1) / T::rows;
  int64_t from = panels * piece / pieces, to = panels * (piece + 1) / pieces;
  int64_t columns = least(side.left_width, to * T::rows) - from * T::rows;
  scalar_t* right = memory + panels * T::rows * x.time;
  pack_panels(side.left + from * T::rows, side.left_time, x.time, columns, memory);
  DirectPanel<scalar_t> panel{memory, right, to - from, x.time, 0.0};
  for (int64_t j = 0; j < side.right_width; j += T::cols) {
    int64_t count = least(side.right_width - j, T::cols);
    pack_right(side.right + j, side.right_time, x.time, count, right);
    with_vecs<scalar_t>((count + T::width - 1) / T::width, panel);
  }
  return panel.result;
}

template <typename scalar_t>
double gram_piece(const Sequences<scalar_t>& x, int64_t n, int64_t piece, int64_t pieces,
                  scalar_t* memory, double& parts) {
  using T = Tile<scalar_t>;
  parts = 0;
  if (x.time == 0) return 0;
  if (x.time <= kShort) return piece == 0 ? short_gram_sum(x, n, parts) : 0;
  const scalar_t *a = x.a + n * x.a_batch, *g = x.g + n * x.g_batch;
  scalar_t* packed_g = memory + (x.time + T::cols - 1) / T::cols * T::cols * x.d_in;
  pack_transposed(a, x.a_time, x.time, x.d_in, memory);
  pack_transposed(g, x.g_time, x.time, x.d_out, packed_g);
  return gram_sum(memory, x.d_in, packed_g, x.d_out, x.time, piece, pieces, parts);
}

// weight[n] = |sum_t g[n,t] (x) a[n,t]|^2 and, unless null, bias[n] = |sum_t g[n,t]|^2.
// guard < 0: direct. Else by the Gram sum, again by direct where that is < guard * sum_t |a_t|^2
// |g_t|^2.
template <typename scalar_t>
void sequence_sq_norms(const Sequences<scalar_t>& x, double guard, scalar_t* weight, scalar_t* bias,
                       int threads) {
  using T = Tile<scalar_t>;
  threads = useful_threads(threads, x.batch * x.time * (x.d_in + x.d_out) * sizeof(scalar_t));
  int64_t pieces = pieces_per_sample(x.batch, threads), tasks = x.batch * pieces;
  int64_t padded = (x.time + T::cols - 1) / T::cols * T::cols;
  int64_t gram_size = guard < 0 || x.time <= kShort ? 0 : padded * (x.d_in + x.d_out);
  int64_t widest = x.d_in > x.d_out ? x.d_in : x.d_out;
  int64_t direct_size = (widest + T::rows + T::cols) * x.time;
  double* sums = scratch<double>(2 * tasks);
  double* parts = sums + tasks;
  bool* is_lost = scratch<bool>(x.batch);
  auto compute = [&](int64_t i, scalar_t* memory) {
    int64_t n = i / pieces, piece = i % pieces;
    sums[i] = guard < 0 ? direct_piece(x, n, piece, pieces, memory)
                        : gram_piece(x, n, piece, pieces, memory, parts[i]);
    if (piece == 0 && bias) bias[n] = bias_sq_norm(x.g + n * x.g_batch, x.g_time, x.time, x.d_out);
  };
  // Reads every piece of a sample; computing it again writes one, so all are judged before.
  auto judge = [&] {
    for (int64_t n = 0; n < x.batch; n++) {
      double total = 0, apart = 0;
      for (int64_t i = n * pieces; i < (n + 1) * pieces; i++) total += sums[i], apart += parts[i];
      is_lost[n] = total < guard * apart;
    }
  };
  auto compute_again = [&](int64_t i, scalar_t* memory) {
    if (is_lost[i / pieces]) sums[i] = direct_piece(x, i / pieces, i % pieces, pieces, memory);
  };
  int64_t size = gram_size > direct_size ? gram_size : direct_size;
  if (threads == 1) {  // a region of one thread is half a microsecond
    scalar_t* memory = scratch<scalar_t>(size);
    for (int64_t i = 0; i < tasks; i++) compute(i, memory);
    if (guard > 0) {
      judge();
      for (int64_t i = 0; i < tasks; i++) compute_again(i, memory);
    }
    free(memory);
  } else {
#pragma omp parallel num_threads(threads)
    {
      scalar_t* memory = scratch<scalar_t>(size);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tasks; i++) compute(i, memory);
      if (guard > 0) {
#pragma omp single
        judge();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++) compute_again(i, memory);
      }
      free(memory);
    }
  }
  for (int64_t n = 0; n < x.batch; n++) {
    double total = 0;
    for (int64_t k = 0; k < pieces; k++) total += sums[n * pieces + k];
    weight[n] = total < 0 ? 0 : total;
  }
  free(is_lost);
  free(sums);
}

// total[i] += c^2 for one right panel and one left panel after the other.
template <typename scalar_t>
struct SquarePanel {
  const scalar_t *left, *right;
  int64_t panels, time;
  scalar_t* total;  // [panels * rows, stride]
  int64_t stride;

  template <int vecs>
  FM_INLINE_MEMBER void run() {
    using T = Tile<scalar_t>;
    for (int64_t i = 0; i < panels; i++) {
      typename Simd<scalar_t>::vec c[T::rows][vecs];
      multiply<scalar_t, vecs>(left + i * T::rows * time, T::rows, right, time, c);
#pragma GCC unroll 8
      for (int j = 0; j < T::rows; j++)
#pragma GCC unroll 8
        for (int k = 0; k < vecs; k++) {
          scalar_t* out = total + (i * T::rows + j) * stride + k * T::width;
          store(out, c[j][k] * c[j][k] + load(out));
        }
    }
  }
};

// total[o, i] = sum_n (sum_t g[n,t,o] a[n,t,i])^2; total is [d_out padded to Tile::rows, d_in
// padded to Tile::width], each thread the owner of some of its rows.
template <typename scalar_t>
void sequence_second_moment(const Sequences<scalar_t>& x, scalar_t* total, int threads) {
  using T = Tile<scalar_t>;
  int64_t stride = (x.d_in + T::width - 1) / T::width * T::width;
  int64_t panels = (x.d_out + T::rows - 1) / T::rows;
  int64_t work = x.batch * x.time * (x.d_in + x.d_out) * sizeof(scalar_t);
  threads = least(useful_threads(threads, work), panels > 0 ? panels : 1);
  scalar_t* padded = scratch<scalar_t>(panels * T::rows * stride);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    int64_t from = panels * part / threads, to = panels * (part + 1) / threads;
    int64_t columns = least(x.d_out, to * T::rows) - from * T::rows;
    scalar_t* memory = scratch<scalar_t>(((to - from) * T::rows + T::cols) * x.time);
    scalar_t* right = memory + (to - from) * T::rows * x.time;
    scalar_t* mine = padded + from * T::rows * stride;
    memset(mine, 0, (to - from) * T::rows * stride * sizeof(scalar_t));
    SquarePanel<scalar_t> panel{memory, right, to - from, x.time, nullptr, stride};
    for (int64_t n = 0; n < x.batch; n++) {
      const scalar_t *a = x.a + n * x.a_batch, *g = x.g + n * x.g_batch;
      pack_panels(g + from * T::rows, x.g_time, x.time, columns, memory);
      for (int64_t j = 0; j < x.d_in; j += T::cols) {
        int64_t count = least(x.d_in - j, T::cols);
        pack_right(a + j, x.a_time, x.time, count, right);
        panel.total = mine + j;
        with_vecs<scalar_t>((count + T::width - 1) / T::width, panel);
      }
    }
    for (int64_t i = from * T::rows; i < from * T::rows + columns; i++)
      memcpy(total + i * x.d_in, padded + i * stride, x.d_in * sizeof(scalar_t));
    free(memory);
  }
  free(padded);
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                             \
  void row_sq_norms_##suffix(const scalar_t* a, int64_t a_stride, const scalar_t* g,            \
                             int64_t g_stride, int64_t batch, int64_t d_in, int64_t d_out,      \
                             scalar_t* weight, scalar_t* bias, int threads) {                   \
    row_sq_norms(a, a_stride, g, g_stride, batch, d_in, d_out, weight, bias, threads);          \
  }                                                                                             \
  void sequence_sq_norms_##suffix(const Sequences<scalar_t>& x, double guard, scalar_t* weight, \
                                  scalar_t* bias, int threads) {                                \
    sequence_sq_norms(x, guard, weight, bias, threads);                                         \
  }                                                                                             \
  void sequence_second_moment_##suffix(const Sequences<scalar_t>& x, scalar_t* total,           \
                                       int threads) {                                           \
    sequence_second_moment(x, total, threads);                                                  \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "cpu/dense_fused.h"
#include "cpu/dense_rows.h"
#include "cpu/sequences_argument.h"

namespace fastminima {

void bind_dense(py::module_& m) {
  FM_BIND(m, row_sq_norms);
  FM_BIND(m, sequence_sq_norms);
  FM_BIND(m, sequence_second_moment);
  FM_BIND(m, sequence_fused);
  FM_BIND(m, row_sums);
}

}  // namespace fastminima
#endif
