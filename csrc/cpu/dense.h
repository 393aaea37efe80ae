#pragma once

#include <cstdint>

#include "registry.h"

namespace fastminima {

// Inputs a [batch, time, d_in] and output gradients g [batch, time, d_out] of a dense layer: rows
// contiguous, batch and time strides in elements. Sample n's gradient is sum_t g[n,t] (x) a[n,t].
template <typename scalar_t>
struct Sequences {
  const scalar_t* a;
  int64_t a_batch, a_time;
  const scalar_t* g;
  int64_t g_batch, g_time;
  int64_t batch, time, d_in, d_out;
};

}  // namespace fastminima

#define FM_KERNELS(scalar_t, suffix)                                                            \
  void row_sq_norms_##suffix(const scalar_t* a, int64_t a_stride, const scalar_t* g,            \
                             int64_t g_stride, int64_t batch, int64_t d_in, int64_t d_out,      \
                             scalar_t* weight, scalar_t* bias, int threads);                    \
  void sequence_sq_norms_##suffix(const Sequences<scalar_t>& x, double guard, scalar_t* weight, \
                                  scalar_t* bias, int threads);                                 \
  void sequence_second_moment_##suffix(const Sequences<scalar_t>& x, scalar_t* total, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
