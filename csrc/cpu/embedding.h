#pragma once

#include <cstdint>

#include "registry.h"

// ids contiguous; rows of g contiguous, strides in elements.
#define FM_KERNELS(scalar_t, suffix)                                                       \
  void embedding_sq_norms_##suffix(const int64_t* ids, const scalar_t* g, int64_t g_batch, \
                                   int64_t g_time, int64_t padding_idx, int64_t batch,     \
                                   int64_t time, int64_t width, scalar_t* norms, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
