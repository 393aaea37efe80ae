// The launchers of the CUDA kernels: no CUDA type in sight, so that any compiler can bind them.
//
// Pointers are to device memory but where said; `stream` is a cudaStream_t. Nothing here allocates
// or waits, so all of it can be captured in a graph. A refused launch throws std::runtime_error.
#pragma once

#include <cstdint>

namespace fastminima {
namespace cuda {

using Stream = void*;
struct Half;
struct BFloat16;

// Doubles of scratch for `sums` sums over n elements.
int64_t vector_partials(int64_t n, int64_t sums);
// Doubles of scratch for one sum over `count` tensors; `sizes` on the host.
int64_t multi_partials(const int64_t* sizes, int64_t count);
// 64-bit words of scratch for sorting `lists` lists of `length` steps.
int64_t sort_words(int64_t lists, int64_t length);
// Doubles of scratch for the norms of `batch` samples of `time` steps, and for their dots.
int64_t embedding_partials(int64_t batch, int64_t time, int64_t width);
int64_t embedding_dot_partials(int64_t batch, int64_t time, int64_t width);

// result = (alpha, norm); `u` null: no previous vector. See fastminima.ops.vector.
#define FM_DECLARE(scalar_t, suffix)                                                               \
  void lanczos_step_##suffix(scalar_t* w, const scalar_t* v, const scalar_t* u,                    \
                             const double* beta, int64_t n, double* partials, double* result,      \
                             Stream stream);                                                       \
  void power_step_##suffix(const scalar_t* w, const scalar_t* v, double shift, int64_t n,          \
                           scalar_t* next, double* partials, double* result, Stream stream);       \
  /* `rows`: addresses, on the host. */                                                            \
  void dots_##suffix(const scalar_t* w, const int64_t* rows, int64_t count, int64_t n,             \
                     double* partials, double* result, Stream stream);                             \
  void project_out_##suffix(scalar_t* w, const int64_t* rows, int64_t count, int64_t n,            \
                            double* partials, double* result, Stream stream);                      \
  void linear_combinations_##suffix(const int64_t* rows, int64_t count, const scalar_t* weights,   \
                                    int64_t outputs, int64_t n, scalar_t* out, int64_t out_stride, \
                                    Stream stream);
FM_DECLARE(float, f32)
FM_DECLARE(double, f64)
#undef FM_DECLARE

// Lists of tensors: addresses, places and sizes on the host; `velocities` null: no momentum. See
// fastminima.ops.multi and fastminima.ops.langevin.
#define FM_DECLARE(scalar_t, suffix)                                                           \
  void multi_sq_norm_##suffix(const int64_t* x, const int64_t* sizes, int64_t count,           \
                              double* partials, double* result, Stream stream);                \
  void langevin_step_##suffix(const int64_t* params, const int64_t* grads,                     \
                              const int64_t* velocities, const int64_t* places,                \
                              const int64_t* sizes, int64_t count, double lr, double momentum, \
                              double deviation, int64_t seed, int64_t step, Stream stream);
FM_DECLARE(float, f32)
FM_DECLARE(double, f64)
FM_DECLARE(Half, f16)
FM_DECLARE(BFloat16, bf16)
#undef FM_DECLARE

// Sorts (id, step) of `lists` lists of `length` steps; step s of a list is step s modulo `time` of
// sample s / time of the list. Strides in elements. Needs ids below 2^63 / length.
void sort_steps(const int64_t* ids, int64_t ids_batch, int64_t ids_time, int64_t lists,
                int64_t length, int64_t time, int64_t padding_idx, int64_t* words, Stream stream);

// `words` as sort_steps left them: lists of samples for the norms, one list of the batch, shorter
// than 2^32, for the second moment. g has unit stride along its width, the others in elements. The
// direction v is in the dtype of g, or where `is_wide` is not 0 in that of the result.
#define FM_DECLARE(scalar_t, suffix, wide_t)                                                      \
  void embedding_sq_norms_##suffix(const int64_t* words, const scalar_t* g, int64_t g_batch,      \
                                   int64_t g_time, int64_t batch, int64_t time, int64_t width,    \
                                   double* partials, wide_t* norms, Stream stream);               \
  void embedding_second_moment_##suffix(const int64_t* words, const scalar_t* g, int64_t g_batch, \
                                        int64_t g_time, int64_t batch, int64_t time,              \
                                        int64_t width, wide_t* total, Stream stream);             \
  void embedding_dots_##suffix(const int64_t* ids, int64_t ids_batch, int64_t ids_time,           \
                               const scalar_t* g, int64_t g_batch, int64_t g_time, int64_t batch, \
                               int64_t time, int64_t width, int64_t padding_idx, const void* v,   \
                               int64_t v_row, int64_t is_wide, double* partials, wide_t* dots,    \
                               Stream stream);
FM_DECLARE(float, f32, float)
FM_DECLARE(double, f64, double)
FM_DECLARE(Half, f16, float)
FM_DECLARE(BFloat16, bf16, float)
#undef FM_DECLARE

}  // namespace cuda
}  // namespace fastminima

// Runs X(name) for each launcher.
#define FM_EACH_OF_VECTOR(X, suffix) \
  X(lanczos_step_##suffix)           \
  X(power_step_##suffix)             \
  X(dots_##suffix)                   \
  X(project_out_##suffix)            \
  X(linear_combinations_##suffix)
#define FM_EACH_OF_TENSORS(X, suffix) \
  X(multi_sq_norm_##suffix)           \
  X(langevin_step_##suffix)           \
  X(embedding_sq_norms_##suffix)      \
  X(embedding_second_moment_##suffix) \
  X(embedding_dots_##suffix)
#define FM_EACH_LAUNCHER(X)  \
  X(vector_partials)         \
  X(multi_partials)          \
  X(sort_words)              \
  X(embedding_partials)      \
  X(embedding_dot_partials)  \
  X(sort_steps)              \
  FM_EACH_OF_VECTOR(X, f32)  \
  FM_EACH_OF_VECTOR(X, f64)  \
  FM_EACH_OF_TENSORS(X, f32) \
  FM_EACH_OF_TENSORS(X, f64) \
  FM_EACH_OF_TENSORS(X, f16) \
  FM_EACH_OF_TENSORS(X, bf16)
