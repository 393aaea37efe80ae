// How many threads a kernel should use.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fastminima {

// Bytes of input below which another thread costs more than it brings: a parallel region of two
// threads takes 3 us by itself (x86-64, libgomp, passive waiting), reading this much from L2 6 us.
constexpr int64_t kBytesPerThread = 256 << 10;

// The same for kernels that read their input once and do little else. On two cores of an AMD EPYC
// (libgomp, passive waiting) a second thread lost 40 us on 4 MiB in the caches, and gained nothing
// on 4 MiB and 2 % on 8 MiB from memory.
constexpr int64_t kStreamedBytesPerThread = 4 << 20;

static inline int threads_for(int threads, int64_t bytes, int64_t bytes_each) {
  int64_t most = bytes / bytes_each;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

static inline int useful_threads(int threads, int64_t bytes) {
  return threads_for(threads, bytes, kBytesPerThread);
}

static inline int streaming_threads(int threads, int64_t bytes) {
  return threads_for(threads, bytes, kStreamedBytesPerThread);
}

// Pieces that each of `batch` samples is cut into so that all threads have work.
static inline int64_t pieces_per_sample(int64_t batch, int threads) {
  if (threads == 1 || batch >= 4 * threads) return 1;
  return batch % threads == 0 ? 1 : threads;
}

// Runs body(i) for i < count. One thread needs no parallel region, which takes 0.2 us by itself.
template <typename body_t>
static inline void parallel_for(int64_t count, int threads, body_t body) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) body(i);
}

// Cache-line aligned scratch memory, to be given to free().
template <typename scalar_t>
static inline scalar_t* scratch(int64_t count) {
  int64_t bytes = (count * static_cast<int64_t>(sizeof(scalar_t)) + 127) / 64 * 64;
  return static_cast<scalar_t*>(aligned_alloc(64, bytes));
}

}  // namespace fastminima
