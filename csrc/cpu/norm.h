#pragma once

#include <cstdint>

#include "registry.h"

// Rows contiguous, other strides in elements; mean and rstd
// contiguous, mean of a layer norm may be null.
#define FM_KERNELS(scalar_t, suffix)                                                             \
  void layer_norm_gradients_##suffix(                                                            \
      const scalar_t* g, int64_t g_batch, int64_t g_time, const scalar_t* x, int64_t x_batch,    \
      int64_t x_time, const scalar_t* mean, const scalar_t* rstd, int64_t batch, int64_t time,   \
      int64_t width, scalar_t* weight, scalar_t* bias, int threads);                             \
  void channel_norm_gradients_##suffix(                                                          \
      const scalar_t* g, int64_t g_batch, int64_t g_channel, const scalar_t* x, int64_t x_batch, \
      int64_t x_channel, const scalar_t* mean, const scalar_t* rstd, int64_t shared,             \
      int64_t groups, int64_t batch, int64_t channels, int64_t space, scalar_t* weight,          \
      scalar_t* bias, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
