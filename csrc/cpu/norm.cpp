// Per-sample gradients of the scale and shift of normalisation layers.
#include "cpu/norm.h"

#include "columns.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// weight = sum_s g[s] (x[s] - mean) rstd and bias = sum_s g[s] of n contiguous elements.
template <typename scalar_t>
FM_INLINE void channel(const scalar_t* g, const scalar_t* x, int64_t n, scalar_t mean,
                       scalar_t rstd, scalar_t* weight, scalar_t* bias) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec w[4] = {}, b[4] = {}, m = splat(mean);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      auto gk = load(g + i + k * W);
      b[k] += gk;
      w[k] = gk * (load(x + i + k * W) - m) + w[k];
    }
  for (; i + W <= n; i += W) {
    auto gk = load(g + i);
    b[0] += gk;
    w[0] = gk * (load(x + i) - m) + w[0];
  }
  scalar_t total = sum<scalar_t>((w[0] + w[1]) + (w[2] + w[3]));
  scalar_t shift = sum<scalar_t>((b[0] + b[1]) + (b[2] + b[3]));
  for (; i < n; i++) {
    shift += g[i];
    total += g[i] * (x[i] - mean);
  }
  *weight = total * rstd;
  *bias = shift;
}

template <typename scalar_t>
void channel_norm_gradients(const scalar_t* g, int64_t g_batch, int64_t g_channel,
                            const scalar_t* x, int64_t x_batch, int64_t x_channel,
                            const scalar_t* mean, const scalar_t* rstd, int64_t shared,
                            int64_t groups, int64_t batch, int64_t channels, int64_t space,
                            scalar_t* weight, scalar_t* bias, int threads) {
  threads = useful_threads(threads, 2 * batch * channels * space * sizeof(scalar_t));
  int64_t size = channels / groups;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < batch * channels; i++) {
    int64_t n = i / channels, c = i % channels;
    int64_t k = (shared == 1 ? 0 : n) * groups + c / size;
    channel(g + n * g_batch + c * g_channel, x + n * x_batch + c * x_channel, space, mean[k],
            rstd[k], weight + i, bias + i);
  }
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                              \
  void layer_norm_gradients_##suffix(                                                            \
      const scalar_t* g, int64_t g_batch, int64_t g_time, const scalar_t* x, int64_t x_batch,    \
      int64_t x_time, const scalar_t* mean, const scalar_t* rstd, int64_t batch, int64_t time,   \
      int64_t width, scalar_t* weight, scalar_t* bias, int threads) {                            \
    auto sample = [=](int64_t n) {                                                               \
      return Rows<scalar_t>{                                                                     \
          g + n * g_batch, g_time, x + n * x_batch, x_time, mean ? mean + n * time : nullptr,    \
          rstd + n * time};                                                                      \
    };                                                                                           \
    sum_rows_of_samples<scalar_t, Terms::normalised>(sample, batch, time, width, weight, bias,   \
                                                     threads);                                   \
  }                                                                                              \
  void channel_norm_gradients_##suffix(                                                          \
      const scalar_t* g, int64_t g_batch, int64_t g_channel, const scalar_t* x, int64_t x_batch, \
      int64_t x_channel, const scalar_t* mean, const scalar_t* rstd, int64_t shared,             \
      int64_t groups, int64_t batch, int64_t channels, int64_t space, scalar_t* weight,          \
      scalar_t* bias, int threads) {                                                             \
    channel_norm_gradients(g, g_batch, g_channel, x, x_batch, x_channel, mean, rstd, shared,     \
                           groups, batch, channels, space, weight, bias, threads);               \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

void bind_norm(py::module_& m) {
  FM_BIND(m, layer_norm_gradients);
  FM_BIND(m, channel_norm_gradients);
}

}  // namespace fastminima
#endif
