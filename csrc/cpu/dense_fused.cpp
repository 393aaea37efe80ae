// Weight gradient, squared norms and second moments of sequences: one product, each tile of it
// squared and added up before it leaves the registers.
#include "cpu/dense_fused.h"

#include "columns.h"
#include "cpu/dense_panels.h"
#include "parallel.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Adds the lanes of v to the doubles at `out`.
template <typename scalar_t>
FM_INLINE void add_wide(double* out, typename Simd<scalar_t>::vec v) {
  constexpr int W = Simd<scalar_t>::width;
  typedef double wide __attribute__((vector_size(8 * W), aligned(8), may_alias));
  wide* at = reinterpret_cast<wide*>(out);
  *at += __builtin_convertvector(v, wide);
}

// left^T right of one sample for one right panel and one left panel after the other: added to
// `total`, its squares to `moment` (unless null), and their sum to the left panel's `squares`.
template <typename scalar_t>
struct FusedPanel {
  const scalar_t *left, *right;
  int64_t panels, time;
  scalar_t *total, *moment;  // [panels, rows, vecs * width]
  double* squares;           // [panels, width]

  template <int vecs>
  FM_INLINE_MEMBER void run() {
    if (moment)
      add<vecs, true>();
    else
      add<vecs, false>();
  }

  template <int vecs, bool with_moment>
  FM_INLINE_MEMBER void add() {
    using T = Tile<scalar_t>;
    constexpr int64_t size = T::rows * vecs * T::width;
    for (int64_t i = 0; i < panels; i++) {
      scalar_t *out = total + i * size, *out2 = moment + (with_moment ? i * size : 0);
      typename Simd<scalar_t>::vec c[T::rows][vecs], s{};
      multiply<scalar_t, vecs>(left + i * T::rows * time, T::rows, right, time, c);
#pragma GCC unroll 8
      for (int j = 0; j < T::rows; j++)
#pragma GCC unroll 8
        for (int k = 0; k < vecs; k++) {
          int64_t at = (j * vecs + k) * T::width;
          auto square = c[j][k] * c[j][k];
          s += square;
          store(out + at, load(out + at) + c[j][k]);
          if (with_moment) store(out2 + at, load(out2 + at) + square);
        }
      add_wide<scalar_t>(squares + i * T::width, s);
    }
  }
};

// Some left panels of the product, and the sums over the samples that one thread makes of them.
template <typename scalar_t>
struct Share {
  using T = Tile<scalar_t>;
  int64_t from, to;  // of the left panels
  int64_t left_width, right_width, vectors, parts;
  bool is_swapped;

  int64_t panels() const { return to - from; }
  int64_t first_vector(int64_t part) const { return vectors * part / parts; }
  // Where a part of the right side begins in sums over the samples, [part, panel, row, column].
  int64_t offset(int64_t part) const { return first_vector(part) * panels() * T::rows * T::width; }
};

// Writes sums as the weight is laid out, [d_out, d_in].
template <typename scalar_t>
void unpack(const Share<scalar_t>& share, const scalar_t* sums, int64_t d_in, scalar_t* out) {
  using T = Tile<scalar_t>;
  for (int64_t part = 0; part < share.parts; part++) {
    int64_t column = share.first_vector(part) * T::width;
    int64_t columns = share.first_vector(part + 1) * T::width - column;
    int64_t count = least(columns, share.right_width - column);
    const scalar_t* from = sums + share.offset(part);
    for (int64_t row = share.from * T::rows; row < least(share.to * T::rows, share.left_width);
         row++, from += columns)
      if (share.is_swapped)
        for (int64_t j = 0; j < count; j++) out[(column + j) * d_in + row] = from[j];
      else
        memcpy(out + row * d_in + column, from, count * sizeof(scalar_t));
  }
}

