// Adds up what the blocks of another kernel have left, in the order of the blocks.
#pragma once

#include "tile.cuh"

namespace fastminima {
namespace cuda {

// result[s * step] = sum of the s-th `count` partials, its root where bit s of `roots` is set.
static __global__ void __launch_bounds__(kBlock)
    add_partials(const double* partials, int64_t count, double* result, int step, unsigned roots) {
  FM_SHARED(double, shared, kWarps);
  const unsigned s = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kBlock) sum += partials[int64_t(s) * count + i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) result[int64_t(s) * step] = s < 32 && roots >> s & 1 ? root(sum) : sum;
}

inline void launch_add_partials(const double* partials, int64_t count, double* result, int sums,
                                int step, unsigned roots, void* stream) {
  FM_LAUNCH(add_partials, sums, kBlock, 0, stream, partials, count, result, step, roots);
}

}  // namespace cuda
}  // namespace fastminima
