// Launches of multi.cuh.
#include "api.h"
#include "multi.cuh"
#include "partials.cuh"

namespace fastminima {
namespace cuda {
namespace {

int64_t total_of(const int64_t* sizes, int64_t count) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += sizes[k];
  return total;
}

// Calls run(table, blocks) for every kTensors of the tensors that are not empty.
template <typename T, typename F>
void each_table(const int64_t* x, const int64_t* sizes, int64_t count, int64_t each, F run) {
  Table<T> table{};
  for (int64_t k = 0; k < count; k++) {
    if (sizes[k]) {
      const int slot = table.count++;
      table.x[slot] = reinterpret_cast<const T*>(x[k]);
      table.size[slot] = sizes[k];
      table.first[slot + 1] = table.first[slot] + int(blocks_for(sizes[k], each));
    }
    if (table.count == kTensors || (table.count && k + 1 == count)) {
      run(table, table.first[table.count]);
      table.count = 0;
    }
  }
}

template <typename T>
void launch_sq_norm(const int64_t* x, const int64_t* sizes, int64_t count, double* partials,
                    double* result, Stream stream) {
  const int64_t each = elements_per_block(total_of(sizes, count));
  int64_t done = 0;
  each_table<T>(x, sizes, count, each, [&](const Table<T>& table, int blocks) {
    double* const here = partials + done;
    FM_LAUNCH((multi_sq_norm<T>), blocks, kBlock, 0, stream, table, each, here);
    done += blocks;
  });
  launch_add_partials(partials, done, result, 1, 1, 0, stream);
}

}  // namespace

int64_t multi_partials(const int64_t* sizes, int64_t count) {
  const int64_t each = elements_per_block(total_of(sizes, count));
  int64_t blocks = 0;
  for (int64_t k = 0; k < count; k++) blocks += blocks_for(sizes[k], each);
  return blocks;
}

#define FM_DEFINE(scalar_t, suffix)                                                  \
  void multi_sq_norm_##suffix(const int64_t* x, const int64_t* sizes, int64_t count, \
                              double* partials, double* result, Stream stream) {     \
    launch_sq_norm<scalar_t>(x, sizes, count, partials, result, stream);             \
  }
FM_DEFINE(float, f32)
FM_DEFINE(double, f64)
FM_DEFINE(Half, f16)
FM_DEFINE(BFloat16, bf16)
#undef FM_DEFINE

}  // namespace cuda
}  // namespace fastminima
