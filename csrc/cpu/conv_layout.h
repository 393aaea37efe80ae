// From the layouts of tensors to those of the kernels and back.
#pragma once

#include "columns.h"
#include "simd.h"

namespace fastminima {
namespace FM_ISA {
namespace {

FM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FM_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// dst[at[i] + c] = src[c][i] for src of `channels` planes of n elements.
template <typename scalar_t>
void scatter_transposed(const scalar_t* src, int64_t channels, int64_t n, const int64_t* at,
                        scalar_t* dst) {
  constexpr int W = Simd<scalar_t>::width;
  int64_t c = n >= W ? channels / W * W : 0;
  for (int64_t c0 = 0; c0 < c; c0 += W)
    for (int64_t i = 0; i < n; i += W) {
      i = least(i, n - W);  // the last block overlaps the one before
      typename Simd<scalar_t>::vec v[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) v[j] = load(src + (c0 + j) * n + i);
      transpose<scalar_t>(v);
#pragma GCC unroll 16
      for (int j = 0; j < W; j++) store<scalar_t>(dst + at[i + j] + c0, v[j]);
    }
  for (; c < channels; c++)
    for (int64_t i = 0; i < n; i++) dst[at[i] + c] = src[c * n + i];
}

// dst[at[i] + c] = src[i * stride + c] for c < channels.
template <typename scalar_t>
void scatter_pixels(const scalar_t* src, int64_t stride, int64_t channels, int64_t n,
                    const int64_t* at, scalar_t* dst) {
  constexpr int W = Simd<scalar_t>::width;
  for (int64_t i = 0; i < n; i++, src += stride) {
    scalar_t* to = dst + at[i];
    int64_t c = 0;
    for (; c + W <= channels; c += W) store(to + c, load(src + c));
    for (; c < channels; c++) to[c] = src[c];
  }
}

// out[c][tap] = in[tap][c], `out` being the memory of a whole row of the weight.
template <typename scalar_t>
void taps_last(const scalar_t* in, int64_t channels, int64_t taps, scalar_t* out) {
  constexpr int W = Simd<scalar_t>::width;
  int64_t c = 0;
  // Each channel is stored as a whole vector, the next one over what is too much of it.
  if (taps == 1) {
    memcpy(out, in, channels * sizeof(scalar_t));
    return;
  }
  if (taps <= W)
    for (; (c + W - 1) * taps + W <= channels * taps; c += W) {
      typename Simd<scalar_t>::vec v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        v[i] = i < taps ? load(in + i * channels + c) : typename Simd<scalar_t>::vec{};
      transpose<scalar_t>(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store<scalar_t>(out + (c + i) * taps, v[i]);
    }
  for (; c < channels; c++)
    for (int64_t tap = 0; tap < taps; tap++) out[c * taps + tap] = in[tap * channels + c];
}

// out[c] = the sum of the n elements of channel c, for channels [from, from + width) of a sample.
template <typename scalar_t>
void channel_sums(const scalar_t* x, int64_t channels, int64_t n, bool last, int64_t from,
                  int64_t width, scalar_t* out) {
  constexpr int W = Simd<scalar_t>::width;
  if (last) {
    Rows<scalar_t> rows{x, channels, nullptr, 0, nullptr, nullptr};
    sum_rows<scalar_t, Terms::sum>(rows, n, from, from + width, nullptr, out);
    return;
  }
  for (int64_t c = from; c < from + width; c++) {
    typename Simd<scalar_t>::vec s0{}, s1{};
    const scalar_t* plane = x + c * n;
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) s0 += load(plane + i), s1 += load(plane + i + W);
    scalar_t s = i > 0 ? sum<scalar_t>(s0 + s1) : scalar_t(0);
    for (; i < n; i++) s += plane[i];
    out[c] = s;
  }
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
