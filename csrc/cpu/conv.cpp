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
                           scalar_t* grad, scalar_t* norms, scalar_t* bias, scalar_t* moment,    \
                           int threads) {                                                        \
    const ConvResults<scalar_t> results = {grad, norms, bias, moment};                           \
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
template <>
struct Argument<const ConvSizes&> {
  using type = const py::tuple&;
  static ConvSizes made(const py::tuple& sizes) {
    ConvSizes s;
    int64_t* field = reinterpret_cast<int64_t*>(&s);
    for (size_t i = 0; i < sizeof(s) / sizeof(int64_t); i++) field[i] = sizes[i].cast<int64_t>();
    return s;
  }
};

void bind_conv(py::module_& m) {
  FM_BIND(m, conv_direct);
  FM_BIND(m, conv_gram);
  FM_BIND(m, conv_second_moment);
  FM_BIND(m, conv_fused);
}

}  // namespace fastminima
#endif
