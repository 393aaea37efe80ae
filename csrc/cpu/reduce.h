#pragma once

#include <cstdint>

// Declared once per instruction set.
#define FM_DECLARE_REDUCE(ISA)                                                                     \
  namespace fastminima {                                                                           \
  namespace ISA {                                                                                  \
  double multi_sq_norm_f32(const float* const* x, const int64_t* n, int64_t tensors, int threads); \
  double multi_sq_norm_f64(const double* const* x, const int64_t* n, int64_t tensors,              \
                           int threads);                                                           \
  }                                                                                                \
  }

FM_DECLARE_REDUCE(generic)
#if defined(__x86_64__)
FM_DECLARE_REDUCE(avx2)
FM_DECLARE_REDUCE(avx512)
#endif
