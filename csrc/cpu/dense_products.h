// Products of packed rows, summed over the samples of a block: in tiles, or past the zeros.
#pragma once

#include "cpu/dense_chunks.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// What a block adds to sums, [columns of the left side, width of the right panel].
template <typename scalar_t>
struct Part {
  const Chunks<scalar_t>& left;
  int64_t first, last;  // of the chunks
  const scalar_t* right;
  int64_t block;
  bool is_finite;  // what the right panel holds
  scalar_t* sums;  // of the chunks from `first` on
};

// Adds to a sum; the first block finds none there.
template <typename scalar_t>
FM_INLINE void put(const Part<scalar_t>& m, scalar_t* sum, typename Simd<scalar_t>::vec x) {
  store(sum, m.block == 0 ? x : load(sum) + x);
}

// Skips what is zero on the left: a row of sums at a time, a vector of the right panel loaded for
// each multiply-add, which processors do at the same rate. Nothing is skipped where zero times the
// other factor is NaN.
template <typename scalar_t>
struct Skipping {
  // Accumulators. The panel takes 28 KiB with AVX-512.
  static constexpr int most = FM_BYTES == 64 ? 7 : 8;
  static constexpr int stride(int vecs) { return vecs * Simd<scalar_t>::width; }

  template <int vecs>
  FM_INLINE void run(const Part<scalar_t>& m) {
    using vec = typename Simd<scalar_t>::vec;
    constexpr int W = Simd<scalar_t>::width, C = Chunks<scalar_t>::chunk;
    int64_t samples = m.left.samples(m.block);
    uint64_t all = samples == 64 ? ~uint64_t{0} : (uint64_t{1} << samples) - 1;
    scalar_t* out = m.sums;
    for (int64_t c = m.first; c < m.last; c++) {
      const scalar_t* values = m.left.at(m.block, c);
      const uint64_t* masks = m.left.masks_at(m.block, c);
      for (int i = 0; i < C; i++, out += vecs * W) {
        vec s[vecs] = {};
        for (uint64_t mask = m.is_finite ? masks[i] : all; mask; mask &= mask - 1) {
          int64_t n = __builtin_ctzll(mask);
          const scalar_t* row = m.right + n * vecs * W;
          vec left = splat(values[n * C + i]);
#pragma GCC unroll 8
          for (int j = 0; j < vecs; j++) s[j] = left * load(row + j * W) + s[j];
        }
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) put(m, out + j * W, s[j]);
      }
    }
  }
};

// Multiplies everything, in tiles.
template <typename scalar_t>
struct Tiled {
  static constexpr int most = Tile<scalar_t>::vecs;
  static constexpr int stride(int) { return Tile<scalar_t>::cols; }

  template <int vecs>
  FM_INLINE void run(const Part<scalar_t>& m) {
    using T = Tile<scalar_t>;
    constexpr int C = Chunks<scalar_t>::chunk;
    int64_t samples = m.left.samples(m.block);
    scalar_t* out = m.sums;
    for (int64_t c = m.first; c < m.last; c++)
      for (int i = 0; i < C; i += T::rows, out += T::rows * T::cols) {
        typename Simd<scalar_t>::vec s[T::rows][vecs];
        multiply<scalar_t, vecs>(m.left.at(m.block, c) + i, C, m.right, samples, s);
#pragma GCC unroll 8
        for (int j = 0; j < T::rows; j++)
#pragma GCC unroll 8
          for (int k = 0; k < vecs; k++) put(m, out + j * T::cols + k * T::width, s[j][k]);
      }
  }
};

template <template <typename> class way, typename scalar_t, int vecs = way<scalar_t>::most>
void with_width(int64_t wanted, const Part<scalar_t>& m) {
  if (wanted == vecs) return way<scalar_t>::template run<vecs>(m);
  if constexpr (vecs > 1) with_width<way, scalar_t, vecs - 1>(wanted, m);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
