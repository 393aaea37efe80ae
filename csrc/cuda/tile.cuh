// What the passes over long vectors share: 16-byte loads, several in flight, sums in fixed order.
#pragma once

#include "portable.h"

namespace fastminima {
namespace cuda {

#if defined(FM_THREADS)
constexpr int kBlock = FM_THREADS;  // tests take fewer: each is a fiber
#else
constexpr int kBlock = 256;  // threads
#endif
constexpr int kWarps = kBlock / 32;
constexpr int kUnroll = 4;            // packs that a thread loads before it uses the first
constexpr int64_t kMaxBlocks = 4096;  // 4 waves on 132 multiprocessors: no long last one
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// Elements in 16 bytes.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

// What one thread holds of a stretch of memory: packs that lie kBlock packs apart.
template <typename T, int V>
struct Tile {
  static constexpr int kSize = kBlock * kUnroll * V;  // elements that a block covers

  wide_t<T> v[kUnroll][V];

  static FM_DEVICE int place(int k) { return (k * kBlock + int(threadIdx.x)) * V; }

  // Of the `count` elements at `p`; zeros beyond.
  FM_DEVICE void load(const T* p, int64_t count) {
    Pack<T, V> pack[kUnroll];
    const int left = count < kSize ? int(count) : kSize;
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      const int i = place(k);
      if (i + V <= left) {
        pack[k] = *reinterpret_cast<const Pack<T, V>*>(p + i);
      } else {
#pragma unroll
        for (int j = 0; j < V; j++) pack[k].v[j] = i + j < left ? p[i + j] : T{};
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
#pragma unroll
      for (int j = 0; j < V; j++) v[k][j] = widen(pack[k].v[j]);
  }

  FM_DEVICE void store(T* p, int64_t count) const {
    const int left = count < kSize ? int(count) : kSize;
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      Pack<T, V> pack;
#pragma unroll
      for (int j = 0; j < V; j++) narrow(v[k][j], pack.v[j]);
      const int i = place(k);
      if (i + V <= left) {
        *reinterpret_cast<Pack<T, V>*>(p + i) = pack;
      } else {
#pragma unroll
        for (int j = 0; j < V; j++)
          if (i + j < left) p[i + j] = pack.v[j];
      }
    }
  }

  // this + a other, at the precision of the elements.
  FM_DEVICE void add(wide_t<T> a, const Tile& other) {
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
#pragma unroll
      for (int j = 0; j < V; j++) v[k][j] += a * other.v[k][j];
  }

  FM_DEVICE void scale(wide_t<T> a) {
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
#pragma unroll
      for (int j = 0; j < V; j++) v[k][j] *= a;
  }

  // The thread's part of the inner product, in double: squares of floats may leave their range.
  FM_DEVICE double dot(const Tile& other) const {
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
#pragma unroll
      for (int j = 0; j < V; j++) sum += double(v[k][j]) * double(other.v[k][j]);
    return sum;
  }
};

// Elements that each block passes over: whole tiles, depending on nothing but the total.
inline int64_t elements_per_block(int64_t total) {
  constexpr int64_t kStep = int64_t(kBlock) * kUnroll * 8;  // a multiple of every tile
  const int64_t each = (total + kMaxBlocks - 1) / kMaxBlocks;
  return each < kStep ? kStep : (each + kStep - 1) / kStep * kStep;
}

inline int64_t blocks_for(int64_t n, int64_t each) { return (n + each - 1) / each; }

inline bool is_aligned(const void* p, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

FM_DEVICE double warp_sum(double s) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) s += __shfl_xor_sync(kFullWarp, s, offset);
  return s;
}

// The sum over the block, in every lane of its first warp. `shared` has kWarps doubles.
FM_DEVICE double block_sum(double s, double* shared) {
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  s = warp_sum(s);
  __syncthreads();  // of an earlier sum, all have read
  if (lane == 0) shared[warp] = s;
  __syncthreads();
  return warp == 0 ? warp_sum(lane < kWarps ? shared[lane] : 0.0) : 0.0;
}

}  // namespace cuda
}  // namespace fastminima
