// Per-sample statistics of the weight of a dense layer.
#include "cpu/dense.h"

#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// weight[n] = |a[n]|^2 |g[n]|^2 and bias[n] = |g[n]|^2: one row a sample.
template <typename scalar_t>
void row_sq_norms(const scalar_t* a, int64_t a_stride, const scalar_t* g, int64_t g_stride,
                  int64_t batch, int64_t d_in, int64_t d_out, scalar_t* weight, scalar_t* bias,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < batch; n++) {
    scalar_t gg = sq_norm(g + n * g_stride, d_out);
    bias[n] = gg;
    weight[n] = gg * sq_norm(a + n * a_stride, d_in);
  }
}

}  // namespace

void row_sq_norms_f32(const float* a, int64_t a_stride, const float* g, int64_t g_stride,
                      int64_t batch, int64_t d_in, int64_t d_out, float* weight, float* bias,
                      int threads) {
  row_sq_norms(a, a_stride, g, g_stride, batch, d_in, d_out, weight, bias, threads);
}
void row_sq_norms_f64(const double* a, int64_t a_stride, const double* g, int64_t g_stride,
                      int64_t batch, int64_t d_in, int64_t d_out, double* weight, double* bias,
                      int threads) {
  row_sq_norms(a, a_stride, g, g_stride, batch, d_in, d_out, weight, bias, threads);
}

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

template <typename scalar_t, typename kernel_t>
static auto bound_rows(kernel_t kernel) {
  return [kernel](uintptr_t a, int64_t a_stride, uintptr_t g, int64_t g_stride, int64_t batch,
                  int64_t d_in, int64_t d_out, uintptr_t weight, uintptr_t bias, int threads) {
    kernel(pointer<scalar_t>(a), a_stride, pointer<scalar_t>(g), g_stride, batch, d_in, d_out,
           pointer<scalar_t>(weight), pointer<scalar_t>(bias), threads);
  };
}

void bind_dense(py::module_& m) {
#define FM_BIND(ISA, handle)                                                  \
  {                                                                           \
    py::module_ sub = py::reinterpret_borrow<py::module_>(handle);            \
    sub.def("row_sq_norms_f32", bound_rows<float>(&ISA::row_sq_norms_f32));   \
    sub.def("row_sq_norms_f64", bound_rows<double>(&ISA::row_sq_norms_f64));  \
  }
  FM_EACH_ISA(FM_BIND, m);
#undef FM_BIND
}

}  // namespace fastminima
#endif
