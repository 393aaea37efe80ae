// Reductions of dense tensors.
#include "cpu/reduce.h"

#include "parallel.h"
#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // added up in scalar_t: at most 64 terms an accumulator in float
constexpr int64_t kPart = 1 << 18;  // added up in double by one thread

// |x|^2 of one part.
template <typename scalar_t>
double part_sq_norm(const scalar_t* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock) total += sq_norm(x + i, i + kBlock < n ? kBlock : n - i);
  return total;
}

// sum_i |x_i|^2 in one parallel region: the parts do not depend on the number of threads, so
// neither does the result.
template <typename scalar_t>
double multi_sq_norm(const scalar_t* const* x, const int64_t* n, int64_t tensors, int threads) {
  int64_t elements = 0, parts = 0;
  for (int64_t i = 0; i < tensors; i++) {
    elements += n[i];
    parts += (n[i] + kPart - 1) / kPart;
  }
  threads = streaming_threads(threads, elements * sizeof(scalar_t));
  double* sums = scratch<double>(parts);
  const scalar_t** from = scratch<const scalar_t*>(parts);
  int64_t* length = scratch<int64_t>(parts);
  int64_t part = 0;
  for (int64_t i = 0; i < tensors; i++)
    for (int64_t start = 0; start < n[i]; start += kPart, part++) {
      from[part] = x[i] + start;
      length[part] = start + kPart < n[i] ? kPart : n[i] - start;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < parts; k++) sums[k] = part_sq_norm(from[k], length[k]);
  double total = 0;
  for (int64_t k = 0; k < parts; k++) total += sums[k];
  free(sums);
  free(from);
  free(length);
  return total;
}

// out[n] = |x[n]|^2, for x [batch, width].
template <typename scalar_t>
void sample_sq_norms(const scalar_t* x, int64_t batch, int64_t width, scalar_t* out, int threads) {
  threads = streaming_threads(threads, batch * width * sizeof(scalar_t));
  parallel_for(batch, threads, [=](int64_t n) { out[n] = part_sq_norm(x + n * width, width); });
}

}  // namespace

void sample_sq_norms_f32(const float* x, int64_t batch, int64_t width, float* out, int threads) {
  sample_sq_norms(x, batch, width, out, threads);
}
void sample_sq_norms_f64(const double* x, int64_t batch, int64_t width, double* out, int threads) {
  sample_sq_norms(x, batch, width, out, threads);
}
double multi_sq_norm_f32(const float* const* x, const int64_t* n, int64_t tensors, int threads) {
  return multi_sq_norm(x, n, tensors, threads);
}
double multi_sq_norm_f64(const double* const* x, const int64_t* n, int64_t tensors, int threads) {
  return multi_sq_norm(x, n, tensors, threads);
}

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include <vector>

#include "bind.h"

namespace fastminima {

// `tensors`: (address, number of elements) of each.
template <typename scalar_t>
static void define_sum(py::module_ sub, const char* name,
                       double (*kernel)(const scalar_t* const*, const int64_t*, int64_t, int)) {
  sub.def(name, [kernel](py::list tensors, uintptr_t out, int threads) {
    std::vector<const scalar_t*> x;
    std::vector<int64_t> n;
    for (py::handle item : tensors) {
      py::tuple pair = py::reinterpret_borrow<py::tuple>(item);
      x.push_back(pointer<scalar_t>(pair[0].cast<uintptr_t>()));
      n.push_back(pair[1].cast<int64_t>());
    }
    *pointer<double>(out) = kernel(x.data(), n.data(), static_cast<int64_t>(x.size()), threads);
  });
}

void bind_reduce(py::module_& m) {
  FM_BIND(m, sample_sq_norms);
#define FM_DEFINE_SUM(ISA, m, name) define_sum(m.attr(#ISA), #name, &ISA::name)
  FM_EACH_ISA(FM_DEFINE_SUM, m, multi_sq_norm_f32);
  FM_EACH_ISA(FM_DEFINE_SUM, m, multi_sq_norm_f64);
#undef FM_DEFINE_SUM
}

}  // namespace fastminima
#endif
