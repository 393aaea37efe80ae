// One pass over many tensors in one launch: their addresses travel as a kernel argument.
#pragma once

#include "philox.cuh"
#include "tile.cuh"

namespace fastminima {
namespace cuda {

constexpr int kTensors = 96;  // the table stays under the 4 KiB that every driver takes

// Up to kTensors pairs of tensors; block b works on the tensor k with first[k] <= b < first[k + 1].
template <typename T>
struct Table {
  const T* x[kTensors];
  T* y[kTensors];
  int64_t size[kTensors];
  int64_t place[kTensors];  // of the tensor in the list laid end to end, in fours of elements
  int first[kTensors + 1];
  int count;
};

// What one block passes over.
template <typename T>
struct Share {
  const T* x;
  T* y;
  int64_t left;   // elements
  int64_t place;  // in fours of elements
  bool aligned;

  FM_DEVICE Share(const Table<T>& table, int64_t each) {
    int low = 0, high = table.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (table.first[middle] <= int(blockIdx.x) ? low : high) = middle;
    }
    const int64_t start = (int64_t(blockIdx.x) - table.first[low]) * each;
    x = table.x[low] + start;
    y = table.y[low] + start;
    left = table.size[low] - start;
    if (left > each) left = each;
    place = table.place[low] + start / 4;
    aligned = (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0;
  }
};

template <typename T, int V>
FM_DEVICE double dot_share(const Share<T>& share) {
  double sum = 0;
  for (int64_t at = 0; at < share.left; at += Tile<T, V>::kSize) {
    Tile<T, V> a, b;
    a.load(share.x + at, share.left - at);
    if (share.x == share.y) {
      b = a;
    } else {
      b.load(share.y + at, share.left - at);
    }
    sum += a.dot(b);
  }
  return sum;
}

// Partials of sum_k <x_k, y_k>.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    multi_dot(const FM_PARAMETER Table<T> table, int64_t each, double* partials) {
  FM_SHARED(double, shared, kWarps);
  const Share<T> share(table, each);
  double sum = share.aligned ? dot_share<T, kVector<T>>(share) : dot_share<T, 1>(share);
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename T, int V>
FM_DEVICE void axpy_share(const Share<T>& share, wide_t<T> factor) {
  for (int64_t at = 0; at < share.left; at += Tile<T, V>::kSize) {
    Tile<T, V> a, b;
    a.load(share.x + at, share.left - at);
    b.load(share.y + at, share.left - at);
    b.add(factor, a);
    b.store(share.y + at, share.left - at);
  }
}

// y_k <- y_k + factor x_k.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    multi_axpy(const FM_PARAMETER Table<T> table, int64_t each, double factor,
               const double* factor_at) {
  const Share<T> share(table, each);
  const wide_t<T> a = wide_t<T>(factor_at ? *factor_at : factor);
  if (share.aligned)
    axpy_share<T, kVector<T>>(share, a);
  else
    axpy_share<T, 1>(share, a);
}

// Reads or writes a pack of four elements, of which `left` are there.
template <typename T>
FM_DEVICE void load_four(const T* p, int64_t left, bool aligned, wide_t<T> (&v)[4]) {
  Pack<T, 4> pack{};
  if (aligned && left >= 4) {
    pack = *reinterpret_cast<const Pack<T, 4>*>(p);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (j < left) pack.v[j] = p[j];
  }
#pragma unroll
  for (int j = 0; j < 4; j++) v[j] = widen(pack.v[j]);
}

template <typename T>
FM_DEVICE void store_four(const wide_t<T> (&v)[4], T* p, int64_t left, bool aligned) {
  Pack<T, 4> pack;
#pragma unroll
  for (int j = 0; j < 4; j++) narrow(v[j], pack.v[j]);
  if (aligned && left >= 4) {
    *reinterpret_cast<Pack<T, 4>*>(p) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (j < left) p[j] = pack.v[j];
  }
}

// y_k <- y_k - lr x_k + deviation noise, rounded once; without deviation no noise is made.
template <typename T>
__global__ void __launch_bounds__(kBlock) langevin(const FM_PARAMETER Table<T> table, int64_t each,
                                                   double lr, double deviation, Noise noise) {
  const Share<T> share(table, each);
  const wide_t<T> step = wide_t<T>(lr), scale = wide_t<T>(deviation);
  const uint64_t stream = noise.stream();
#pragma unroll 2
  for (int64_t i = int64_t(threadIdx.x) * 4; i < share.left; i += kBlock * 4) {
    wide_t<T> g[4], p[4], z[4] = {};
    load_four(share.x + i, share.left - i, share.aligned, g);
    load_four(share.y + i, share.left - i, share.aligned, p);
    if (scale != 0) normals(noise(uint64_t(share.place + i / 4), stream), z);
#pragma unroll
    for (int j = 0; j < 4; j++) p[j] = p[j] - step * g[j] + scale * z[j];
    store_four(p, share.y + i, share.left - i, share.aligned);
  }
}

// out[e] = the e-th number of the stream: of a normal distribution, or signs.
template <typename T, bool kNormal>
__global__ void __launch_bounds__(kBlock)
    fill(T* out, int64_t n, int64_t each, bool aligned, Noise noise) {
  const int64_t begin = int64_t(blockIdx.x) * each, end = begin + each < n ? begin + each : n;
  const uint64_t stream = noise.stream();
  for (int64_t i = begin + int64_t(threadIdx.x) * 4; i < end; i += kBlock * 4) {
    wide_t<T> z[4];
    const Words words = noise(uint64_t(i / 4), stream);
    if (kNormal)
      normals(words, z);
    else
      signs(words, z);
    store_four(z, out + i, end - i, aligned);
  }
}

}  // namespace cuda
}  // namespace fastminima
