// Launches of langevin.cuh.
#include "api.h"
#include "langevin.cuh"

namespace fastminima {
namespace cuda {
namespace {

template <typename T>
void launch(const int64_t* params, const int64_t* grads, const int64_t* velocities,
            const int64_t* places, const int64_t* sizes, int64_t count, double lr, double momentum,
            double deviation, const NoiseStream& noise, Stream stream) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += sizes[k];
  const int64_t each = elements_per_block(total);
  Moving<T> table{};
  for (int64_t k = 0; k < count; k++) {
    if (sizes[k]) {
      const int slot = table.count++;
      table.p[slot] = reinterpret_cast<T*>(params[k]);
      table.g[slot] = reinterpret_cast<const T*>(grads[k]);
      table.v[slot] = velocities ? reinterpret_cast<T*>(velocities[k]) : nullptr;
      table.place[slot] = places[k];
      table.size[slot] = sizes[k];
      table.first[slot + 1] = table.first[slot] + int(blocks_for(sizes[k], each));
    }
    if (table.count == kMoving || (table.count && k + 1 == count)) {
      const dim3 blocks(unsigned(table.first[table.count]));
      if (velocities) {
        FM_LAUNCH((langevin_step<T, true>), blocks, kBlock, 0, stream, table, each, lr, momentum,
                  deviation, noise);
      } else {
        FM_LAUNCH((langevin_step<T, false>), blocks, kBlock, 0, stream, table, each, lr, momentum,
                  deviation, noise);
      }
      table.count = 0;
    }
  }
}

}  // namespace

#define FM_DEFINE(scalar_t, suffix)                                                            \
  void langevin_step_##suffix(const int64_t* params, const int64_t* grads,                     \
                              const int64_t* velocities, const int64_t* places,                \
                              const int64_t* sizes, int64_t count, double lr, double momentum, \
                              double deviation, int64_t seed, int64_t step, Stream stream) {   \
    launch<scalar_t>(params, grads, velocities, places, sizes, count, lr, momentum, deviation, \
                     {uint64_t(seed), uint64_t(step)}, stream);                                \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
FM_DEFINE(Half, f16)
FM_DEFINE(BFloat16, bf16)
#undef FM_DEFINE

}  // namespace cuda
}  // namespace fastminima
