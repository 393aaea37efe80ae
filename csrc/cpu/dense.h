#pragma once

#include <cstdint>

// Declared once per instruction set.
#define FM_DECLARE_DENSE(ISA)                                                                      \
  namespace fastminima {                                                                           \
  namespace ISA {                                                                                  \
  void row_sq_norms_f32(const float* a, int64_t a_stride, const float* g, int64_t g_stride,        \
                        int64_t batch, int64_t d_in, int64_t d_out, float* weight, float* bias,    \
                        int threads);                                                              \
  void row_sq_norms_f64(const double* a, int64_t a_stride, const double* g, int64_t g_stride,      \
                        int64_t batch, int64_t d_in, int64_t d_out, double* weight, double* bias,  \
                        int threads);                                                              \
  }                                                                                                \
  }

FM_DECLARE_DENSE(generic)
#if defined(__x86_64__)
FM_DECLARE_DENSE(avx2)
FM_DECLARE_DENSE(avx512)
#endif
