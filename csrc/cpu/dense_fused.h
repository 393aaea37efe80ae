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

#define FM_DECLARE_DENSE_FUSED(ISA)                                                            \
  namespace fastminima {                                                                       \
  namespace ISA {                                                                              \
  void sequence_fused_f32(const Sequences<float>&, const FusedResults<float>&, int threads);   \
  void sequence_fused_f64(const Sequences<double>&, const FusedResults<double>&, int threads); \
  }                                                                                            \
  }

FM_DECLARE_DENSE_FUSED(generic)
#if defined(__x86_64__)
FM_DECLARE_DENSE_FUSED(avx2)
FM_DECLARE_DENSE_FUSED(avx512)
#endif
