// Launches of multi.cuh.
#include "api.h"
#include "multi.cuh"
#include "partials.cuh"

namespace fastminima {
namespace cuda {
namespace {

int64_t total_of(const int64_t* sizes, int64_t count) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += sizes[k];
  return total;
}

// Calls run(table, blocks) for every kTensors of the tensors that are not empty.
template <typename T, typename F>
void each_table(const int64_t* x, const int64_t* y, const int64_t* sizes, int64_t count,
                int64_t each, F run) {
  Table<T> table{};
  int64_t place = 0;
  for (int64_t k = 0; k < count; k++) {
    if (sizes[k]) {
      const int slot = table.count++;
      table.x[slot] = reinterpret_cast<const T*>(x[k]);
      table.y[slot] = reinterpret_cast<T*>(y[k]);
      table.size[slot] = sizes[k];
      table.place[slot] = place;
      table.first[slot + 1] = table.first[slot] + int(blocks_for(sizes[k], each));
    }
    place += (sizes[k] + 3) / 4;
    if (table.count == kTensors || (table.count && k + 1 == count)) {
      run(table, table.first[table.count]);
      table.count = 0;
    }
  }
}

template <typename T>
void launch_dot(const int64_t* x, const int64_t* y, const int64_t* sizes, int64_t count,
                double* partials, double* result, Stream stream) {
  const int64_t each = elements_per_block(total_of(sizes, count));
  int64_t done = 0;
  each_table<T>(x, y, sizes, count, each, [&](const Table<T>& table, int blocks) {
    double* const here = partials + done;
    FM_LAUNCH((multi_dot<T>), blocks, kBlock, 0, stream, table, each, here);
    done += blocks;
  });
  launch_add_partials(partials, done, result, 1, 1, 0, stream);
}

template <typename T>
void launch_axpy(const int64_t* x, const int64_t* y, const int64_t* sizes, int64_t count,
                 double factor, const double* factor_at, Stream stream) {
  const int64_t each = elements_per_block(total_of(sizes, count));
  each_table<T>(x, y, sizes, count, each, [&](const Table<T>& table, int blocks) {
    FM_LAUNCH((multi_axpy<T>), blocks, kBlock, 0, stream, table, each, factor, factor_at);
  });
}

template <typename T>
void launch_langevin(const int64_t* grads, const int64_t* params, const int64_t* sizes,
                     int64_t count, double lr, double deviation, const Noise& noise,
                     Stream stream) {
  const int64_t each = elements_per_block(total_of(sizes, count));
  each_table<T>(grads, params, sizes, count, each, [&](const Table<T>& table, int blocks) {
    FM_LAUNCH((langevin<T>), blocks, kBlock, 0, stream, table, each, lr, deviation, noise);
  });
}

template <typename T, bool kNormal>
void launch_fill(T* out, int64_t n, const Noise& noise, Stream stream) {
  if (!n) return;
  const int64_t each = elements_per_block(n);
  const bool aligned = is_aligned(out, sizeof(Pack<T, 4>));
  FM_LAUNCH((fill<T, kNormal>), dim3(unsigned(blocks_for(n, each))), kBlock, 0, stream, out, n,
            each, aligned, noise);
}

}  // namespace

int64_t multi_partials(const int64_t* sizes, int64_t count) {
  const int64_t each = elements_per_block(total_of(sizes, count));
  int64_t blocks = 0;
  for (int64_t k = 0; k < count; k++) blocks += blocks_for(sizes[k], each);
  return blocks;
}

#define FM_DEFINE(scalar_t, suffix)                                                                \
  void multi_dot_##suffix(const int64_t* x, const int64_t* y, const int64_t* sizes, int64_t count, \
                          double* partials, double* result, Stream stream) {                       \
    launch_dot<scalar_t>(x, y, sizes, count, partials, result, stream);                            \
  }                                                                                                \
  void multi_axpy_##suffix(const int64_t* x, const int64_t* y, const int64_t* sizes,               \
                           int64_t count, double factor, const double* factor_at, Stream stream) { \
    launch_axpy<scalar_t>(x, y, sizes, count, factor, factor_at, stream);                          \
  }                                                                                                \
  void langevin_step_##suffix(const int64_t* grads, const int64_t* params, const int64_t* sizes,   \
                              int64_t count, double lr, double deviation, int64_t seed,            \
                              int64_t offset, const int64_t* offset_at, Stream stream) {           \
    const Noise noise = {uint64_t(seed), uint64_t(offset), offset_at};                             \
    launch_langevin<scalar_t>(grads, params, sizes, count, lr, deviation, noise, stream);          \
  }                                                                                                \
  void gaussian_fill_##suffix(scalar_t* out, int64_t n, int64_t seed, int64_t offset,              \
                              const int64_t* offset_at, Stream stream) {                           \
    launch_fill<scalar_t, true>(out, n, {uint64_t(seed), uint64_t(offset), offset_at}, stream);    \
  }                                                                                                \
  void rademacher_fill_##suffix(scalar_t* out, int64_t n, int64_t seed, int64_t offset,            \
                                const int64_t* offset_at, Stream stream) {                         \
    launch_fill<scalar_t, false>(out, n, {uint64_t(seed), uint64_t(offset), offset_at}, stream);   \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
FM_DEFINE(Half, f16)
FM_DEFINE(BFloat16, bf16)
#undef FM_DEFINE

}  // namespace cuda
}  // namespace fastminima
