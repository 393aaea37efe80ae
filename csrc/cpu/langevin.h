#pragma once

#include <cstdint>

#include "registry.h"

// `params`, `grads` and `velocities` are addresses of `count` tensors of `sizes` elements, all
// contiguous; `velocities` is null without momentum. `places`: the index, in fours of elements, of
// each one's first number in the stream (seed, step). See fastminima.ops.langevin.
#define FM_KERNELS(scalar_t, suffix)                                                           \
  void langevin_step_##suffix(const int64_t* params, const int64_t* grads,                     \
                              const int64_t* velocities, const int64_t* places,                \
                              const int64_t* sizes, int64_t count, double lr, double momentum, \
                              double deviation, int64_t seed, int64_t step, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
