// How many threads a kernel should use.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fastminima {

// Bytes of input below which another thread costs more than it brings (measured: benchmarks of
// the reductions, two x86-64 cores, where waking a sleeping thread takes 10 to 30 us).
constexpr int64_t kBytesPerThread = 256 << 10;

static inline int useful_threads(int threads, int64_t bytes) {
  int64_t most = bytes / kBytesPerThread;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

// Pieces that each of `batch` samples is cut into so that all threads have work.
static inline int64_t pieces_per_sample(int64_t batch, int threads) {
  if (threads == 1 || batch >= 4 * threads) return 1;
  return batch % threads == 0 ? 1 : threads;
}

// Cache-line aligned scratch memory, to be given to free().
template <typename scalar_t>
static inline scalar_t* scratch(int64_t count) {
  int64_t bytes = (count * static_cast<int64_t>(sizeof(scalar_t)) + 127) / 64 * 64;
  return static_cast<scalar_t*>(aligned_alloc(64, bytes));
}

}  // namespace fastminima
