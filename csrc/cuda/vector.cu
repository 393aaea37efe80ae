// Launches of vector.cuh.
#include "api.h"
#include "partials.cuh"
#include "vector.cuh"

namespace fastminima {
namespace cuda {
namespace {

template <int V>
struct Width {
  static constexpr int value = V;
};

// Calls run with the vector width that fits: 16 bytes where every address allows it.
template <typename T, typename F>
void with_width(bool aligned, F run) {
  if (aligned)
    run(Width<kVector<T>>());
  else
    run(Width<1>());
}

template <typename T>
void lanczos_step(T* w, const T* v, const T* u, const double* beta, int64_t n, double* partials,
                  double* result, Stream stream) {
  const int64_t each = elements_per_block(n), blocks = blocks_for(n, each);
  const bool aligned = is_aligned(w) && is_aligned(v) && is_aligned(u);
  with_width<T>(aligned, [&](auto width) {
    constexpr int V = decltype(width)::value;
    if (n)
      FM_LAUNCH((subtract_and_dot<T, V>), blocks, kBlock, 0, stream, w, v, u, beta, n, each,
                partials);
    launch_add_partials(partials, blocks, result, 1, 1, 0, stream);
    if (n)
      FM_LAUNCH((subtract_and_square<T, V>), blocks, kBlock, 0, stream, w, v, result, n, each,
                partials);
    launch_add_partials(partials, blocks, result + 1, 1, 1, 1, stream);
  });
}

template <typename T>
void power_step(const T* w, const T* v, double shift, int64_t n, T* next, double* partials,
                double* result, Stream stream) {
  const int64_t each = elements_per_block(n), blocks = blocks_for(n, each);
  const bool aligned = is_aligned(w) && is_aligned(v) && is_aligned(next);
  with_width<T>(aligned, [&](auto width) {
    constexpr int V = decltype(width)::value;
    if (n)
      FM_LAUNCH((dot_and_distance<T, V>), blocks, kBlock, 0, stream, w, v, shift, n, each,
                partials);
    launch_add_partials(partials, blocks, result, 2, 2, 2,
                        stream);  // into result[0] and, its root, result[2]
    if (n)
      FM_LAUNCH((normalise<T, V>), blocks, kBlock, 0, stream, w, v, shift, result, n, each, next,
                partials);
    launch_add_partials(partials, blocks, result + 1, 1, 1, 1, stream);
  });
}

// Up to kRows of the addresses from `first` on.
template <typename T>
Rows<T> some_rows(const int64_t* rows, int64_t first, int count) {
  Rows<T> some{};
  for (int r = 0; r < count; r++) some.at[r] = reinterpret_cast<const T*>(rows[first + r]);
  return some;
}

int group_size(int64_t count, int64_t first) {
  return count - first < kRows ? int(count - first) : kRows;
}

bool all_aligned(const int64_t* rows, int64_t count) {
  bool aligned = true;
  for (int64_t i = 0; i < count; i++) aligned &= rows[i] % 16 == 0;
  return aligned;
}

dim3 grid_of(int64_t blocks, int64_t count, int tile) {
  return dim3(unsigned(blocks), unsigned((count + tile - 1) / tile));
}

template <typename T>
void dots(const T* w, const int64_t* rows, int64_t count, int64_t n, double* partials,
          double* result, Stream stream) {
  if (!count) return;
  const int64_t each = elements_per_block(n), blocks = blocks_for(n, each);
  with_width<T>(is_aligned(w) && all_aligned(rows, count), [&](auto width) {
    constexpr int V = decltype(width)::value;
    for (int64_t first = 0; n && first < count; first += kRows) {
      const int some = group_size(count, first);
      const Rows<T> table = some_rows<T>(rows, first, some);
      double* const here = partials + first * blocks;
      FM_LAUNCH((dot_rows<T, V>), grid_of(blocks, some, kRowTile), kBlock, 0, stream, w, table,
                some, n, each, blocks, here);
    }
    launch_add_partials(partials, blocks, result, int(count), 1, 0, stream);
  });
}

template <typename T>
void project_out(T* w, const int64_t* rows, int64_t count, int64_t n, double* partials,
                 double* result, Stream stream) {
  if (!count) return;
  dots(w, rows, count, n, partials, result, stream);
  const int64_t each = elements_per_block(n), blocks = blocks_for(n, each);
  with_width<T>(is_aligned(w) && all_aligned(rows, count), [&](auto width) {
    constexpr int V = decltype(width)::value;
    for (int64_t first = 0; n && first < count; first += kRows) {
      const int some = group_size(count, first);
      const Rows<T> table = some_rows<T>(rows, first, some);
      const double* const c = result + first;
      FM_LAUNCH((subtract_rows<T, V>), dim3(unsigned(blocks)), kBlock, 0, stream, w, table, some, c,
                n, each);
    }
  });
}

template <typename T>
void linear_combinations(const int64_t* rows, int64_t count, const T* weights, int64_t outputs,
                         int64_t n, T* out, int64_t out_stride, Stream stream) {
  if (!n || !outputs) return;
  const int64_t each = elements_per_block(n), blocks = blocks_for(n, each);
  const bool aligned =
      all_aligned(rows, count) && is_aligned(out) && (outputs == 1 || out_stride % kVector<T> == 0);
  with_width<T>(aligned, [&](auto width) {
    constexpr int V = decltype(width)::value;
    for (int64_t first = 0; first < count; first += kRows) {
      const int some = group_size(count, first);
      const Rows<T> table = some_rows<T>(rows, first, some);
      const T* const part = weights + first * outputs;
      const bool adds = first > 0;
      FM_LAUNCH((combine_rows<T, V>), grid_of(blocks, outputs, kOutTile), kBlock, 0, stream, table,
                some, part, int(outputs), adds, n, each, out, out_stride);
    }
  });
}

}  // namespace

int64_t vector_partials(int64_t n, int64_t sums) {
  return sums * blocks_for(n, elements_per_block(n));
}

#define FM_DEFINE(scalar_t, suffix)                                                                \
  void lanczos_step_##suffix(scalar_t* w, const scalar_t* v, const scalar_t* u,                    \
                             const double* beta, int64_t n, double* partials, double* result,      \
                             Stream stream) {                                                      \
    lanczos_step(w, v, u, beta, n, partials, result, stream);                                      \
  }                                                                                                \
  void power_step_##suffix(const scalar_t* w, const scalar_t* v, double shift, int64_t n,          \
                           scalar_t* next, double* partials, double* result, Stream stream) {      \
    power_step(w, v, shift, n, next, partials, result, stream);                                    \
  }                                                                                                \
  void dots_##suffix(const scalar_t* w, const int64_t* rows, int64_t count, int64_t n,             \
                     double* partials, double* result, Stream stream) {                            \
    dots(w, rows, count, n, partials, result, stream);                                             \
  }                                                                                                \
  void project_out_##suffix(scalar_t* w, const int64_t* rows, int64_t count, int64_t n,            \
                            double* partials, double* result, Stream stream) {                     \
    project_out(w, rows, count, n, partials, result, stream);                                      \
  }                                                                                                \
  void linear_combinations_##suffix(const int64_t* rows, int64_t count, const scalar_t* weights,   \
                                    int64_t outputs, int64_t n, scalar_t* out, int64_t out_stride, \
                                    Stream stream) {                                               \
    linear_combinations(rows, count, weights, outputs, n, out, out_stride, stream);                \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
#undef FM_DEFINE

}  // namespace cuda
}  // namespace fastminima
