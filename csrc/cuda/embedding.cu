// Launches of embedding.cuh.
#include "api.h"
#include "embedding.cuh"

namespace fastminima {
namespace cuda {
namespace {

Keys keys_for(int64_t length) {
  int bits = 1;
  while (int64_t(1) << bits < length) bits++;
  return {bits};
}

int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }
int64_t dot_chunks_of(int64_t length) { return (length + kSteps - 1) / kSteps; }
int64_t slices_of(int64_t width, int vector) { return (width + 32 * vector - 1) / (32 * vector); }
dim3 blocks_of(int64_t count, int each) { return dim3(unsigned((count + each - 1) / each)); }

// Passes of merge_runs that sort a list.
int merges_of(int64_t length) {
  int passes = 0;
  for (int64_t run = kRun; run < length; run *= 2) passes++;
  return passes;
}

// Where sort_steps has left the sorted keys.
const uint64_t* sorted(const int64_t* words, int64_t total, int64_t length) {
  const auto* keys = reinterpret_cast<const uint64_t*>(words);
  return merges_of(length) % 2 ? keys + total : keys;
}

// Whether rows can be read in packs of 16 bytes.
template <typename T>
bool rows_aligned(const T* g, int64_t g_batch, int64_t g_time) {
  return is_aligned(g) && g_batch % kVector<T> == 0 && g_time % kVector<T> == 0;
}

template <typename T, int V>
void launch_norms(const uint64_t* keys, const T* g, int64_t g_batch, int64_t g_time, int64_t batch,
                  int64_t time, int64_t width, double* partials, wide_t<T>* norms, Stream stream) {
  const int64_t chunks = chunks_of(time), slices = slices_of(width, V);
  const int64_t units = batch * chunks * slices, each = chunks * slices;
  if (units)
    FM_LAUNCH((segment_sq_norms<T, V>), blocks_of(units, kWarps), kBlock, 0, stream, keys,
              keys_for(time), g, g_batch, g_time, time, width, chunks, slices, units, partials);
  FM_LAUNCH((add_samples<wide_t<T>>), blocks_of(batch, kWarps), kBlock, 0, stream, partials, batch,
            each, norms);
}

template <typename T>
void sq_norms(const int64_t* words, const T* g, int64_t g_batch, int64_t g_time, int64_t batch,
              int64_t time, int64_t width, double* partials, wide_t<T>* norms, Stream stream) {
  if (!batch) return;
  const uint64_t* const keys = sorted(words, batch * time, time);
  auto* const launch =
      rows_aligned(g, g_batch, g_time) ? &launch_norms<T, kVector<T>> : &launch_norms<T, 1>;
  launch(keys, g, g_batch, g_time, batch, time, width, partials, norms, stream);
}

template <typename T, int V>
void launch_moment(const uint64_t* keys, const T* g, int64_t g_batch, int64_t g_time,
                   int64_t length, int64_t time, int64_t width, wide_t<T>* total, Stream stream) {
  const int64_t slices = slices_of(width, V), units = chunks_of(length) * slices;
  if (units)
    FM_LAUNCH((segment_second_moment<T, V>), blocks_of(units, kWarps), kBlock, 0, stream, keys,
              keys_for(length), g, g_batch, g_time, length, uint32_t(time), width, slices, units,
              total);
}

template <typename T>
void second_moment(const int64_t* words, const T* g, int64_t g_batch, int64_t g_time, int64_t batch,
                   int64_t time, int64_t width, wide_t<T>* total, Stream stream) {
  const uint64_t* const keys = sorted(words, batch * time, batch * time);
  auto* const launch =
      rows_aligned(g, g_batch, g_time) ? &launch_moment<T, kVector<T>> : &launch_moment<T, 1>;
  launch(keys, g, g_batch, g_time, batch * time, time, width, total, stream);
}

template <typename T, typename D, int V>
void launch_dots(const Ids& ids, const T* g, int64_t g_batch, int64_t g_time, int64_t batch,
                 int64_t width, const D* v, int64_t v_row, double* partials, wide_t<T>* dots,
                 Stream stream) {
  const int64_t chunks = dot_chunks_of(ids.time), slices = slices_of(width, V);
  const int64_t units = batch * chunks * slices, each = chunks * slices;
  if (units)
    FM_LAUNCH((step_dots<T, D, V>), blocks_of(units, kWarps), kBlock, 0, stream, ids, g, g_batch,
              g_time, width, v, v_row, chunks, slices, units, partials);
  FM_LAUNCH((add_samples<wide_t<T>>), blocks_of(batch, kWarps), kBlock, 0, stream, partials, batch,
            each, dots);
}

template <typename T, typename D>
void dots_with(const Ids& ids, const T* g, int64_t g_batch, int64_t g_time, int64_t batch,
               int64_t width, const D* v, int64_t v_row, double* partials, wide_t<T>* out,
               Stream stream) {
  const bool aligned = rows_aligned(g, g_batch, g_time) && v_row % kVector<T> == 0 &&
                       is_aligned(v, int(sizeof(Pack<D, kVector<T>>)));
  auto* const launch = aligned ? &launch_dots<T, D, kVector<T>> : &launch_dots<T, D, 1>;
  launch(ids, g, g_batch, g_time, batch, width, v, v_row, partials, out, stream);
}

template <typename T>
void dots(const Ids& ids, const T* g, int64_t g_batch, int64_t g_time, int64_t batch, int64_t width,
          const void* v, int64_t v_row, bool is_wide, double* partials, wide_t<T>* out,
          Stream stream) {
  if (!batch) return;
  if (is_wide)
    dots_with(ids, g, g_batch, g_time, batch, width, static_cast<const wide_t<T>*>(v), v_row,
              partials, out, stream);
  else
    dots_with(ids, g, g_batch, g_time, batch, width, static_cast<const T*>(v), v_row, partials, out,
              stream);
}

}  // namespace

int64_t sort_words(int64_t lists, int64_t length) {
  return lists * length * (length > kRun ? 2 : 1);
}

int64_t embedding_partials(int64_t batch, int64_t time, int64_t width) {
  return batch * chunks_of(time) * slices_of(width, 1);  // rows that are not aligned need the most
}

int64_t embedding_dot_partials(int64_t batch, int64_t time, int64_t width) {
  return batch * dot_chunks_of(time) * slices_of(width, 1);
}

void sort_steps(const int64_t* ids, int64_t ids_batch, int64_t ids_time, int64_t lists,
                int64_t length, int64_t time, int64_t padding_idx, int64_t* words, Stream stream) {
  if (!lists || !length) return;
  const int64_t total = lists * length, runs = (length + kRun - 1) / kRun;
  int size = 2;
  while (size < kRun && size < length) size *= 2;
  const int threads = size / 2 < 32 ? 32 : size / 2 < kSortBlock ? size / 2 : kSortBlock;
  auto* from = reinterpret_cast<uint64_t*>(words);
  auto* to = from + total;
  const Ids steps = {ids, ids_batch, ids_time, length, time, padding_idx};
  FM_LAUNCH(sort_runs, dim3(unsigned(lists * runs)), threads, size * sizeof(uint64_t), stream,
            steps, keys_for(length), runs, size, from);
  for (int64_t run = kRun; run < length; run *= 2) {
    FM_LAUNCH(merge_runs, blocks_of(total, kBlock), kBlock, 0, stream, from, total, length, run,
              to);
    auto* const done = to;
    to = from, from = done;
  }
}

#define FM_DEFINE(scalar_t, suffix, wide_t)                                                       \
  void embedding_sq_norms_##suffix(const int64_t* words, const scalar_t* g, int64_t g_batch,      \
                                   int64_t g_time, int64_t batch, int64_t time, int64_t width,    \
                                   double* partials, wide_t* norms, Stream stream) {              \
    sq_norms(words, g, g_batch, g_time, batch, time, width, partials, norms, stream);             \
  }                                                                                               \
  void embedding_second_moment_##suffix(const int64_t* words, const scalar_t* g, int64_t g_batch, \
                                        int64_t g_time, int64_t batch, int64_t time,              \
                                        int64_t width, wide_t* total, Stream stream) {            \
    second_moment(words, g, g_batch, g_time, batch, time, width, total, stream);                  \
  }                                                                                               \
  void embedding_dots_##suffix(const int64_t* ids, int64_t ids_batch, int64_t ids_time,           \
                               const scalar_t* g, int64_t g_batch, int64_t g_time, int64_t batch, \
                               int64_t time, int64_t width, int64_t padding_idx, const void* v,   \
                               int64_t v_row, int64_t is_wide, double* partials, wide_t* out,     \
                               Stream stream) {                                                   \
    const Ids steps = {ids, ids_batch, ids_time, time, time, padding_idx};                        \
    dots(steps, g, g_batch, g_time, batch, width, v, v_row, is_wide != 0, partials, out, stream); \
  }
FM_DEFINE(float, f32, float)
FM_DEFINE(double, f64, double)
FM_DEFINE(Half, f16, float)
FM_DEFINE(BFloat16, bf16, float)
#undef FM_DEFINE

}  // namespace cuda
}  // namespace fastminima
