#pragma once

#include <cstdint>

#include "registry.h"

// `partials` holds one double per block of the vector, see vector_blocks(); results are doubles
// whatever the vectors are. same_bytes is of no type.
#define FM_KERNELS(scalar_t, suffix)                                                             \
  void lanczos_step_##suffix(scalar_t* w, const scalar_t* v, const scalar_t* v_previous,         \
                             const double* beta, int64_t n, double* partials, double* result,    \
                             int threads);                                                       \
  void power_step_##suffix(const scalar_t* w, const scalar_t* v, double shift, int64_t n,        \
                           scalar_t* next, double* partials, double* result, int threads);       \
  void dots_##suffix(const scalar_t* w, const int64_t* rows, int64_t count, int64_t n,           \
                     double* partials, double* result, int threads);                             \
  void project_out_##suffix(scalar_t* w, const int64_t* rows, int64_t count, int64_t n,          \
                            double* partials, double* result, int threads);                      \
  void linear_combinations_##suffix(const int64_t* rows, int64_t count, const scalar_t* weights, \
                                    int64_t outputs, int64_t n, scalar_t* out, int threads);     \
  bool same_bytes(const char* a, const char* b, int64_t n, int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
