// Per-sample statistics of the weight of a convolution.

// By default GCC 12 keeps one operand of the 8 x 3 tile on the stack, where it straddles cache
// lines: a third of the speed.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("ira-region=all")
#endif

#include "cpu/conv.h"

#include "cpu/conv_direct.h"
#include "cpu/conv_fused.h"
#include "cpu/conv_gram.h"
#include "cpu/conv_moment.h"

namespace fastminima {
namespace FM_ISA {

#define FM_DEFINE(scalar_t, suffix)                                                              \
  void conv_direct_##suffix(const scalar_t* rows, const scalar_t* image, const ConvSizes& sizes, \
                            scalar_t* weight, scalar_t* bias, int threads) {                     \
    direct_sq_norms<scalar_t>(rows, image, sizes, nullptr, sizes.batch, weight, bias, threads);  \
  }                                                                                              \
  void conv_gram_##suffix(const scalar_t* rows, const scalar_t* image, const ConvSizes& sizes,   \
                          scalar_t* weight, scalar_t* bias, int threads) {                       \
    gram_sq_norms(rows, image, sizes, weight, bias, threads);                                    \
  }                                                                                              \
  void conv_second_moment_##suffix(const scalar_t* rows, const scalar_t* image,                  \
                                   const ConvSizes& sizes, scalar_t* total, int threads) {       \
    second_moment(rows, image, sizes, total, threads);                                           \
  }                                                                                              \
  void conv_fused_##suffix(const scalar_t* rows, const scalar_t* image, const ConvSizes& sizes,  \
                           const ConvResults<scalar_t>& results, int threads) {                  \
    fused(rows, image, sizes, results, threads);                                                 \
  }

FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

// (batch, rows, channels, groups, is_transposed, rows_last, image_last), then image, out, kernel,
// stride, padding and dilation of three axes each.
static ConvSizes conv_sizes(const py::tuple& sizes) {
  ConvSizes s;
  int64_t* field = reinterpret_cast<int64_t*>(&s);
  for (size_t i = 0; i < sizeof(s) / sizeof(int64_t); i++) field[i] = sizes[i].cast<int64_t>();
  return s;
}

template <typename scalar_t, typename kernel_t>
static auto bound_norms(kernel_t kernel) {
  return [kernel](uintptr_t rows, uintptr_t image, const py::tuple& sizes, uintptr_t weight,
                  uintptr_t bias, int threads) {
    kernel(pointer<scalar_t>(rows), pointer<scalar_t>(image), conv_sizes(sizes),
           pointer<scalar_t>(weight), pointer<scalar_t>(bias), threads);
  };
}

template <typename scalar_t, typename kernel_t>
static auto bound_moment(kernel_t kernel) {
  return [kernel](uintptr_t rows, uintptr_t image, const py::tuple& sizes, uintptr_t total,
                  int threads) {
    kernel(pointer<scalar_t>(rows), pointer<scalar_t>(image), conv_sizes(sizes),
           pointer<scalar_t>(total), threads);
  };
}

template <typename scalar_t, typename kernel_t>
static auto bound_fused(kernel_t kernel) {
  return [kernel](uintptr_t rows, uintptr_t image, const py::tuple& sizes, uintptr_t grad,
                  uintptr_t norms, uintptr_t bias, uintptr_t moment, int threads) {
    kernel(pointer<scalar_t>(rows), pointer<scalar_t>(image), conv_sizes(sizes),
           ConvResults<scalar_t>{pointer<scalar_t>(grad), pointer<scalar_t>(norms),
                                 pointer<scalar_t>(bias), pointer<scalar_t>(moment)},
           threads);
  };
}

void bind_conv(py::module_& m) {
#define FM_BIND_TYPE(ISA, scalar_t, suffix)                                           \
  sub.def("conv_direct_" #suffix, bound_norms<scalar_t>(&ISA::conv_direct_##suffix)); \
  sub.def("conv_gram_" #suffix, bound_norms<scalar_t>(&ISA::conv_gram_##suffix));     \
  sub.def("conv_second_moment_" #suffix,                                              \
          bound_moment<scalar_t>(&ISA::conv_second_moment_##suffix));                 \
  sub.def("conv_fused_" #suffix, bound_fused<scalar_t>(&ISA::conv_fused_##suffix));
#define FM_BIND(ISA, handle)                                       \
  {                                                                \
    py::module_ sub = py::reinterpret_borrow<py::module_>(handle); \
    FM_BIND_TYPE(ISA, float, f32)                                  \
    FM_BIND_TYPE(ISA, double, f64)                                 \
  }
  FM_EACH_ISA(FM_BIND, m);
#undef FM_BIND
#undef FM_BIND_TYPE
}

}  // namespace fastminima
#endif
