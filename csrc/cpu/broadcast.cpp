// Sums over all but the sample: per-sample gradients of biases and scales.
#include "cpu/broadcast.h"

#include "columns.h"

namespace fastminima {
namespace FM_ISA {
namespace {

template <typename scalar_t>
scalar_t sum_of(const scalar_t* x, int64_t n) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec s[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) s[k] += load(x + i + k * W);
  for (; i + W <= n; i += W) s[0] += load(x + i);
  scalar_t total = sum<scalar_t>((s[0] + s[1]) + (s[2] + s[3]));
  for (; i < n; i++) total += x[i];
  return total;
}

template <typename scalar_t>
void sum_over_space(const scalar_t* g, int64_t g_batch, int64_t g_channel, int64_t batch,
                    int64_t channels, int64_t space, scalar_t* out, int threads) {
  threads = useful_threads(threads, batch * channels * space * sizeof(scalar_t));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < batch * channels; i++)
    out[i] = sum_of(g + i / channels * g_batch + i % channels * g_channel, space);
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                               \
  void sum_over_time_##suffix(const scalar_t* g, int64_t g_batch, int64_t g_time, int64_t batch,  \
                              int64_t time, int64_t width, scalar_t* out, int threads) {          \
    auto sample = [=](int64_t n) {                                                                \
      return Rows<scalar_t>{g + n * g_batch, g_time, nullptr, 0, nullptr, nullptr};               \
    };                                                                                            \
    sum_rows_of_samples<scalar_t, Terms::sum>(sample, batch, time, width, out, out, threads);     \
  }                                                                                               \
  void product_over_time_##suffix(                                                                \
      const scalar_t* g, int64_t g_batch, int64_t g_time, const scalar_t* x, int64_t x_batch,     \
      int64_t x_time, int64_t batch, int64_t time, int64_t width, scalar_t* out, int threads) {   \
    auto sample = [=](int64_t n) {                                                                \
      return Rows<scalar_t>{g + n * g_batch, g_time, x + n * x_batch, x_time, nullptr, nullptr};  \
    };                                                                                            \
    sum_rows_of_samples<scalar_t, Terms::product>(sample, batch, time, width, out, out, threads); \
  }                                                                                               \
  void sum_over_space_##suffix(const scalar_t* g, int64_t g_batch, int64_t g_channel,             \
                               int64_t batch, int64_t channels, int64_t space, scalar_t* out,     \
                               int threads) {                                                     \
    sum_over_space(g, g_batch, g_channel, batch, channels, space, out, threads);                  \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

void bind_broadcast(py::module_& m) {
  FM_BIND(m, sum_over_time);
  FM_BIND(m, sum_over_space);
  FM_BIND(m, product_over_time);
}

}  // namespace fastminima
#endif
