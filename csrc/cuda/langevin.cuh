// A step of Langevin dynamics on many tensors in one launch: one pass, noise made where it is used.
#pragma once

#include "multi.cuh"
#include "philox.cuh"

namespace fastminima {
namespace cuda {

constexpr int kMoving = 80;  // the table stays under the 4 KiB that every driver takes

// Up to kMoving tensors; block b works on the tensor k with first[k] <= b < first[k + 1].
template <typename T>
struct Moving {
  T* p[kMoving];
  const T* g[kMoving];
  T* v[kMoving];           // velocities; null without momentum
  int64_t place[kMoving];  // of the first element in the stream, in fours of elements
  int64_t size[kMoving];
  int first[kMoving + 1];
  int count;
};

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

// v <- momentum v + root g - deviation z, p <- p - root v, each rounded once; root is that of lr.
// Without momentum v begins at zero. Without deviation no noise is made.
template <typename T, bool kMomentum>
__global__ void __launch_bounds__(kBlock)
    langevin_step(const FM_PARAMETER Moving<T> table, int64_t each, double lr, double momentum,
                  double deviation, NoiseStream noise) {
  using wide = wide_t<T>;
  const int k = tensor_of_block(table.first, table.count);
  const int64_t start = (int64_t(blockIdx.x) - table.first[k]) * each;
  T* const p = table.p[k] + start;
  const T* const g = table.g[k] + start;
  T* const v = kMomentum ? table.v[k] + start : nullptr;
  const int64_t rest = table.size[k] - start, count = rest < each ? rest : each;
  const uintptr_t all = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(g) |
                        reinterpret_cast<uintptr_t>(v);
  const bool aligned = all % sizeof(Pack<T, 4>) == 0;
  const wide rate = wide(lr), root_rate = wide(sqrt(lr)), decay = wide(momentum);
  const wide scale = wide(kMomentum ? deviation : sqrt(lr) * deviation);
#pragma unroll 2
  for (int64_t i = int64_t(threadIdx.x) * 4; i < count; i += kBlock * 4) {
    const int64_t left = count - i;
    wide x[4], d[4], u[4], z[4] = {};
    load_four(p + i, left, aligned, x);
    load_four(g + i, left, aligned, d);
    if (kMomentum) load_four(v + i, left, aligned, u);
    if (scale != 0) normals(noise(uint64_t(table.place[k] + (start + i) / 4)), z);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (kMomentum) {
        u[j] = decay * u[j] + root_rate * d[j] - scale * z[j];
        x[j] -= root_rate * u[j];
      } else {
        x[j] += scale * z[j] - rate * d[j];
      }
    }
    store_four(x, p + i, left, aligned);
    if (kMomentum) store_four(u, v + i, left, aligned);
  }
}

}  // namespace cuda
}  // namespace fastminima
