// Reductions of one dense tensor.
#include "cpu/reduce.h"

#include "parallel.h"
#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // added up in scalar_t: at most 64 terms an accumulator in float
constexpr int64_t kPart = 1 << 18;  // added up in double by one thread

// |x|^2: the parts do not depend on the number of threads, so neither does the result.
template <typename scalar_t>
double sq_norm_of(const scalar_t* x, int64_t n, int threads) {
  threads = useful_threads(threads, n * sizeof(scalar_t));
  int64_t parts = (n + kPart - 1) / kPart;
  double* sums = scratch<double>(parts);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < parts; k++) {
    int64_t end = (k + 1) * kPart < n ? (k + 1) * kPart : n;
    double s = 0;
    for (int64_t i = k * kPart; i < end; i += kBlock)
      s += sq_norm(x + i, i + kBlock < end ? kBlock : end - i);
    sums[k] = s;
  }
  double total = 0;
  for (int64_t k = 0; k < parts; k++) total += sums[k];
  free(sums);
  return total;
}

}  // namespace

double sq_norm_f32(const float* x, int64_t n, int threads) { return sq_norm_of(x, n, threads); }
double sq_norm_f64(const double* x, int64_t n, int threads) { return sq_norm_of(x, n, threads); }

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

template <typename scalar_t, typename kernel_t>
static auto bound_reduction(kernel_t kernel) {
  return [kernel](uintptr_t x, int64_t n, uintptr_t out, int threads) {
    *pointer<scalar_t>(out) = kernel(pointer<scalar_t>(x), n, threads);
  };
}

void bind_reduce(py::module_& m) {
#define FM_BIND(ISA, handle)                                            \
  {                                                                     \
    py::module_ sub = py::reinterpret_borrow<py::module_>(handle);      \
    sub.def("sq_norm_f32", bound_reduction<float>(&ISA::sq_norm_f32));  \
    sub.def("sq_norm_f64", bound_reduction<double>(&ISA::sq_norm_f64)); \
  }
  FM_EACH_ISA(FM_BIND, m);
#undef FM_BIND
}

}  // namespace fastminima
#endif
