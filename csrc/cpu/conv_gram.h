// Squared norms of weight gradients from Gram matrices over positions.
//
// |dW|^2 = sum_{t, s} (rows_t . rows_s) (patch_t . patch_s), and the Gram matrix of the patches is
// the sum over the kernel taps of the Gram matrix of the image, shifted along its diagonal. Images
// are stored with zeros between lines, so that a shift is one offset and what leaves the image on
// one side meets zeros. Both matrices are symmetric: only their lower halves are computed.
#pragma once

#include "cpu/conv_direct.h"
#include "cpu/gram_matrix.h"

namespace fastminima {
namespace FM_ISA {
namespace {

// The Gram form adds numbers of both signs whose size is that of D = sum_t |rows_t|^2 |patch_t|^2.
// Its error, measured while |dW|^2 / D went from 1/2 to 1e-5 on layers of 16 to 512 channels, is
// 0.2 to 5 eps D, the direct form's below 0.5 eps sqrt(D |dW|^2). A sample whose |dW|^2 is less
// than this share of D is done again, directly: relative errors stay below 160 eps.
constexpr double GRAM_KEEPS = 1.0 / 32;

// Positions (of the rows) and pixels (of the image) each have their Gram matrix; both number their
// elements alike, lines and planes `wide` apart with gaps of zeros.
struct GramPlan {
  ConvSizes sizes;
  bool unfolds;           // strided: patches are written out, and there is one tap
  int64_t rows, columns;  // of a group: channels of the two matrices
  int64_t wide[3];
  int64_t length, pixels;  // elements of either, without gaps
  int64_t row_stride, pixel_stride, margin;
  int64_t rows_gram, pixels_gram;  // sizes in memory
};

// Number of element i of a grid.
FM_INLINE int64_t flat_index(const int64_t* i, const int64_t* wide) {
  return (i[0] * wide[1] + i[1]) * wide[2] + i[2];
}

template <typename scalar_t>
void make_gram_plan(GramPlan& p, const ConvSizes& s) {
  constexpr int W = Simd<scalar_t>::width;
  p.sizes = s;
  p.unfolds = s.stride[0] * s.stride[1] * s.stride[2] > 1;
  p.rows = s.rows / s.groups, p.columns = s.channels / s.groups;
  if (p.unfolds) p.columns *= s.kernel[0] * s.kernel[1] * s.kernel[2];
  const int64_t* image = p.unfolds ? s.out : s.image;
  int64_t pad[3], last_row[3], last_pixel[3];
  p.length = p.pixels = 1;
  for (int axis = 0; axis < 3; axis++) {
    pad[axis] = p.unfolds ? 0 : s.padding[axis];
    p.wide[axis] = most(image[axis] + pad[axis], s.out[axis]);
    p.length *= s.out[axis], p.pixels *= image[axis];
    last_row[axis] = s.out[axis] - 1, last_pixel[axis] = image[axis] - 1;
  }
  // A shift can reach this far before the first element.
  p.margin = ceil_div(flat_index(pad, p.wide), W) * W;
  int64_t positions = flat_index(last_row, p.wide) + 1;
  int64_t pixels = flat_index(last_pixel, p.wide) + 1;
  p.row_stride = (ceil_div(positions, W) + 1) * W;
  p.pixel_stride = (ceil_div(pixels, W) + 1) * W + p.margin;
  p.rows_gram = positions * p.row_stride + 4 * W;
  p.pixels_gram = pixels * p.pixel_stride + p.margin + 4 * W;
}

// Copies the lower half of a Gram matrix of a grid of elements to where their gaps are left.
template <typename scalar_t>
void spread_gram(const scalar_t* dense, const int64_t* size, const int64_t* wide, int64_t stride,
                 scalar_t* gram) {
  int64_t lines = size[0] * size[1], from = dense_stride<scalar_t>(lines * size[2]);
  for (int64_t line = 0; line < lines; line++)
    for (int64_t x = 0; x < size[2]; x++, dense += from) {
      int64_t to[3] = {line / size[1], line % size[1], x};
      scalar_t* row = gram + flat_index(to, wide) * stride;
      const scalar_t* src = dense;
      for (int64_t z = 0; z <= to[0]; z++)
        for (int64_t y = 0; y < (z < to[0] ? size[1] : to[1] + 1); y++, src += size[2]) {
          scalar_t* dst = row + (z * wide[1] + y) * wide[2];
          for (int64_t i = 0; i < size[2]; i++) dst[i] = src[i];
        }
    }
}

// Where row t of the image's Gram matrix is met by each tap that lies inside the image at t; their
// number is returned.
template <typename scalar_t>
int64_t shifted_rows(const GramPlan& p, const int64_t* t, int64_t flat, const scalar_t* gram,
                     const scalar_t** met) {
  if (p.unfolds) {
    met[0] = gram + flat * p.pixel_stride;
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
        int64_t pixel = flat_index(at, p.wide);
        met[n++] = gram + pixel * p.pixel_stride + pixel - flat;
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
        int64_t flat = flat_index(t, p.wide);
        int64_t taps = shifted_rows(p, t, flat, pixels_gram, met);
        const scalar_t* row = rows_gram + flat * p.row_stride;
        typename Simd<scalar_t>::vec total{};
        for (int64_t at = 0; at < flat; at += 4 * W) {
          alignas(64) typename Simd<scalar_t>::vec patch[4]{};
          for (int64_t k = 0; k < taps; k++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) patch[j] += load(met[k] + at + j * W);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            // What lies beyond the diagonal may be of another sample.
            int64_t below = flat - (at + j * W);
            patch[j] *= load(row + at + j * W);
            total += below >= W ? patch[j] : first_lanes<scalar_t>(patch[j], int(most(below, 0)));
          }
        }
        sums.below += sum<scalar_t>(total);
        scalar_t patch = 0;
        for (int64_t k = 0; k < taps; k++) patch += met[k][flat];
        sums.diagonal += double(row[flat]) * patch;
      }
  return sums;
}

template <typename scalar_t>
struct GramScratch {
  scalar_t *operand, *line, *dense, *rows_gram, *pixels_gram;
  const scalar_t** met;
};

template <typename scalar_t>
GramScratch<scalar_t> make_scratch(const GramPlan& p) {
  auto zeros = [](int64_t n) {
    scalar_t* x = allocate<scalar_t>(n);
    memset(x, 0, sizeof(scalar_t) * n);
    return x;
  };
  const int64_t* k = p.sizes.kernel;
  int64_t n = ceil_div(most(p.length, p.pixels), row_block<scalar_t>()) * row_block<scalar_t>();
  // Each operand has its own place: the zeros after its last element must stay.
  int64_t operand = operand_size<scalar_t>(p.rows, p.length);
  return {zeros(operand + operand_size<scalar_t>(p.columns, p.pixels)),
          zeros(p.length),
          zeros(n * dense_stride<scalar_t>(n)),
          zeros(p.rows_gram),
          zeros(p.pixels_gram),
          allocate<const scalar_t*>(k[0] * k[1] * k[2])};
}

template <typename scalar_t>
void free_scratch(GramScratch<scalar_t>& scratch) {
  free(scratch.operand);
  free(scratch.line);
  free(scratch.dense);
  free(scratch.rows_gram);
  free(scratch.pixels_gram);
  free(scratch.met);
}

template <typename scalar_t>
GramSums sample_gram(const GramPlan& p, const scalar_t* rows, const scalar_t* image,
                     GramScratch<scalar_t>& to, Ahead* ahead) {
  const ConvSizes& s = p.sizes;
  int64_t channels = s.channels / s.groups, pixels = s.image[0] * s.image[1] * s.image[2];
  scalar_t* second = to.operand + operand_size<scalar_t>(p.rows, p.length);
  scalar_t* pixels_gram = to.pixels_gram + p.margin;
  GramSums total = {0, 0};
  for (int64_t group = 0; group < s.groups; group++, image += channels * pixels) {
    lower_gram(pack_planes(rows + group * p.rows * p.length, p.rows, p.length, to.operand),
               to.dense, ahead);
    spread_gram(to.dense, s.out, p.wide, p.row_stride, to.rows_gram);
    lower_gram(p.unfolds ? pack_patches(s, image, channels, p.length, to.line, second)
                         : pack_planes(image, channels, p.pixels, second),
               to.dense, ahead);
    spread_gram(to.dense, p.unfolds ? s.out : s.image, p.wide, p.pixel_stride, pixels_gram);
    GramSums sums = gram_product(p, to.rows_gram, pixels_gram, to.met);
    total.diagonal += sums.diagonal, total.below += sums.below;
  }
  return total;
}

template <typename scalar_t>
void gram_sq_norms(const scalar_t* rows, const scalar_t* image, const ConvSizes& s,
                   scalar_t* weight, scalar_t* bias, int threads) {
  GramPlan p;
  make_gram_plan<scalar_t>(p, s);
  int64_t pixels = s.image[0] * s.image[1] * s.image[2];
  int64_t row_size = s.rows * p.length, image_size = s.channels * pixels;
  int64_t chunk = samples_in_a_row(s.batch, threads);
  int64_t tiles = s.groups * (gram_tiles<scalar_t>(p.length) + gram_tiles<scalar_t>(p.pixels));
  GramSums* sums = allocate<GramSums>(s.batch);
  int64_t* again = allocate<int64_t>(s.batch);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    GramScratch<scalar_t> scratch = make_scratch<scalar_t>(p);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t n = 0; n < s.batch; n++) {
      bool has_next = (n + 1) % chunk != 0 && n + 1 < s.batch;
      const scalar_t *of_rows = rows + n * row_size, *of_image = image + n * image_size;
      Ahead ahead = ahead_of(pieces(of_rows + row_size, has_next ? row_size : 0),
                             pieces(of_image + image_size, has_next ? image_size : 0), tiles);
      if (bias) bias[n] = bias_of_sample(rows, image, s, n);
      sums[n] = sample_gram(p, of_rows, of_image, scratch, &ahead);
    }
    free_scratch(scratch);
  }
  int64_t count = 0;
  for (int64_t n = 0; n < s.batch; n++) {
    double total = sums[n].diagonal + 2 * sums[n].below;
    weight[n] = scalar_t(total);
    if (total < GRAM_KEEPS * sums[n].diagonal) again[count++] = n;
  }
  if (count > 0) direct_sq_norms<scalar_t>(rows, image, s, again, count, weight, nullptr, threads);
  free(sums);
  free(again);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
