// Sums of the rows of a gradient by token id, without anything of the size of the table.
//
// The steps of a list are sorted by (id, step): runs of kRun in shared memory, then merges of runs
// in global memory, so that a list can have any length. A warp then takes kChunk sorted steps by
// one slice of the width and adds up the ids that begin there, in the order of the steps.
#pragma once

#include "tile.cuh"

namespace fastminima {
namespace cuda {

constexpr int kRun = 4096;       // steps sorted in shared memory: 32 KiB
constexpr int kSortBlock = 512;  // threads that sort a run, at most
constexpr int kChunk = 32;       // sorted steps of a warp: a lane looks at one
constexpr int kAhead = 8;        // rows that a lane loads before it uses the first
constexpr int kSteps = 4;        // steps of a warp where ids are not sorted: rows of two tables

// A key is id << bits | step; the rows of `padding_idx` get the largest id there is.
struct Keys {
  int bits;
  FM_DEVICE uint64_t none() const { return ~uint64_t(0) >> bits; }
  FM_DEVICE uint64_t id(uint64_t key) const { return key >> bits; }
  FM_DEVICE int64_t step(uint64_t key) const { return int64_t(key & ((uint64_t(1) << bits) - 1)); }
  FM_DEVICE uint64_t make(uint64_t id, int64_t step) const { return id << bits | uint64_t(step); }
};

// Ids of lists of `length` steps; step s is at time s % time of sample s / time of its list.
struct Ids {
  const int64_t* ids;
  int64_t batch_stride, time_stride, length, time, padding_idx;

  FM_DEVICE uint64_t key(int64_t list, int64_t step, Keys keys) const {
    const int64_t global = list * length + step;
    const int64_t id = ids[global / time * batch_stride + global % time * time_stride];
    return keys.make(id == padding_idx ? keys.none() : uint64_t(id), step);
  }
};

// words[list, run of kRun] <- the sorted keys of that run, by a bitonic network of `size` keys.
static __global__ void __launch_bounds__(kSortBlock)
    sort_runs(Ids ids, Keys keys, int64_t runs, int size, uint64_t* words) {
  FM_DYNAMIC_SHARED(uint64_t, shared);
  const int64_t list = blockIdx.x / runs, first = blockIdx.x % runs * kRun;
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x))
    shared[i] = first + i < ids.length ? ids.key(list, first + i, keys) : ~uint64_t(0);
  for (int span = 2; span <= size; span *= 2)
    for (int apart = span / 2; apart; apart /= 2) {
      __syncthreads();
      for (int pair = int(threadIdx.x); pair < size / 2; pair += int(blockDim.x)) {
        const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
        const uint64_t a = shared[low], b = shared[high];
        if ((a > b) == ((low & span) == 0)) shared[low] = b, shared[high] = a;
      }
    }
  __syncthreads();
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x))
    if (first + i < ids.length) words[list * ids.length + first + i] = shared[i];
}

// Merges neighbouring sorted runs of `run` keys: each key moves by the number of smaller ones in
// the other run. No two keys are equal.
static __global__ void __launch_bounds__(kBlock)
    merge_runs(const uint64_t* from, int64_t total, int64_t length, int64_t run, uint64_t* to) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= total) return;
  const int64_t list = i / length, place = i % length;
  const uint64_t* const keys = from + list * length;
  const uint64_t key = keys[place];
  const int64_t mine = place / run, pair = mine / 2 * 2 * run;
  const int64_t other = (mine ^ 1) * run < length ? (mine ^ 1) * run : length;
  int64_t low = other, high = other + run < length ? other + run : length;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  to[list * length + pair + (place - mine * run) + (low - other)] = key;
}

// A slice of the width: V elements for each lane.
template <typename T, int V>
struct Slice {
  int64_t begin, width;
  FM_DEVICE Slice(int64_t slice, int64_t w)
      : begin(slice * 32 * V + int64_t(threadIdx.x & 31) * V), width(w) {}

  FM_DEVICE Pack<T, V> load(const T* row) const {
    Pack<T, V> pack;
    if (begin + V <= width) {
      pack = *reinterpret_cast<const Pack<T, V>*>(row + begin);
    } else {
#pragma unroll
      for (int j = 0; j < V; j++) pack.v[j] = begin + j < width ? row[begin + j] : T{};
    }
    return pack;
  }
};

// The sorted steps of a list, and the first id that begins in this warp's chunk of them.
struct Segments {
  const uint64_t* words;
  int64_t length, end;  // of the list, of the chunk
  int64_t first;        // -1: no id begins here
  Keys keys;

  FM_DEVICE Segments(const uint64_t* w, int64_t count, int64_t chunk, Keys k)
      : words(w), length(count), end((chunk + 1) * kChunk), keys(k) {
    const int64_t mine = chunk * kChunk + (threadIdx.x & 31);
    bool is_head = false;
    if (mine < length) {
      const uint64_t id = keys.id(words[mine]);
      is_head = id != keys.none() && (mine == 0 || keys.id(words[mine - 1]) != id);
    }
    const unsigned heads = __ballot_sync(kFullWarp, is_head);
    first = heads ? chunk * kChunk + __ffs(int(heads)) - 1 : -1;
  }

  // Calls load(k, step) for up to kAhead steps at once, then use(k, id, step) for each, until an id
  // begins past the chunk.
  template <typename L, typename U>
  FM_DEVICE void each(L load, U use) const {
    uint64_t before = keys.id(words[first]);
    bool goes_on = true;
    for (int64_t at = first; goes_on; at += kAhead) {
      uint64_t key[kAhead];
      bool is_mine[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; k++) key[k] = at + k < length ? words[at + k] : ~uint64_t(0);
#pragma unroll
      for (int k = 0; k < kAhead; k++) {
        const uint64_t id = keys.id(key[k]);
        goes_on = goes_on && at + k < length && id != keys.none() && (id == before || at + k < end);
        is_mine[k] = goes_on;
        before = id;
        if (is_mine[k]) load(k, keys.step(key[k]));
      }
#pragma unroll
      for (int k = 0; k < kAhead; k++)
        if (is_mine[k]) use(k, keys.id(key[k]), keys.step(key[k]));
    }
  }
};

