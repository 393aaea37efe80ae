// One pass over many tensors in one launch: their addresses travel as a kernel argument.
#pragma once

#include "tile.cuh"

namespace fastminima {
namespace cuda {

constexpr int kTensors = 96;  // the table stays under the 4 KiB that every driver takes

// Up to kTensors tensors; block b works on the tensor k with first[k] <= b < first[k + 1].
template <typename T>
struct Table {
  const T* x[kTensors];
  int64_t size[kTensors];
  int first[kTensors + 1];
  int count;
};

// The tensor that this block works on: the last k with first[k] <= block.
FM_DEVICE int tensor_of_block(const int* first, int count) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= int(blockIdx.x) ? low : high) = middle;
  }
  return low;
}

// What one block passes over.
template <typename T>
struct Share {
  const T* x;
  int64_t left;  // elements
  bool aligned;

  FM_DEVICE Share(const Table<T>& table, int64_t each) {
    const int k = tensor_of_block(table.first, table.count);
    const int64_t start = (int64_t(blockIdx.x) - table.first[k]) * each;
    x = table.x[k] + start;
    left = table.size[k] - start;
    if (left > each) left = each;
    aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
  }
};

template <typename T, int V>
FM_DEVICE double share_sq_norm(const Share<T>& share) {
  double sum = 0;
  for (int64_t at = 0; at < share.left; at += Tile<T, V>::kSize) {
    Tile<T, V> a;
    a.load(share.x + at, share.left - at);
    sum += a.dot(a);
  }
  return sum;
}

// Partials of sum_k |x_k|^2.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    multi_sq_norm(const FM_PARAMETER Table<T> table, int64_t each, double* partials) {
  FM_SHARED(double, shared, kWarps);
  const Share<T> share(table, each);
  double sum = share.aligned ? share_sq_norm<T, kVector<T>>(share) : share_sq_norm<T, 1>(share);
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

}  // namespace cuda
}  // namespace fastminima
