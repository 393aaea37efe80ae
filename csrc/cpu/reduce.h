#pragma once

#include <cstdint>

#include "registry.h"

#define FM_KERNELS(scalar_t, suffix)                                                            \
  double multi_sq_norm_##suffix(const scalar_t* const* x, const int64_t* n, int64_t tensors,    \
                                int threads);                                                   \
  void sample_sq_norms_##suffix(const scalar_t* x, int64_t batch, int64_t width, scalar_t* out, \
                                int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
