// Rows, or their squares, in the panels that sums over the samples multiply, and which of their
// elements are zero.
#pragma once

#include "cpu/dense_panels.h"
#include "parallel.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Samples of a block: bits of a mask, and rows of a right panel that stays in the first cache.
constexpr int64_t kBlock = 64;

// Elements of some columns, in chunks of Tile::square columns: [block, chunk, sample, column], and
// for each block and column a bit for each sample, zero where the element is.
template <typename scalar_t>
struct Chunks {
  static constexpr int chunk = Tile<scalar_t>::square;
  scalar_t* values;
  uint64_t* masks;
  int64_t batch, chunks;

  Chunks(int64_t batch, int64_t columns) : batch(batch), chunks((columns + chunk - 1) / chunk) {
    values = scratch<scalar_t>(batch * chunks * chunk);
    masks = scratch<uint64_t>(blocks() * chunks * chunk);
  }
  ~Chunks() {
    free(values);
    free(masks);
  }
  Chunks(const Chunks&) = delete;
  Chunks& operator=(const Chunks&) = delete;

  int64_t blocks() const { return (batch + kBlock - 1) / kBlock; }
  int64_t samples(int64_t block) const { return least(batch - block * kBlock, kBlock); }
  scalar_t* at(int64_t block, int64_t c) const {
    return values + (block * kBlock * chunks + samples(block) * c) * chunk;
  }
  uint64_t* masks_at(int64_t block, int64_t c) const {
    return masks + (block * chunks + c) * chunk;
  }
};

template <int power, typename scalar_t>
FM_INLINE typename Simd<scalar_t>::vec raised(typename Simd<scalar_t>::vec x) {
  return power == 2 ? x * x : x;
}

// One chunk of one block, `count` columns of it.
template <int power, typename scalar_t>
void pack_chunk(const scalar_t* x, int64_t stride, int64_t samples, int64_t count, scalar_t* out,
                uint64_t* masks) {
  using vec = typename Simd<scalar_t>::vec;
  using index = typename Simd<scalar_t>::index;
  constexpr int W = Simd<scalar_t>::width, C = Chunks<scalar_t>::chunk;
  constexpr int bits = 8 * sizeof(scalar_t), words = kBlock / bits;
  for (int j = 0; j < C; j += W) {
    int64_t left = count - j;
    index seen[words] = {};
    for (int word = 0; word < words; word++) {
      index bit{};
      bit = bit + 1;
      for (int64_t n = word * bits; n < least(samples, (word + 1) * bits); n++, bit = bit << 1) {
        const scalar_t* row = x + n * stride + j;
        vec y = left >= W ? load(row) : load_first(row, left > 0 ? left : 0);
        y = raised<power, scalar_t>(y);
        store(out + n * C + j, y);
        seen[word] |= (y != vec{}) & bit;
      }
    }
    for (int lane = 0; lane < W; lane++) {
      uint64_t mask = 0;
      for (int word = 0; word < words; word++) {
        uint64_t part = static_cast<uint64_t>(seen[word][lane]);
        mask |= (bits == 64 ? part : part & 0xffffffff) << (word * bits % 64);
      }
      masks[j + lane] = mask;
    }
  }
}

// The right panel out[n * panel_width + i] = x[n * stride + i]^power, zero from `count` to a whole
// vector. Returns whether all of it is finite.
template <int power, typename scalar_t>
bool pack_finite(const scalar_t* x, int64_t stride, int64_t samples, int64_t count,
                 int64_t panel_width, scalar_t* out) {
  using vec = typename Simd<scalar_t>::vec;
  constexpr int W = Simd<scalar_t>::width;
  int64_t whole = count / W * W, rest = count - whole;
  vec zeros{};  // of finite elements; NaN of others
  for (int64_t n = 0; n < samples; n++, x += stride, out += panel_width) {
    for (int64_t i = 0; i < whole; i += W) {
      vec y = load(x + i);
      y = raised<power, scalar_t>(y);
      store(out + i, y);
      zeros += y * vec{};
    }
    if (rest == 0) continue;
    vec y = load_first(x + whole, rest);
    y = raised<power, scalar_t>(y);
    store(out + whole, y);
    zeros += y * vec{};
  }
  return sum<scalar_t>(zeros) == 0;
}

// How many of n contiguous elements are not zero.
template <typename scalar_t>
int64_t count_nonzero(const scalar_t* x, int64_t n) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::index seen{};
  int64_t i = 0, found = 0;
  for (; i + W <= n; i += W) seen -= load(x + i) != typename Simd<scalar_t>::vec{};
  for (int lane = 0; lane < W; lane++) found += seen[lane];
  for (; i < n; i++) found += x[i] != 0;
  return found;
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
