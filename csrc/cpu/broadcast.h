#pragma once

#include <cstdint>

#include "registry.h"

// Rows contiguous, other strides in elements.
#define FM_KERNELS(scalar_t, suffix)                                                             \
  void sum_over_time_##suffix(const scalar_t* g, int64_t g_batch, int64_t g_time, int64_t batch, \
                              int64_t time, int64_t width, scalar_t* out, int threads);          \
  void product_over_time_##suffix(                                                               \
      const scalar_t* g, int64_t g_batch, int64_t g_time, const scalar_t* x, int64_t x_batch,    \
      int64_t x_time, int64_t batch, int64_t time, int64_t width, scalar_t* out, int threads);   \
  void sum_over_space_##suffix(const scalar_t* g, int64_t g_batch, int64_t g_channel,            \
                               int64_t batch, int64_t channels, int64_t space, scalar_t* out,    \
                               int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
