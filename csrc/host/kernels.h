// The kernels that programs call, of the instruction set that this machine is to use.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/broadcast.h"
#include "cpu/dense.h"
#include "cpu/dense_fused.h"
#include "cpu/embedding.h"
#include "cpu/norm.h"
#include "cpu/reduce.h"

namespace fastminima {
namespace host {

template <typename scalar_t>
struct Kernels;

// One function pointer a kernel, with the type of the kernel itself.
#define FM_KERNELS_OF(scalar_t, suffix)                                     \
  template <>                                                               \
  struct Kernels<scalar_t> {                                                \
    decltype(&generic::row_sq_norms_##suffix) row_sq_norms;                 \
    decltype(&generic::sequence_sq_norms_##suffix) sequence_sq_norms;       \
    decltype(&generic::sequence_fused_##suffix) sequence_fused;             \
    decltype(&generic::layer_norm_gradients_##suffix) layer_norm_gradients; \
    decltype(&generic::product_over_time_##suffix) product_over_time;       \
    decltype(&generic::sum_over_time_##suffix) sum_over_time;               \
    decltype(&generic::embedding_sq_norms_##suffix) embedding_sq_norms;     \
    decltype(&generic::tied_cross_##suffix) tied_cross;                     \
    decltype(&generic::sample_sq_norms_##suffix) sample_sq_norms;           \
    decltype(&generic::multi_sq_norm_##suffix) multi_sq_norm;               \
    static Kernels of(const std::string& isa);                              \
  };
FM_KERNELS_OF(float, f32)
FM_KERNELS_OF(double, f64)
#undef FM_KERNELS_OF

#define FM_KERNELS_IN(ISA, suffix)                                         \
  {&ISA::row_sq_norms_##suffix,       &ISA::sequence_sq_norms_##suffix,    \
   &ISA::sequence_fused_##suffix,     &ISA::layer_norm_gradients_##suffix, \
   &ISA::product_over_time_##suffix,  &ISA::sum_over_time_##suffix,        \
   &ISA::embedding_sq_norms_##suffix, &ISA::tied_cross_##suffix,           \
   &ISA::sample_sq_norms_##suffix,    &ISA::multi_sq_norm_##suffix}
#if defined(__x86_64__)
#define FM_CHOOSE_KERNELS(suffix)                            \
  if (isa == "avx512") return FM_KERNELS_IN(avx512, suffix); \
  if (isa == "avx2") return FM_KERNELS_IN(avx2, suffix);     \
  return FM_KERNELS_IN(generic, suffix);
#else
#define FM_CHOOSE_KERNELS(suffix) return FM_KERNELS_IN(generic, suffix);
#endif
inline Kernels<float> Kernels<float>::of(const std::string& isa) { FM_CHOOSE_KERNELS(f32) }
inline Kernels<double> Kernels<double>::of(const std::string& isa) { FM_CHOOSE_KERNELS(f64) }
#undef FM_CHOOSE_KERNELS
#undef FM_KERNELS_IN

}  // namespace host
}  // namespace fastminima
