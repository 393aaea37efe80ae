// Gram sums of sequences so short that nothing has to be transposed.
#pragma once

#include "cpu/dense.h"
#include "tile.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// Sequences whose dot products all fit in registers.
constexpr int kDots = 8;

// Dot products of the first `count` rows of x with each other: out[t * count + s], s <= t.
template <typename scalar_t, int count>
void dots(const scalar_t* x, int64_t stride, int64_t width, scalar_t* out) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec sums[count][count] = {};
  for (int64_t i = 0; i < width; i += W) {
    typename Simd<scalar_t>::vec v[count];
#pragma GCC unroll 8
    for (int t = 0; t < count; t++)
      v[t] = width - i >= W ? load(x + t * stride + i) : load_first(x + t * stride + i, width - i);
#pragma GCC unroll 8
    for (int t = 0; t < count; t++)
#pragma GCC unroll 8
      for (int s = 0; s <= t; s++) sums[t][s] = v[t] * v[s] + sums[t][s];
  }
  for (int t = 0; t < count; t++)
    for (int s = 0; s <= t; s++) out[t * count + s] = sum<scalar_t>(sums[t][s]);
}

// The Gram sum of one sample of exactly `count` time steps, and its diagonal in `parts`.
template <typename scalar_t, int count>
double gram_sum_of(const Sequences<scalar_t>& x, int64_t n, double& parts) {
  if constexpr (count > 1) {
    if (x.time < count) return gram_sum_of<scalar_t, count - 1>(x, n, parts);
  }
  scalar_t a[count * count], g[count * count];
  dots<scalar_t, count>(x.a + n * x.a_batch, x.a_time, x.d_in, a);
  dots<scalar_t, count>(x.g + n * x.g_batch, x.g_time, x.d_out, g);
  double total = 0;
  for (int t = 0; t < count; t++) {
    double own = static_cast<double>(a[t * count + t]) * g[t * count + t];
    parts += own;
    total += own;
    for (int s = 0; s < t; s++)
      total += 2.0 * static_cast<double>(a[t * count + s]) * g[t * count + s];
  }
  return total;
}

#if defined(__AVX512F__)

// Longest sequence that is read as it is, in blocks of some time steps with some.
constexpr int kShort = 16, kBlock = 4;

// The sums of `count` vectors, as many as they have lanes.
template <typename scalar_t, int count>
FM_INLINE typename Simd<scalar_t>::vec sums_of(const typename Simd<scalar_t>::vec* v) {
  typename Simd<scalar_t>::vec halves[count / 2], low, high;
#pragma GCC unroll 8
  for (int i = 0; i < count / 2; i++) {
    interleave<scalar_t>(v[i], v[i + count / 2], low, high);
    halves[i] = low + high;
  }
  if constexpr (count == 2)
    return halves[0];
  else
    return sums_of<scalar_t, count / 2>(halves);
}

// The kBlock x kBlock dot products of rows x and y: row by row.
template <typename scalar_t>
FM_INLINE void block_of_dots(const scalar_t* const* x, const scalar_t* const* y, int64_t width,
                             typename Simd<scalar_t>::vec* out) {
  constexpr int W = Simd<scalar_t>::width, B = kBlock;
  typename Simd<scalar_t>::vec acc[B * B] = {};
  for (int64_t d = 0; d < width; d += W) {
    typename Simd<scalar_t>::vec left[B], right[B];
    bool is_whole = d + W <= width;
#pragma GCC unroll 4
    for (int i = 0; i < B; i++) {
      left[i] = is_whole ? load(x[i] + d) : load_first(x[i] + d, width - d);
      right[i] = is_whole ? load(y[i] + d) : load_first(y[i] + d, width - d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < B; i++)
#pragma GCC unroll 4
      for (int j = 0; j < B; j++) acc[i * B + j] = left[i] * right[j] + acc[i * B + j];
  }
#pragma GCC unroll 2
  for (int k = 0; k < B * B / W; k++) out[k] = sums_of<scalar_t, W>(acc + k * W);
}

// The row and the column of each entry of a block.
template <typename scalar_t>
struct Entries {
  alignas(64) scalar_t rows[kBlock * kBlock], columns[kBlock * kBlock];

  constexpr Entries() : rows(), columns() {
    for (int i = 0; i < kBlock * kBlock; i++) {
      rows[i] = scalar_t(i / kBlock);
      columns[i] = scalar_t(i % kBlock);
    }
  }
};

// sum (a_t . a_s)(g_t . g_s) of one sample of at most kShort time steps, and its diagonal.
template <typename scalar_t>
double blocked_gram_sum(const Sequences<scalar_t>& x, int64_t n, double& parts) {
  constexpr int W = Simd<scalar_t>::width, B = kBlock, V = B * B / W;
  static constexpr Entries<scalar_t> entries;
  const scalar_t *a[kShort], *g[kShort];
  for (int64_t t = 0; t < kShort; t++) {
    int64_t row = t < x.time ? t : x.time - 1;
    a[t] = x.a + n * x.a_batch + row * x.a_time;
    g[t] = x.g + n * x.g_batch + row * x.g_time;
  }
  double total = 0;
  for (int64_t t0 = 0; t0 < x.time; t0 += B) {
    typename Simd<scalar_t>::vec left_of_it{}, diagonal{}, zero{};
    for (int64_t s0 = 0; s0 <= t0; s0 += B) {
      typename Simd<scalar_t>::vec of_a[V], of_g[V];
      block_of_dots(a + t0, a + s0, x.d_in, of_a);
      block_of_dots(g + t0, g + s0, x.d_out, of_g);
      if (s0 + B <= t0 && t0 + B <= x.time) {
        for (int k = 0; k < V; k++) left_of_it += of_a[k] * of_g[k];
        continue;
      }
      for (int k = 0; k < V; k++) {  // those of earlier steps twice
        auto products = of_a[k] * of_g[k];
        auto t = load(entries.rows + k * W) + splat(scalar_t(t0));
        auto s = load(entries.columns + k * W) + splat(scalar_t(s0));
        auto is_there = t < splat(scalar_t(x.time));
        auto earlier = is_there & (s < t) ? products : zero;
        auto own = is_there & (s == t) ? products : zero;
        left_of_it += earlier;
        diagonal += own;
      }
    }
    double own = sum<scalar_t>(diagonal);
    parts += own;
    total += 2.0 * sum<scalar_t>(left_of_it) + own;
  }
  return total;
}

template <typename scalar_t>
double short_gram_sum(const Sequences<scalar_t>& x, int64_t n, double& parts) {
  if (x.time <= kDots) return gram_sum_of<scalar_t, kDots>(x, n, parts);
  return blocked_gram_sum(x, n, parts);
}

#else  // fewer registers than a block needs

constexpr int kShort = kDots;

template <typename scalar_t>
double short_gram_sum(const Sequences<scalar_t>& x, int64_t n, double& parts) {
  return gram_sum_of<scalar_t, kDots>(x, n, parts);
}

#endif

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
