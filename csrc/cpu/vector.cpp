// Steps of iterative eigensolvers on one flat vector, fused so that memory is passed over twice.
//
// Sums are made block by block, in doubles, and added in the order of the blocks. So they do not
// depend on the number of threads, nor on the scale of the vectors.
#include "cpu/vector.h"

#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // 16 KiB of floats: what is read twice stays in the L1 cache
constexpr int64_t kPiece = 512;   // what is written and then summed, while it is near
constexpr int64_t kMinParallel = 1 << 15;

FM_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

FM_INLINE double add_up(const double* partials, int64_t blocks) {
  double s = 0;
  for (int64_t b = 0; b < blocks; b++) s += partials[b];
  return s;
}

// A vector of as many lanes as one of doubles has.
template <typename scalar_t>
struct Narrow;
template <>
struct Narrow<float> {
  typedef float vec __attribute__((vector_size(FM_BYTES / 2), aligned(4), may_alias));
};
template <>
struct Narrow<double> {
  using vec = vec_f64;
};

template <typename scalar_t>
FM_INLINE vec_f64 load_wide(const scalar_t* p) {
  using vec = typename Narrow<scalar_t>::vec;
  return __builtin_convertvector(*reinterpret_cast<const vec*>(p), vec_f64);
}

// <x, y>, products and sums in double: squares of floats leave the range of floats at 1e-19 and
// 1e19.
template <typename scalar_t>
FM_INLINE double dot(const scalar_t* x, const scalar_t* y, int64_t n) {
  constexpr int W = Simd<double>::width;
  vec_f64 s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += load_wide(x + i) * load_wide(y + i);
    s1 += load_wide(x + i + W) * load_wide(y + i + W);
    s2 += load_wide(x + i + 2 * W) * load_wide(y + i + 2 * W);
    s3 += load_wide(x + i + 3 * W) * load_wide(y + i + 3 * W);
  }
  double s = sum<double>((s0 + s1) + (s2 + s3));
  for (; i < n; i++) s += double(x[i]) * double(y[i]);
  return s;
}

// w = w + a v.
template <typename scalar_t>
FM_INLINE void add_scaled(scalar_t* w, const scalar_t* v, scalar_t a, int64_t n) {
  constexpr int W = Simd<scalar_t>::width;
  const typename Simd<scalar_t>::vec va = splat<scalar_t>(a);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(w + i, load(w + i) + va * load(v + i));
  for (; i < n; i++) w[i] += a * v[i];
}

// w = w - beta u, returns <w, v>; without u, w stays.
template <typename scalar_t>
FM_INLINE double subtract_and_dot(scalar_t* w, const scalar_t* v, const scalar_t* u, scalar_t beta,
                                  int64_t n) {
  if (!u) return dot(w, v, n);
  double s = 0;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = min(kPiece, n - i);
    add_scaled(w + i, u + i, scalar_t(-beta), m);
    s += dot(w + i, v + i, m);
  }
  return s;
}

// w = w - alpha v, returns |w|^2.
template <typename scalar_t>
FM_INLINE double subtract_and_square(scalar_t* w, const scalar_t* v, scalar_t alpha, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = min(kPiece, n - i);
    add_scaled(w + i, v + i, scalar_t(-alpha), m);
    s += dot(w + i, w + i, m);
  }
  return s;
}

// |w - a v|^2, and next = scale (w - b v) unless next is null.
template <typename scalar_t>
FM_INLINE double distance(const scalar_t* w, const scalar_t* v, scalar_t a, scalar_t b,
                          scalar_t scale, scalar_t* next, int64_t n) {
  scalar_t r[kPiece];
  double s = 0;
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = min(kPiece, n - i);
    for (int64_t e = 0; e < m; e++) r[e] = w[i + e] - a * v[i + e];
    s += dot(r, r, m);
    if (next)
      for (int64_t e = 0; e < m; e++) next[i + e] = scale * (w[i + e] - b * v[i + e]);
  }
  return s;
}

// result = (<w - beta u, v>, |w'|^2) and w' = w - beta u - <w - beta u, v> v in place of w.
template <typename scalar_t>
void lanczos_step(scalar_t* w, const scalar_t* v, const scalar_t* u, const double* beta, int64_t n,
                  double* partials, double* result, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const scalar_t b = u ? scalar_t(*beta) : scalar_t(0);
  if (n < kMinParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock;
    partials[k] = subtract_and_dot(w + at, v + at, u ? u + at : u, b, min(kBlock, n - at));
  }
  const double alpha = add_up(partials, blocks);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock;
    partials[k] = subtract_and_square(w + at, v + at, scalar_t(alpha), min(kBlock, n - at));
  }
  result[0] = alpha;
  result[1] = __builtin_sqrt(add_up(partials, blocks));
}

