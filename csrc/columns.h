// Sums over the rows of a matrix, column by column, in one pass over memory.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace fastminima {
namespace FM_ISA {

// What is added up over the rows: g, g * x, or g and g * (x - mean) * rstd.
enum class Terms { sum, product, normalised };

template <typename scalar_t>
struct Rows {
  const scalar_t* g;
  int64_t g_stride;
  const scalar_t* x;
  int64_t x_stride;
  const scalar_t* mean;  // null: zero
  const scalar_t* rstd;
};

// Adds `count` rows from row t on to weight[i] and bias[i], i from `from` to `to`.
template <typename scalar_t, Terms terms, int count>
FM_INLINE void add_rows(const Rows<scalar_t>& r, int64_t t, int64_t from, int64_t to,
                        scalar_t* weight, scalar_t* bias) {
  constexpr int W = Simd<scalar_t>::width;
  constexpr bool has_weight = terms != Terms::sum, has_bias = terms != Terms::product;
  const scalar_t* g = r.g + t * r.g_stride;
  const scalar_t* x = has_weight ? r.x + t * r.x_stride : nullptr;
  scalar_t mean[count] = {}, rstd[count] = {};
  if (terms == Terms::normalised)
    for (int k = 0; k < count; k++) {
      mean[k] = r.mean ? r.mean[t + k] : 0;
      rstd[k] = r.rstd[t + k];
    }
  int64_t i = from;
  for (; i + W <= to; i += W) {
    typename Simd<scalar_t>::vec w{}, b{};
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) {
      auto gk = load(g + k * r.g_stride + i);
      if (has_bias) b += gk;
      if (!has_weight) continue;
      auto xk = load(x + k * r.x_stride + i);
      if (terms == Terms::normalised) xk = (xk - splat(mean[k])) * splat(rstd[k]);
      w = gk * xk + w;
    }
    if (has_weight) store(weight + i, load(weight + i) + w);
    if (has_bias) store(bias + i, load(bias + i) + b);
  }
  for (; i < to; i++)
    for (int k = 0; k < count; k++) {
      scalar_t gk = g[k * r.g_stride + i];
      if (has_bias) bias[i] += gk;
      if (!has_weight) continue;
      scalar_t xk = x[k * r.x_stride + i];
      if (terms == Terms::normalised) xk = (xk - mean[k]) * rstd[k];
      weight[i] += gk * xk;
    }
}

template <typename scalar_t, Terms terms>
void sum_rows(const Rows<scalar_t>& r, int64_t count, int64_t from, int64_t to, scalar_t* weight,
              scalar_t* bias) {
  if (terms != Terms::sum) memset(weight + from, 0, (to - from) * sizeof(scalar_t));
  if (terms != Terms::product) memset(bias + from, 0, (to - from) * sizeof(scalar_t));
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) add_rows<scalar_t, terms, 4>(r, t, from, to, weight, bias);
  for (; t < count; t++) add_rows<scalar_t, terms, 1>(r, t, from, to, weight, bias);
}

// For each of `batch` samples with rows sample(n): weight[n], bias[n] [width]. Cut into columns,
// so that sums stay in the first cache and few samples still occupy all threads.
template <typename scalar_t, Terms terms, typename sample_t>
void sum_rows_of_samples(sample_t sample, int64_t batch, int64_t time, int64_t width,
                         scalar_t* weight, scalar_t* bias, int threads) {
  threads = useful_threads(threads, batch * time * width * sizeof(scalar_t));
  int64_t columns = batch >= 4 * threads || threads == 1 ? 2048 : 128;
  int64_t pieces = (width + columns - 1) / columns;
  parallel_for(batch * pieces, threads, [=](int64_t i) {
    int64_t n = i / pieces, from = i % pieces * columns;
    int64_t to = from + columns < width ? from + columns : width;
    sum_rows<scalar_t, terms>(sample(n), time, from, to, weight + n * width, bias + n * width);
  });
}

}  // namespace FM_ISA
}  // namespace fastminima
