// Squared norms of weight gradients from Gram matrices over positions.
//
// |dW|^2 = sum_{t, s} (rows_t . rows_s) (patch_t . patch_s), and the Gram matrix of the patches is
// the sum over the kernel taps of the Gram matrix of the image, shifted along its diagonal. Images
// are stored with zeros between lines, so that a shift is one offset and what leaves the image on
// one side meets zeros. Both matrices are symmetric: only their lower halves are computed.
#pragma once

#include "cpu/conv_direct.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// The Gram form adds numbers of both signs whose size is that of D = sum_t |rows_t|^2 |patch_t|^2:
// its error is about 3 eps D, the direct form's 3 eps sqrt(D |dW|^2). Below this share of D,
// where the Gram form has lost 5 bits more than the direct one need, a sample is done again.
constexpr double GRAM_KEEPS = 1.0 / 32;

struct GramPlan {
  ConvSizes sizes;
  bool unfolds;             // strided: patches are written out, and there is one tap
  int64_t rows, columns;    // of a group: vectors in the two Gram matrices
  int64_t wide[3];          // lines of positions and pixels alike are this far apart
  int64_t positions, pixels;  // flat extent of either
  int64_t row_stride, pixel_stride, row_gram, pixel_gram, margin;
};

template <typename scalar_t>
void make_gram_plan(GramPlan& p, const ConvSizes& s) {
  constexpr int W = Simd<scalar_t>::width;
  p.sizes = s;
  p.unfolds = s.stride[0] * s.stride[1] * s.stride[2] > 1;
  p.rows = s.rows / s.groups, p.columns = s.channels / s.groups;
  if (p.unfolds) p.columns *= s.kernel[0] * s.kernel[1] * s.kernel[2];
  const int64_t* image = p.unfolds ? s.out : s.image;
  int64_t reach = 0;
  p.positions = p.pixels = 0;
  for (int axis = 0; axis < 3; axis++) {
    int64_t pad = p.unfolds ? 0 : s.padding[axis];
    p.wide[axis] = most(image[axis] + pad, s.out[axis]);
    p.positions = p.positions * p.wide[axis] + s.out[axis] - 1;
    p.pixels = p.pixels * p.wide[axis] + image[axis] - 1;
    reach = reach * p.wide[axis] + pad;
  }
  p.positions++, p.pixels++;
  p.margin = ceil_div(reach, W) * W;
  p.row_stride = p.row_gram = (ceil_div(p.positions, W) + 1) * W;
  p.pixel_stride = (ceil_div(p.pixels, W) + 1) * W;
  p.pixel_gram = p.pixel_stride + p.margin;
}

// dst[c][z * wide + y * wide + x] = src[c][z][y][x]; the gaps keep their zeros.
template <typename scalar_t>
void spread(const scalar_t* src, int64_t channels, const int64_t* size, const int64_t* wide,
            int64_t stride, scalar_t* dst) {
  for (int64_t c = 0; c < channels; c++, dst += stride)
    for (int64_t z = 0; z < size[0]; z++)
      for (int64_t y = 0; y < size[1]; y++) {
        scalar_t* line = dst + (z * wide[1] + y) * wide[2];
        for (int64_t x = 0; x < size[2]; x++) line[x] = src[x];
        src += size[2];
      }
}

// dst[c * taps + k][t] = image[c] under tap k at position t, zero outside.
template <typename scalar_t>
void unfold(const ConvSizes& s, const scalar_t* src, int64_t channels, int64_t stride,
            scalar_t* dst) {
  int64_t k[3], lo[3], hi[3];
  for (int64_t c = 0; c < channels; c++, src += s.image[0] * s.image[1] * s.image[2])
    for (k[0] = 0; k[0] < s.kernel[0]; k[0]++)
      for (k[1] = 0; k[1] < s.kernel[1]; k[1]++)
        for (k[2] = 0; k[2] < s.kernel[2]; k[2]++, dst += stride) {
          int64_t shift[3];
          for (int axis = 0; axis < 3; axis++) {
            inside(s, axis, k[axis], &lo[axis], &hi[axis]);
            shift[axis] = k[axis] * s.dilation[axis] - s.padding[axis];
          }
          for (int64_t z = lo[0]; z < hi[0]; z++)
            for (int64_t y = lo[1]; y < hi[1]; y++) {
              int64_t plane = z * s.stride[0] + shift[0], line = y * s.stride[1] + shift[1];
              const scalar_t* from = src + (plane * s.image[1] + line) * s.image[2] + shift[2];
              scalar_t* to = dst + (z * s.out[1] + y) * s.out[2];
              for (int64_t x = lo[2]; x < hi[2]; x++) to[x] = from[x * s.stride[2]];
            }
        }
}

