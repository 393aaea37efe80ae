// Steps of iterative eigensolvers on one flat vector, in two passes over memory.
//
// Sums are partials of blocks, added by one more block in the order of the blocks; scalars stay on
// the device. The work of a block depends on the length only, so sums are the same at every run.
#pragma once

#include "tile.cuh"

namespace fastminima {
namespace cuda {

constexpr int kRows = 256;   // addresses of vectors in one launch
constexpr int kRowTile = 8;  // vectors that a block multiplies with one load of w
constexpr int kOutTile = 8;  // combinations that a block makes of one load of the vectors

template <typename T>
struct Rows {
  const T* at[kRows];
};

// The part of a vector that a block passes over.
struct Stretch {
  int64_t begin, end;
  FM_DEVICE Stretch(int64_t n, int64_t each)
      : begin(int64_t(blockIdx.x) * each), end(begin + each < n ? begin + each : n) {}
};

// w <- w - beta u, partials of <w, v>; without u, w stays.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    subtract_and_dot(T* w, const T* v, const T* u, const double* beta, int64_t n, int64_t each,
                     double* partials) {
  FM_SHARED(double, shared, kWarps);
  const T b = u ? T(*beta) : T(0);
  const Stretch part(n, each);
  double sum = 0;
  for (int64_t at = part.begin; at < part.end; at += Tile<T, V>::kSize) {
    Tile<T, V> a, x, y;
    const int64_t left = part.end - at;
    a.load(w + at, left);
    x.load(v + at, left);
    if (u) {
      y.load(u + at, left);
      a.add(-b, y);
      a.store(w + at, left);
    }
    sum += a.dot(x);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// w <- w - alpha v, partials of |w|^2.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    subtract_and_square(T* w, const T* v, const double* alpha, int64_t n, int64_t each,
                        double* partials) {
  FM_SHARED(double, shared, kWarps);
  const T a = T(*alpha);
  const Stretch part(n, each);
  double sum = 0;
  for (int64_t at = part.begin; at < part.end; at += Tile<T, V>::kSize) {
    Tile<T, V> x, y;
    x.load(w + at, part.end - at);
    y.load(v + at, part.end - at);
    x.add(-a, y);
    x.store(w + at, part.end - at);
    sum += x.dot(x);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Partials of <w, v>, then those of |w - shift v|^2.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    dot_and_distance(const T* w, const T* v, double shift, int64_t n, int64_t each,
                     double* partials) {
  FM_SHARED(double, shared, kWarps);
  const Stretch part(n, each);
  double dot = 0, square = 0;
  for (int64_t at = part.begin; at < part.end; at += Tile<T, V>::kSize) {
    Tile<T, V> x, y;
    x.load(w + at, part.end - at);
    y.load(v + at, part.end - at);
    dot += x.dot(y);
    x.add(-T(shift), y);
    square += x.dot(x);
  }
  dot = block_sum(dot, shared);
  square = block_sum(square, shared);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = dot;
    partials[gridDim.x + blockIdx.x] = square;
  }
}

// next = (w - shift v) / norm, partials of |w - theta v|^2; result holds (theta, -, norm).
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    normalise(const T* w, const T* v, double shift, const double* result, int64_t n, int64_t each,
              T* next, double* partials) {
  FM_SHARED(double, shared, kWarps);
  const T theta = T(result[0]);
  const T scale = result[2] > 0 ? T(1 / result[2]) : T(1);
  const Stretch part(n, each);
  double sum = 0;
  for (int64_t at = part.begin; at < part.end; at += Tile<T, V>::kSize) {
    Tile<T, V> x, y, r;
    x.load(w + at, part.end - at);
    y.load(v + at, part.end - at);
    r = x;
    r.add(-theta, y);
    sum += r.dot(r);
    x.add(-T(shift), y);
    x.scale(scale);
    x.store(next + at, part.end - at);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename T, int V>
FM_DEVICE Pack<T, V> load_pack(const T* p, int64_t i, int64_t end) {
  Pack<T, V> pack;
  if (i + V <= end) {
    pack = *reinterpret_cast<const Pack<T, V>*>(p + i);
  } else {
#pragma unroll
    for (int j = 0; j < V; j++) pack.v[j] = i + j < end ? p[i + j] : T{};
  }
  return pack;
}

template <typename T, int V>
FM_DEVICE void store_pack(const Pack<T, V>& pack, T* p, int64_t i, int64_t end) {
  if (i + V <= end) {
    *reinterpret_cast<Pack<T, V>*>(p + i) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < V; j++)
      if (i + j < end) p[i + j] = pack.v[j];
  }
}

// Partials of <w, row>, for kRowTile of the rows; blocks of a row lie side by side.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    dot_rows(const T* w, const FM_PARAMETER Rows<T> rows, int count, int64_t n, int64_t each,
             int64_t blocks, double* partials) {
  FM_SHARED(double, shared, kWarps);
  const int first = int(blockIdx.y) * kRowTile;
  const Stretch part(n, each);
  double sum[kRowTile] = {};
  for (int64_t i = part.begin + int64_t(threadIdx.x) * V; i < part.end; i += kBlock * V) {
    Pack<T, V> row[kRowTile];
    const Pack<T, V> x = load_pack<T, V>(w, i, part.end);
#pragma unroll
    for (int r = 0; r < kRowTile; r++)
      if (first + r < count) row[r] = load_pack<T, V>(rows.at[first + r], i, part.end);
#pragma unroll
    for (int r = 0; r < kRowTile; r++)
      if (first + r < count) {
#pragma unroll
        for (int j = 0; j < V; j++) sum[r] += double(x.v[j]) * double(row[r].v[j]);
      }
  }
#pragma unroll
  for (int r = 0; r < kRowTile; r++) {
    const double total = block_sum(sum[r], shared);
    if (threadIdx.x == 0 && first + r < count)
      partials[int64_t(first + r) * blocks + blockIdx.x] = total;
  }
}

// w <- w - sum_i c_i row_i, in the order of the rows.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    subtract_rows(T* w, const FM_PARAMETER Rows<T> rows, int count, const double* c, int64_t n,
                  int64_t each) {
  const Stretch part(n, each);
  for (int64_t i = part.begin + int64_t(threadIdx.x) * V; i < part.end; i += kBlock * V) {
    Pack<T, V> x = load_pack<T, V>(w, i, part.end);
    for (int first = 0; first < count; first += kUnroll) {
      Pack<T, V> row[kUnroll];
#pragma unroll
      for (int r = 0; r < kUnroll; r++)
        if (first + r < count) row[r] = load_pack<T, V>(rows.at[first + r], i, part.end);
#pragma unroll
      for (int r = 0; r < kUnroll; r++)
        if (first + r < count) {
          const T factor = T(c[first + r]);
#pragma unroll
          for (int j = 0; j < V; j++) x.v[j] -= factor * row[r].v[j];
        }
    }
    store_pack(x, w, i, part.end);
  }
}

// out[o] (+)= sum_i weights[i, o] row_i for kOutTile of the outputs.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    combine_rows(const FM_PARAMETER Rows<T> rows, int count, const T* weights, int outputs,
                 bool adds, int64_t n, int64_t each, T* out, int64_t out_stride) {
  const int first = int(blockIdx.y) * kOutTile;
  const Stretch part(n, each);
  for (int64_t i = part.begin + int64_t(threadIdx.x) * V; i < part.end; i += kBlock * V) {
    Pack<T, V> sum[kOutTile] = {};
#pragma unroll
    for (int o = 0; o < kOutTile; o++)
      if (adds && first + o < outputs)
        sum[o] = load_pack<T, V>(out + (first + o) * out_stride, i, part.end);
    for (int begin = 0; begin < count; begin += kUnroll) {
      Pack<T, V> row[kUnroll];
#pragma unroll
      for (int r = 0; r < kUnroll; r++)
        if (begin + r < count) row[r] = load_pack<T, V>(rows.at[begin + r], i, part.end);
#pragma unroll
      for (int r = 0; r < kUnroll; r++)
        if (begin + r < count) {
          const T* const factors = weights + int64_t(begin + r) * outputs + first;
#pragma unroll
          for (int o = 0; o < kOutTile; o++) {
            const T factor = first + o < outputs ? factors[o] : T(0);
#pragma unroll
            for (int j = 0; j < V; j++) sum[o].v[j] += factor * row[r].v[j];
          }
        }
    }
#pragma unroll
    for (int o = 0; o < kOutTile; o++)
      if (first + o < outputs) store_pack(sum[o], out + (first + o) * out_stride, i, part.end);
  }
}

}  // namespace cuda
}  // namespace fastminima
