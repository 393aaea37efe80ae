#pragma once

#include <cstdint>

// Declared once per instruction set. ids contiguous; rows of g contiguous, strides in elements.
#define FM_DECLARE_EMBEDDING_OF(scalar_t, suffix)                                          \
  void embedding_sq_norms_##suffix(const int64_t* ids, const scalar_t* g, int64_t g_batch, \
                                   int64_t g_time, int64_t padding_idx, int64_t batch,     \
                                   int64_t time, int64_t width, scalar_t* norms, int threads);

#define FM_DECLARE_EMBEDDING(ISA)      \
  namespace fastminima {               \
  namespace ISA {                      \
  FM_DECLARE_EMBEDDING_OF(float, f32)  \
  FM_DECLARE_EMBEDDING_OF(double, f64) \
  }                                    \
  }

FM_DECLARE_EMBEDDING(generic)
#if defined(__x86_64__)
FM_DECLARE_EMBEDDING(avx2)
FM_DECLARE_EMBEDDING(avx512)
#endif
