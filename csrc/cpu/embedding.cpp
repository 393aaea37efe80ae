// Per-sample statistics of the gradient of an embedding table.
#include "cpu/embedding.h"

#include "parallel.h"
#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

struct Step {
  int64_t id, time;
};

// Merge sort by id; steps with the same id keep their order. Returns the sorted one of the buffers.
Step* sorted(Step* steps, Step* other, int64_t n) {
  for (int64_t size = 1; size < n; size *= 2) {
    for (int64_t from = 0; from < n; from += 2 * size) {
      int64_t middle = from + size < n ? from + size : n;
      int64_t to = from + 2 * size < n ? from + 2 * size : n;
      for (int64_t i = from, j = middle, k = from; k < to; k++) {
        bool is_left = i < middle && (j >= to || steps[i].id <= steps[j].id);
        other[k] = is_left ? steps[i++] : steps[j++];
      }
    }
    Step* swap = steps;
    steps = other;
    other = swap;
  }
  return steps;
}

// |sum_k g[steps[k].time]|^2 over the columns from `from` to `to`.
template <typename scalar_t>
double segment_sq_norm(const scalar_t* g, int64_t stride, const Step* steps, int64_t count,
                       int64_t from, int64_t to) {
  constexpr int W = Simd<scalar_t>::width;
  if (count == 1) return sq_norm(g + steps[0].time * stride + from, to - from);
  double total = 0;
  int64_t i = from;
  for (; i + 4 * W <= to; i += 4 * W) {
    typename Simd<scalar_t>::vec s[4] = {};
    for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) s[j] += load(g + steps[k].time * stride + i + j * W);
    total += sum<scalar_t>((s[0] * s[0] + s[1] * s[1]) + (s[2] * s[2] + s[3] * s[3]));
  }
  for (; i < to; i++) {
    scalar_t s = 0;
    for (int64_t k = 0; k < count; k++) s += g[steps[k].time * stride + i];
    total += static_cast<double>(s) * s;
  }
  return total;
}

template <typename scalar_t>
void embedding_sq_norms(const int64_t* ids, const scalar_t* g, int64_t g_batch, int64_t g_time,
                        int64_t padding_idx, int64_t batch, int64_t time, int64_t width,
                        scalar_t* norms, int threads) {
  threads = useful_threads(threads, batch * time * width * sizeof(scalar_t));
  int64_t pieces = pieces_per_sample(batch, threads);
  double* sums = scratch<double>(batch * pieces);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Step* memory = scratch<Step>(2 * time);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * pieces; task++) {
      int64_t n = task / pieces, piece = task % pieces, count = 0;
      for (int64_t t = 0; t < time; t++)
        if (ids[n * time + t] != padding_idx) memory[count++] = {ids[n * time + t], t};
      const Step* steps = sorted(memory, memory + time, count);
      double total = 0;
      for (int64_t i = 0, j; i < count; i = j) {
        for (j = i + 1; j < count && steps[j].id == steps[i].id; j++) {
        }
        total += segment_sq_norm(g + n * g_batch, g_time, steps + i, j - i, width * piece / pieces,
                                 width * (piece + 1) / pieces);
      }
      sums[task] = total;
    }
    free(memory);
  }
  for (int64_t n = 0; n < batch; n++) {
    double total = 0;
    for (int64_t k = 0; k < pieces; k++) total += sums[n * pieces + k];
    norms[n] = total;
  }
  free(sums);
}

// A tile of products between rows of a head's inputs and rows of a table's gradient.
constexpr int TILE = 4;

// The last n < width of `count` elements at p, zeros before them; `is_last` has those lanes set.
template <typename scalar_t, typename Mask>
FM_INLINE typename Simd<scalar_t>::vec load_last(const scalar_t* p, int64_t count, int64_t n,
                                                 Mask is_last) {
  constexpr int W = Simd<scalar_t>::width;
  if (count < W) return load_first(p, n);
  typename Simd<scalar_t>::vec zero{};
  return is_last ? load(p + count - W) : zero;
}

// acc[i][j] += x[i] * y[j]
template <typename vec>
FM_INLINE void add_products(const vec* x, const vec* y, vec (*acc)[TILE]) {
#pragma GCC unroll 4
  for (int i = 0; i < TILE; i++)
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++) acc[i][j] += x[i] * y[j];
}