// gram[i][j] = sum_c x[c][i] x[c][j] for j <= i < n, and some j beyond.
template <typename scalar_t>
void lower_gram(const scalar_t* x, int64_t channels, int64_t stride, int64_t n, scalar_t* gram,
                int64_t gram_stride) {
  constexpr int W = Simd<scalar_t>::width, M = TILE_ROWS;
  Walk walk = {{1, 1, channels}, {0, 0, stride}, {0, 0, stride}};
  for (int64_t i = 0; i < n; i += M) {
    int64_t vectors = ceil_div(least(i + M, n), W), parts = ceil_div(vectors, TILE_VECTORS);
    for (int64_t part = 0; part < parts; part++) {
      int64_t v = vectors * part / parts, end = vectors * (part + 1) / parts;
#define FM_USE(NV)                                                                       \
  {                                                                                      \
    typename Simd<scalar_t>::vec acc[M][NV];                                             \
    const scalar_t* right[NV];                                                           \
    for (int j = 0; j < NV; j++) right[j] = x + (v + j) * W;                             \
    multiply<scalar_t, M, NV>(x + i, right, walk, acc);                                  \
    for (int r = 0; r < M; r++)                                                          \
      for (int j = 0; j < NV; j++)                                                       \
        store<scalar_t>(gram + (i + r) * gram_stride + (v + j) * W, acc[r][j]);          \
  }
      FM_FOR_PIECE(end - v, FM_USE)
#undef FM_USE
    }
  }
}

// Where row t of the image's Gram matrix is met by each tap that lies inside the image at t; their
// number is returned.
template <typename scalar_t>
int64_t shifted_rows(const GramPlan& p, const int64_t* t, int64_t flat, const scalar_t* gram,
                     const scalar_t** met) {
  if (p.unfolds) {
    met[0] = gram + flat * p.pixel_gram;
    return 1;
  }
  const ConvSizes& s = p.sizes;
  int64_t n = 0, k[3], at[3];
  for (k[0] = 0; k[0] < s.kernel[0]; k[0]++)
    for (k[1] = 0; k[1] < s.kernel[1]; k[1]++)
      for (k[2] = 0; k[2] < s.kernel[2]; k[2]++) {
        bool is_inside = true;
        for (int axis = 0; axis < 3; axis++) {
          at[axis] = t[axis] + k[axis] * s.dilation[axis] - s.padding[axis];
          is_inside = is_inside && at[axis] >= 0 && at[axis] < s.image[axis];
        }
        if (!is_inside) continue;
        int64_t pixel = (at[0] * p.wide[1] + at[1]) * p.wide[2] + at[2];
        met[n++] = gram + pixel * p.pixel_gram + pixel - flat;
      }
  return n;
}

struct GramSums {
  double diagonal, below;
};

// Sums of rows_gram * patch_gram on the diagonal and below it.
template <typename scalar_t>
GramSums gram_product(const GramPlan& p, const scalar_t* rows_gram, const scalar_t* pixels_gram,
                      const scalar_t** met) {
  constexpr int W = Simd<scalar_t>::width;
  GramSums sums = {0, 0};
  const int64_t* out = p.sizes.out;
  int64_t t[3];
  for (t[0] = 0; t[0] < out[0]; t[0]++)
    for (t[1] = 0; t[1] < out[1]; t[1]++)
      for (t[2] = 0; t[2] < out[2]; t[2]++) {
        int64_t flat = (t[0] * p.wide[1] + t[1]) * p.wide[2] + t[2];
        int64_t taps = shifted_rows(p, t, flat, pixels_gram, met);
        const scalar_t* row = rows_gram + flat * p.row_gram;
        typename Simd<scalar_t>::vec total{}, product{};
        int64_t at = 0;
        for (; at < flat; at += W) {
          total += product;
          typename Simd<scalar_t>::vec patch{};
          for (int64_t k = 0; k < taps; k++) patch += load(met[k] + at);
          product = load(row + at) * patch;
        }
        // The last vector reaches over the diagonal.
        total += first_lanes<scalar_t>(product, int(flat - (at - W)));
        sums.below += sum<scalar_t>(total);
        scalar_t patch = 0;
        for (int64_t k = 0; k < taps; k++) patch += met[k][flat];
        sums.diagonal += double(row[flat]) * patch;
      }
  return sums;
}

