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

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                               \
  void embedding_sq_norms_##suffix(const int64_t* ids, const scalar_t* g, int64_t g_batch,        \
                                   int64_t g_time, int64_t padding_idx, int64_t batch,            \
                                   int64_t time, int64_t width, scalar_t* norms, int threads) {   \
    embedding_sq_norms(ids, g, g_batch, g_time, padding_idx, batch, time, width, norms, threads); \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

void bind_embedding(py::module_& m) { FM_BIND(m, embedding_sq_norms); }

}  // namespace fastminima
#endif