// sum_{i, j} (a[i] . g[j]) weights[i][j] over i < rows, j < columns, over each lane by itself.
// Rows beyond those that count must be readable.
template <typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec weighted_tile(const scalar_t* const* a,
                                                     const scalar_t* const* g, int64_t width,
                                                     const scalar_t (*weights)[TILE], int rows,
                                                     int columns) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec acc[TILE][TILE] = {}, x[TILE], y[TILE], total{};
  int64_t d = 0;
  for (; d + W <= width; d += W) {
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) x[k] = load(a[k] + d), y[k] = load(g[k] + d);
    add_products(x, y, acc);
  }
  if (d < width) {
    typename Simd<scalar_t>::vec lane;
    for (int i = 0; i < W; i++) lane[i] = scalar_t(i);
    auto is_last = lane >= splat(scalar_t(W - (width - d)));
#pragma GCC unroll 4
    for (int k = 0; k < TILE; k++) {
      x[k] = load_last(a[k], width, width - d, is_last);
      y[k] = load_last(g[k], width, width - d, is_last);
    }
    add_products(x, y, acc);
  }
#pragma GCC unroll 4
  for (int i = 0; i < TILE; i++)
#pragma GCC unroll 4
    for (int j = 0; j < TILE; j++)
      if (i < rows && j < columns) total += acc[i][j] * splat(weights[i][j]);
  return total;
}

// sum_{t, s} (g[steps[t].time] . a[s]) go[s, steps[t].id] of one sample.
template <typename scalar_t>
double tied_cross_of(const scalar_t* a, int64_t a_time, const scalar_t* go, int64_t go_time,
                     int64_t rows, const scalar_t* g, int64_t g_time, const Step* steps,
                     int64_t count, int64_t width) {
  double total = 0;
  for (int64_t t = 0; t < count; t += TILE) {
    int columns = count - t < TILE ? count - t : TILE;
    const scalar_t* right[TILE];
    for (int j = 0; j < TILE; j++) right[j] = g + steps[t + (j < columns ? j : 0)].time * g_time;
    typename Simd<scalar_t>::vec sums{};
    for (int64_t s = 0; s < rows; s += TILE) {
      int some = rows - s < TILE ? rows - s : TILE;
      const scalar_t* left[TILE];
      scalar_t weights[TILE][TILE];
      for (int i = 0; i < TILE; i++) {
        int64_t row = s + (i < some ? i : 0);
        left[i] = a + row * a_time;
        for (int j = 0; j < columns; j++) weights[i][j] = go[row * go_time + steps[t + j].id];
      }
      sums += weighted_tile<scalar_t>(left, right, width, weights, some, columns);
    }
    total += sum<scalar_t>(sums);
  }
  return total;
}

template <typename scalar_t>
void tied_cross(const Sequences<scalar_t>& head, const int64_t* ids, const scalar_t* g,
                int64_t g_batch, int64_t g_time, int64_t padding_idx, int64_t time, scalar_t* cross,
                int threads) {
  int64_t batch = head.batch;
  threads = useful_threads(threads, batch * time * head.time * sizeof(scalar_t));
  int64_t pieces = pieces_per_sample(batch, threads);
  double* sums = scratch<double>(batch * pieces);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Step* steps = scratch<Step>(time);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * pieces; task++) {
      int64_t n = task / pieces, piece = task % pieces, count = 0;
      for (int64_t t = 0; t < time; t++)
        if (ids[n * time + t] != padding_idx) steps[count++] = {ids[n * time + t], t};
      int64_t from = count * piece / pieces, to = count * (piece + 1) / pieces;
      sums[task] = tied_cross_of(head.a + n * head.a_batch, head.a_time, head.g + n * head.g_batch,
                                 head.g_time, head.time, g + n * g_batch, g_time, steps + from,
                                 to - from, head.d_in);
    }
    free(steps);
  }
  for (int64_t n = 0; n < batch; n++) {
    double total = 0;
    for (int64_t k = 0; k < pieces; k++) total += sums[n * pieces + k];
    cross[n] = total;
  }
  free(sums);
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                                \
  void embedding_sq_norms_##suffix(const int64_t* ids, const scalar_t* g, int64_t g_batch,         \
                                   int64_t g_time, int64_t padding_idx, int64_t batch,             \
                                   int64_t time, int64_t width, scalar_t* norms, int threads) {    \
    embedding_sq_norms(ids, g, g_batch, g_time, padding_idx, batch, time, width, norms, threads);  \
  }                                                                                                \
  void tied_cross_##suffix(const Sequences<scalar_t>& head, const int64_t* ids, const scalar_t* g, \
                           int64_t g_batch, int64_t g_time, int64_t padding_idx, int64_t time,     \
                           scalar_t* cross, int threads) {                                         \
    tied_cross(head, ids, g, g_batch, g_time, padding_idx, time, cross, threads);                  \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "cpu/sequences_argument.h"

namespace fastminima {

void bind_embedding(py::module_& m) {
  FM_BIND(m, embedding_sq_norms);
  FM_BIND(m, tied_cross);
}

}  // namespace fastminima
#endif
