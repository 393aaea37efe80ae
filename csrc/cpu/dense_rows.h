// The gradient of a dense layer's weight and its second moment, one row a sample.
#pragma once

#include "cpu/dense.h"

#define FM_KERNELS(scalar_t, suffix)                                                               \
  void row_sums_##suffix(const scalar_t* a, int64_t a_stride, const scalar_t* g, int64_t g_stride, \
                         int64_t batch, int64_t d_in, int64_t d_out, scalar_t* grad,               \
                         scalar_t* moment, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