template <typename scalar_t>
struct GramScratch {
  scalar_t *rows, *pixels, *rows_gram, *pixels_gram;
  const scalar_t** met;
};

template <typename scalar_t>
GramScratch<scalar_t> make_scratch(const GramPlan& p) {
  constexpr int W = Simd<scalar_t>::width;
  auto zeros = [](int64_t n) {
    scalar_t* x = allocate<scalar_t>(n);
    memset(x, 0, sizeof(scalar_t) * n);
    return x;
  };
  const int64_t* k = p.sizes.kernel;
  return {zeros(p.rows * p.row_stride + W), zeros(p.columns * p.pixel_stride + W),
          zeros((p.positions + TILE_ROWS) * p.row_gram),
          zeros((p.pixels + TILE_ROWS) * p.pixel_gram + p.margin + W),
          allocate<const scalar_t*>(k[0] * k[1] * k[2])};
}

template <typename scalar_t>
GramSums sample_gram(const GramPlan& p, const scalar_t* rows, const scalar_t* image,
                     GramScratch<scalar_t>& scratch) {
  const ConvSizes& s = p.sizes;
  int64_t length = s.out[0] * s.out[1] * s.out[2], channels = s.channels / s.groups;
  int64_t pixels = s.image[0] * s.image[1] * s.image[2];
  GramSums total = {0, 0};
  for (int64_t group = 0; group < s.groups; group++) {
    const scalar_t* group_image = image + group * channels * pixels;
    spread(rows + group * p.rows * length, p.rows, s.out, p.wide, p.row_stride, scratch.rows);
    if (p.unfolds)
      unfold(s, group_image, channels, p.pixel_stride, scratch.pixels);
    else
      spread(group_image, channels, s.image, p.wide, p.pixel_stride, scratch.pixels);
    scalar_t* pixels_gram = scratch.pixels_gram + p.margin;
    lower_gram(scratch.rows, p.rows, p.row_stride, p.positions, scratch.rows_gram, p.row_gram);
    lower_gram(scratch.pixels, p.columns, p.pixel_stride, p.pixels, pixels_gram, p.pixel_gram);
    GramSums sums = gram_product(p, scratch.rows_gram, pixels_gram, scratch.met);
    total.diagonal += sums.diagonal, total.below += sums.below;
  }
  return total;
}

template <typename scalar_t>
void gram_sq_norms(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
                   scalar_t* weight, scalar_t* bias, int threads) {
  GramPlan p;
  make_gram_plan<scalar_t>(p, s);
  int64_t length = s.out[0] * s.out[1] * s.out[2], pixels = s.image[0] * s.image[1] * s.image[2];
  GramSums* sums = allocate<GramSums>(s.batch);
  int64_t* again = allocate<int64_t>(s.batch);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    GramScratch<scalar_t> scratch = make_scratch<scalar_t>(p);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < s.batch; n++) {
      if (bias) bias[n] = bias_of_sample(rows, image, s, n);
      sums[n] = sample_gram(p, rows + n * s.rows * length, image + n * s.channels * pixels, scratch);
    }
    free(scratch.rows);
    free(scratch.pixels);
    free(scratch.rows_gram);
    free(scratch.pixels_gram);
    free(scratch.met);
  }
  int64_t count = 0;
  for (int64_t n = 0; n < s.batch; n++) {
    double total = sums[n].diagonal + 2 * sums[n].below;
    weight[n] = scalar_t(total);
    if (total < GRAM_KEEPS * sums[n].diagonal) again[count++] = n;
  }
  if (count > 0)
    direct_sq_norms<scalar_t>(rows, image, s, again, count, weight, nullptr, threads);
  free(sums);
  free(again);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