// partials[n, chunk, slice] = |row|^2 of the rows of sample n that begin in the chunk.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    segment_sq_norms(const uint64_t* words, Keys keys, const T* g, int64_t g_batch, int64_t g_time,
                     int64_t time, int64_t width, int64_t chunks, int64_t slices, int64_t units,
                     double* partials) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (unit >= units) return;
  const int64_t n = unit / slices / chunks;
  const Segments segments(words + n * time, time, unit / slices % chunks, keys);
  const Slice<T, V> slice(unit % slices, width);
  const T* const rows = g + n * g_batch;
  Pack<T, V> row[kAhead];
  wide_t<T> sum[V] = {};
  double total = 0;
  if (segments.first >= 0) {
    uint64_t current = keys.none();
    const auto close = [&] {
      wide_t<T> square = 0;
#pragma unroll
      for (int j = 0; j < V; j++) square += sum[j] * sum[j], sum[j] = 0;
      total += square;
    };
    segments.each([&](int k, int64_t step) { row[k] = slice.load(rows + step * g_time); },
                  [&](int k, uint64_t id, int64_t) {
                    if (id != current) close();
                    current = id;
#pragma unroll
                    for (int j = 0; j < V; j++) sum[j] += widen(row[k].v[j]);
                  });
    close();
  }
  total = warp_sum(total);
  if ((threadIdx.x & 31) == 0) partials[unit] = total;
}

// total[id] = sum over the samples of the square of their row `id`, for the ids that occur. The
// steps of the whole batch are one list, so an id belongs to one warp a slice: plain stores.
template <typename T, int V>
__global__ void __launch_bounds__(kBlock)
    segment_second_moment(const uint64_t* words, Keys keys, const T* g, int64_t g_batch,
                          int64_t g_time, int64_t length, uint32_t time, int64_t width,
                          int64_t slices, int64_t units, wide_t<T>* total) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (unit >= units) return;
  const Segments segments(words, length, unit / slices, keys);
  const Slice<T, V> slice(unit % slices, width);
  if (segments.first < 0) return;
  Pack<T, V> row[kAhead];
  wide_t<T> sum[V] = {}, moment[V] = {};
  uint64_t current = keys.none();
  uint32_t sample = 0;
  const auto close = [&] {
#pragma unroll
    for (int j = 0; j < V; j++) moment[j] += sum[j] * sum[j], sum[j] = 0;
  };
  const auto write = [&] {
#pragma unroll
    for (int j = 0; j < V; j++) {
      if (slice.begin + j < width) total[int64_t(current) * width + slice.begin + j] = moment[j];
      moment[j] = 0;
    }
  };
  segments.each(
      [&](int k, int64_t step) {
        const uint32_t n = uint32_t(step) / time;
        row[k] = slice.load(g + n * g_batch + (step - int64_t(n) * time) * g_time);
      },
      [&](int k, uint64_t id, int64_t step) {
        const uint32_t n = uint32_t(step) / time;
        if (id != current || n != sample) close();
        if (id != current && current != keys.none()) write();
        current = id, sample = n;
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += widen(row[k].v[j]);
      });
  close();
  write();
}

// partials[n, chunk, slice] = sum over the steps of the chunk of <v[ids[n, t]], g[n, t]>.
//
// A chunk is kSteps steps: their ids are one wait for memory, their rows one more. The direction
// is read in its own precision: a table of it in another one would be far larger than `g`.
template <typename T, typename D, int V>
__global__ void __launch_bounds__(kBlock)
    step_dots(Ids ids, const T* g, int64_t g_batch, int64_t g_time, int64_t width, const D* v,
              int64_t v_row, int64_t chunks, int64_t slices, int64_t units, double* partials) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (unit >= units) return;
  const int64_t n = unit / slices / chunks, begin = unit / slices % chunks * kSteps;
  const Slice<T, V> slice(unit % slices, width);
  const Slice<D, V> direction(unit % slices, width);
  int64_t id[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; k++)
    id[k] = begin + k < ids.time ? ids.ids[n * ids.batch_stride + (begin + k) * ids.time_stride]
                                 : ids.padding_idx;
  Pack<T, V> a[kSteps];
  Pack<D, V> b[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; k++)
    if (id[k] != ids.padding_idx) {
      a[k] = slice.load(g + n * g_batch + (begin + k) * g_time);
      b[k] = direction.load(v + id[k] * v_row);
    }
  double total = 0;
#pragma unroll
  for (int k = 0; k < kSteps; k++)
    if (id[k] != ids.padding_idx) {
      wide_t<T> dot = 0;
#pragma unroll
      for (int j = 0; j < V; j++) dot += widen(a[k].v[j]) * widen(b[k].v[j]);
      total += dot;
    }
  total = warp_sum(total);
  if ((threadIdx.x & 31) == 0) partials[unit] = total;
}

// out[n] = sum of the `count` partials of sample n, one warp a sample.
template <typename R>
__global__ void __launch_bounds__(kBlock)
    add_samples(const double* partials, int64_t batch, int64_t count, R* out) {
  const int64_t n = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (n >= batch) return;
  double sum = 0;
  for (int64_t i = threadIdx.x & 31; i < count; i += 32) sum += partials[n * count + i];
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) out[n] = R(sum);
}

}  // namespace cuda
}  // namespace fastminima