// result = (<w, v>, |w - <w, v> v|, |w - shift v|), next = (w - shift v) / |w - shift v|.
template <typename scalar_t>
void power_step(const scalar_t* w, const scalar_t* v, double shift, int64_t n, scalar_t* next,
                double* partials, double* result, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const scalar_t sigma = scalar_t(shift);
  if (n < kMinParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock, m = min(kBlock, n - at);
    scalar_t* const none = nullptr;
    // subtract_and_dot leaves w alone when there is nothing to subtract.
    partials[k] = subtract_and_dot(const_cast<scalar_t*>(w) + at, v + at,
                                   static_cast<const scalar_t*>(nullptr), scalar_t(0), m);
    partials[blocks + k] = distance(w + at, v + at, sigma, sigma, scalar_t(1), none, m);
  }
  const double theta = add_up(partials, blocks);
  const double norm = __builtin_sqrt(add_up(partials + blocks, blocks));
  const scalar_t scale = norm > 0 ? scalar_t(1 / norm) : scalar_t(1);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock;
    partials[k] =
        distance(w + at, v + at, scalar_t(theta), sigma, scale, next + at, min(kBlock, n - at));
  }
  result[0] = theta;
  result[1] = __builtin_sqrt(add_up(partials, blocks));
  result[2] = norm;
}

// result[i] = <w, row_i>; `rows` are addresses.
template <typename scalar_t>
void dots(const scalar_t* w, const int64_t* rows, int64_t count, int64_t n, double* partials,
          double* result, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  if (n * count < kMinParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock, m = min(kBlock, n - at);
    for (int64_t i = 0; i < count; i++)
      partials[i * blocks + k] = dot(w + at, reinterpret_cast<const scalar_t*>(rows[i]) + at, m);
  }
  for (int64_t i = 0; i < count; i++) result[i] = add_up(partials + i * blocks, blocks);
}

// w <- w - sum_i result[i] row_i with result[i] = <w, row_i>.
template <typename scalar_t>
void project_out(scalar_t* w, const int64_t* rows, int64_t count, int64_t n, double* partials,
                 double* result, int threads) {
  dots(w, rows, count, n, partials, result, threads);
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  if (n * count < kMinParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock, m = min(kBlock, n - at);
    for (int64_t i = 0; i < count; i++)
      add_scaled(w + at, reinterpret_cast<const scalar_t*>(rows[i]) + at, scalar_t(-result[i]), m);
  }
}

// out[o] = sum_i weights[i, o] row_i.
template <typename scalar_t>
void linear_combinations(const int64_t* rows, int64_t count, const scalar_t* weights,
                         int64_t outputs, int64_t n, scalar_t* out, int threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  if (n * count < kMinParallel) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBlock, m = min(kBlock, n - at);
    for (int64_t o = 0; o < outputs; o++) {
      scalar_t* sum = out + o * n + at;
      for (int64_t e = 0; e < m; e++) sum[e] = 0;
      for (int64_t i = 0; i < count; i++)
        add_scaled(sum, reinterpret_cast<const scalar_t*>(rows[i]) + at, weights[i * outputs + o],
                   m);
    }
  }
}

}  // namespace

// Whether n bytes are the same; stops looking soon after the first that differ.
bool same_bytes(const char* a, const char* b, int64_t n, int threads) {
  constexpr int64_t kBytes = 1 << 16;
  const int64_t blocks = (n + kBytes - 1) / kBytes;
  if (n < 4 * kBytes) threads = 1;
  int different = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1) \
    reduction(| : different)
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t at = k * kBytes;
    if (!different) different |= memcmp(a + at, b + at, min(kBytes, n - at)) != 0;
  }
  return !different;
}

#define FM_DEFINE(scalar_t, suffix)                                                              \
  void lanczos_step_##suffix(scalar_t* w, const scalar_t* v, const scalar_t* v_previous,         \
                             const double* beta, int64_t n, double* partials, double* result,    \
                             int threads) {                                                      \
    lanczos_step(w, v, v_previous, beta, n, partials, result, threads);                          \
  }                                                                                              \
  void power_step_##suffix(const scalar_t* w, const scalar_t* v, double shift, int64_t n,        \
                           scalar_t* next, double* partials, double* result, int threads) {      \
    power_step(w, v, shift, n, next, partials, result, threads);                                 \
  }                                                                                              \
  void dots_##suffix(const scalar_t* w, const int64_t* rows, int64_t count, int64_t n,           \
                     double* partials, double* result, int threads) {                            \
    dots(w, rows, count, n, partials, result, threads);                                          \
  }                                                                                              \
  void project_out_##suffix(scalar_t* w, const int64_t* rows, int64_t count, int64_t n,          \
                            double* partials, double* result, int threads) {                     \
    project_out(w, rows, count, n, partials, result, threads);                                   \
  }                                                                                              \
  void linear_combinations_##suffix(const int64_t* rows, int64_t count, const scalar_t* weights, \
                                    int64_t outputs, int64_t n, scalar_t* out, int threads) {    \
    linear_combinations(rows, count, weights, outputs, n, out, threads);                         \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

// Doubles of scratch for `sums` sums over n elements.
static int64_t vector_partials(int64_t n, int64_t sums) { return sums * ((n + 4095) / 4096); }

void bind_vector(py::module_& m) {
  FM_BIND(m, lanczos_step);
  FM_BIND(m, power_step);
  FM_BIND(m, dots);
  FM_BIND(m, project_out);
  FM_BIND(m, linear_combinations);
  FM_EACH_ISA(FM_DEFINE_ONE, m, same_bytes);
#define FM_DEFINE_PARTIALS(ISA, m, name) define(m.attr(#ISA), #name, &name)
  FM_EACH_ISA(FM_DEFINE_PARTIALS, m, vector_partials);
#undef FM_DEFINE_PARTIALS
}

}  // namespace fastminima
#endif
