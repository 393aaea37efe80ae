#pragma once

#include <cstdint>

#include "cpu/dense.h"
#include "registry.h"

// `head`: the inputs and output gradients of a layer whose weight is the table.
// ids contiguous; rows of g contiguous, strides in elements.
#define FM_KERNELS(scalar_t, suffix)                                                               \
  void embedding_sq_norms_##suffix(const int64_t* ids, const scalar_t* g, int64_t g_batch,         \
                                   int64_t g_time, int64_t padding_idx, int64_t batch,             \
                                   int64_t time, int64_t width, scalar_t* norms, int threads);     \
  void tied_cross_##suffix(const Sequences<scalar_t>& head, const int64_t* ids, const scalar_t* g, \
                           int64_t g_batch, int64_t g_time, int64_t padding_idx, int64_t time,     \
                           scalar_t* cross, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
