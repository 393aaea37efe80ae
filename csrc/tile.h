// A block of a matrix product that stays in registers, and the packed panels that it reads.
#pragma once

#include "simd.h"

namespace fastminima {
namespace FM_ISA {

// rows x cols accumulators, cols = vecs vectors, fill the registers of the instruction set.
template <typename scalar_t>
struct Tile {
  static constexpr int width = Simd<scalar_t>::width;
#if defined(__AVX512F__)
  static constexpr int rows = 8, vecs = 3;
#elif defined(__aarch64__)
  static constexpr int rows = 4, vecs = 6;
#else
  static constexpr int rows = width < 4 ? width : 4, vecs = 3;
#endif
  static constexpr int cols = vecs * width;
  // Squares of this size cover the diagonal of a symmetric product.
  static constexpr int square = rows > width ? rows : width;
  static_assert(cols % square == 0 && square % width == 0 && square % rows == 0, "");
};

// c[i][j] = sum_k left[k * left_stride + i] * right[k * cols + j], for the first `vecs` vectors j.
template <typename scalar_t, int vecs>
FM_INLINE void multiply(const scalar_t* left, int64_t left_stride, const scalar_t* right,
                        int64_t depth,
                        typename Simd<scalar_t>::vec (&c)[Tile<scalar_t>::rows][vecs]) {
  using T = Tile<scalar_t>;
  typename Simd<scalar_t>::vec sums[T::rows][vecs] = {};
  for (int64_t k = 0; k < depth; k++) {
    typename Simd<scalar_t>::vec x[vecs];
#pragma GCC unroll 8
    for (int j = 0; j < vecs; j++) x[j] = load(right + j * T::width);
#pragma GCC unroll 8
    for (int i = 0; i < T::rows; i++) {
      auto b = splat(left[i]);
#pragma GCC unroll 8
      for (int j = 0; j < vecs; j++) sums[i][j] = b * x[j] + sums[i][j];
    }
    left += left_stride;
    right += T::cols;
  }
#pragma GCC unroll 8
  for (int i = 0; i < T::rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < vecs; j++) c[i][j] = sums[i][j];
}

// Calls body(constant) for the constant equal to `vecs`, 1 to Tile::vecs.
template <typename scalar_t, typename body_t>
FM_INLINE void with_vecs(int64_t vecs, body_t& body) {
  switch (vecs) {
    case 1:
      return body.template run<1>();
    case 2:
      return body.template run<2>();
    case 3:
      return body.template run<3>();
#if defined(__aarch64__)
    case 4:
      return body.template run<4>();
    case 5:
      return body.template run<5>();
    case 6:
      return body.template run<6>();
#endif
  }
}

// out[k * out_stride + i] = x[k * stride + i] for i < count, zero up to `padded`.
template <typename scalar_t>
FM_INLINE void pack(const scalar_t* x, int64_t stride, int64_t depth, int64_t count, int64_t padded,
                    scalar_t* out) {
  constexpr int W = Simd<scalar_t>::width;
  for (int64_t k = 0; k < depth; k++, x += stride, out += padded) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, load(x + i));
    for (; i < count; i++) out[i] = x[i];
    for (; i < padded; i++) out[i] = 0;
  }
}

// out[k * stride + i] = x[i * x_stride + k] for a full square of width x width.
template <typename scalar_t>
FM_INLINE void transpose_square(const scalar_t* x, int64_t x_stride, scalar_t* out,
                                int64_t stride) {
  constexpr int W = Simd<scalar_t>::width;
  typename Simd<scalar_t>::vec v[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    __builtin_prefetch(x + i * x_stride + 4 * W);
    v[i] = load(x + i * x_stride);
  }
  transpose<scalar_t>(v);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store(out + i * stride, v[i]);
}

// Panels of the transpose of x [time, width], contiguous rows: the panel of time steps t0 to
// t0 + cols, each [width, cols], starts at out + t0 * width. Zeros from `time` to the next
// multiple of the tile's square.
template <typename scalar_t>
static void pack_transposed(const scalar_t* x, int64_t stride, int64_t time, int64_t width,
                            scalar_t* out) {
  using T = Tile<scalar_t>;
  constexpr int W = T::width;
  for (int64_t t = 0; t < time; t += T::square) {
    scalar_t* panel = out + t / T::cols * T::cols * width + t % T::cols;
    int64_t rows = time - t < T::square ? time - t : T::square, k = 0;
    if (rows == T::square)
      for (; k + W <= width; k += W)
        for (int64_t i = 0; i < T::square; i += W)
          transpose_square(x + (t + i) * stride + k, stride, panel + k * T::cols + i, T::cols);
    for (; k < width; k++)
      for (int64_t i = 0; i < T::square; i++)
        panel[k * T::cols + i] = i < rows ? x[(t + i) * stride + k] : 0;
  }
}

}  // namespace FM_ISA
}  // namespace fastminima
