// The gradient of a dense layer's weight, and per-sample statistics of it from the same products.
#pragma once

#include "cpu/dense.h"

namespace fastminima {

// What sequence_fused fills: grad [d_out, d_in], norms [batch] and, unless null, bias [batch,
// d_out] and moment [d_out, d_in].
template <typename scalar_t>
struct FusedResults {
  scalar_t *grad, *norms, *bias, *moment;
};

}  // namespace fastminima

#define FM_KERNELS(scalar_t, suffix)                                                          \
  void sequence_fused_##suffix(const Sequences<scalar_t>& x, scalar_t* grad, scalar_t* norms, \
                               scalar_t* bias, scalar_t* moment, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