template <typename scalar_t>
void fused_share(const Sequences<scalar_t>& x, const FusedResults<scalar_t>& results,
                 const Share<scalar_t>& share, double* norms) {
  using T = Tile<scalar_t>;
  int64_t panels = share.panels(), depth = panels * T::rows * x.time;
  int64_t size = panels * T::rows * share.vectors * T::width;
  scalar_t* left = scratch<scalar_t>(depth + T::cols * x.time);
  scalar_t* sums = scratch<scalar_t>(results.moment ? 2 * size : size);
  double* squares = scratch<double>(panels * T::width);
  memset(sums, 0, (results.moment ? 2 * size : size) * sizeof(scalar_t));
  FusedPanel<scalar_t> panel{left, left + depth, panels, x.time, nullptr, nullptr, squares};
  for (int64_t n = 0; n < x.batch; n++) {
    Sides<scalar_t> side(x, n);
    int64_t first = share.from * T::rows;
    pack_panels(side.left + first, side.left_time, x.time,
                least(side.left_width - first, panels * T::rows), left);
    memset(squares, 0, panels * T::width * sizeof(double));
    for (int64_t part = 0; part < share.parts; part++) {
      int64_t vector = share.first_vector(part), next = share.first_vector(part + 1);
      int64_t column = vector * T::width;
      pack_right(side.right + column, side.right_time, x.time,
                 least(side.right_width - column, (next - vector) * T::width), left + depth);
      panel.total = sums + share.offset(part);
      panel.moment = results.moment ? panel.total + size : nullptr;
      with_vecs<scalar_t>(next - vector, panel);
    }
    for (int64_t i = 0; i < panels; i++) {
      double sum = 0;
      for (int k = 0; k < T::width; k++) sum += squares[i * T::width + k];
      norms[n + (share.from + i) * x.batch] = sum;
    }
  }
  unpack(share, sums, x.d_in, results.grad);
  if (results.moment) unpack(share, sums + size, x.d_in, results.moment);
  free(squares);
  free(sums);
  free(left);
}

// Each thread makes some rows of tiles, of all samples one after the other: no result depends on
// their number.
template <typename scalar_t>
void sequence_fused(const Sequences<scalar_t>& x, const FusedResults<scalar_t>& results,
                    int threads) {
  using T = Tile<scalar_t>;
  Sides<scalar_t> side(x, 0);
  int64_t panels = (side.left_width + T::rows - 1) / T::rows;
  int64_t vectors = (side.right_width + T::width - 1) / T::width;
  int64_t parts = (vectors + T::vecs - 1) / T::vecs;
  threads = useful_threads(threads, x.batch * x.time * (x.d_in + x.d_out) * sizeof(scalar_t));
  threads = least(threads, panels > 0 ? panels : 1);
  double* norms = scratch<double>(panels * x.batch);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    Share<scalar_t> share{panels * part / threads,
                          panels * (part + 1) / threads,
                          side.left_width,
                          side.right_width,
                          vectors,
                          parts,
                          side.is_swapped};
    fused_share(x, results, share, norms);
    if (!results.bias) continue;
    // Whole vectors: the columns after them are added up in another order.
    int64_t whole = (x.d_out + T::width - 1) / T::width;
    int64_t from = whole * part / threads * T::width;
    int64_t to = least(x.d_out, whole * (part + 1) / threads * T::width);
    for (int64_t n = 0; n < x.batch; n++) {
      Rows<scalar_t> rows{x.g + n * x.g_batch, x.g_time, nullptr, 0, nullptr, nullptr};
      sum_rows<scalar_t, Terms::sum>(rows, x.time, from, to, nullptr, results.bias + n * x.d_out);
    }
  }
  for (int64_t n = 0; n < x.batch; n++) {
    double total = 0;
    for (int64_t i = 0; i < panels; i++) total += norms[n + i * x.batch];
    results.norms[n] = total;
  }
  free(norms);
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                           \
  void sequence_fused_##suffix(const Sequences<scalar_t>& x, scalar_t* grad, scalar_t* norms, \
                               scalar_t* bias, scalar_t* moment, int threads) {               \
    sequence_fused(x, FusedResults<scalar_t>{grad, norms, bias, moment}, threads);            \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima
