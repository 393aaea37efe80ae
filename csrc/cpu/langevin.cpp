// A step of Langevin dynamics: parameters, gradients and velocities are passed over once, and noise
// is made where it is used.
#include "cpu/langevin.h"

#include "cpu/philox.h"
#include "parallel.h"

namespace fastminima {
namespace FM_ISA {
namespace {

constexpr int kCounters = 256;
constexpr int kChunk = 4 * kCounters;  // elements; their words and numbers stay in the L1 cache

template <typename scalar_t>
struct Step {
  scalar_t lr, root, momentum, deviation;  // root: of the learning rate
  Stream stream;
};

// A chunk of one tensor whose first number is `place`; `v` null without momentum.
template <typename scalar_t>
void step_chunk(const Step<scalar_t>& step, scalar_t* __restrict p, const scalar_t* __restrict g,
                scalar_t* __restrict v, uint64_t place, int n) {
  alignas(64) scalar_t z[kChunk];
  if (step.deviation != 0) {
    normals<scalar_t, kCounters>(step.stream, place, (n + 3) / 4, z);
  } else {
    for (int i = 0; i < n; i++) z[i] = 0;
  }
  if (v) {
    for (int i = 0; i < n; i++) {
      v[i] = step.momentum * v[i] + step.root * g[i] - step.deviation * z[i];
      p[i] -= step.root * v[i];
    }
  } else {
    const scalar_t deviation = step.root * step.deviation;
    for (int i = 0; i < n; i++) p[i] += deviation * z[i] - step.lr * g[i];
  }
}

FM_INLINE int64_t chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

template <typename scalar_t>
void langevin_step(const int64_t* params, const int64_t* grads, const int64_t* velocities,
                   const int64_t* places, const int64_t* sizes, int64_t count,
                   const Step<scalar_t>& step, int threads) {
  int64_t total = 0, bytes = 0;
  for (int64_t k = 0; k < count; k++)
    total += chunks(sizes[k]), bytes += sizes[k] * int64_t(sizeof(scalar_t));
  threads = useful_threads(threads, bytes);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    const int64_t from = total * t / threads, to = total * (t + 1) / threads;
    int64_t first = 0;  // chunk of the list that tensor k begins with
    for (int64_t k = 0; k < count && first < to; k++) {
      const int64_t end = first + chunks(sizes[k]);
      for (int64_t c = first > from ? first : from; c < end && c < to; c++) {
        const int64_t at = (c - first) * kChunk, left = sizes[k] - at;
        scalar_t* const v = velocities ? reinterpret_cast<scalar_t*>(velocities[k]) + at : nullptr;
        step_chunk(step, reinterpret_cast<scalar_t*>(params[k]) + at,
                   reinterpret_cast<const scalar_t*>(grads[k]) + at, v,
                   uint64_t(places[k] + at / 4), left < kChunk ? int(left) : kChunk);
      }
      first = end;
    }
  }
}

}  // namespace

#define FM_KERNELS(scalar_t, suffix)                                                           \
  void langevin_step_##suffix(const int64_t* params, const int64_t* grads,                     \
                              const int64_t* velocities, const int64_t* places,                \
                              const int64_t* sizes, int64_t count, double lr, double momentum, \
                              double deviation, int64_t seed, int64_t step, int threads) {     \
    const Step<scalar_t> all = {scalar_t(lr),                                                  \
                                scalar_t(__builtin_sqrt(lr)),                                  \
                                scalar_t(momentum),                                            \
                                scalar_t(deviation),                                           \
                                {uint64_t(seed), uint64_t(step)}};                             \
    langevin_step<scalar_t>(params, grads, velocities, places, sizes, count, all, threads);    \
  }
FM_KERNELS(float, f32)
FM_KERNELS(double, f64)
#undef FM_KERNELS

}  // namespace FM_ISA
}  // namespace fastminima

#ifdef FM_BASELINE
#include "bind.h"

namespace fastminima {

void bind_langevin(py::module_& m) { FM_BIND(m, langevin_step); }

}  // namespace fastminima
#endif
