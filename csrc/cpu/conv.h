// Statistics of the weight gradients of a convolution, dW[r, c, k] = sum_t rows[r, t] *
// image[c, t * stride + k * dilation - padding], sample by sample.
#pragma once

#include <cstdint>

#include "registry.h"

namespace fastminima {

// Spatial axes are three, outermost first; missing ones have size 1.
struct ConvSizes {
  int64_t batch, rows, channels, groups;
  int64_t is_transposed;          // then the gradient of the output is the image, not the rows
  int64_t rows_last, image_last;  // whether channels are the last axis (conv_fused only)
  int64_t image[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

// What conv_fused fills: grad and, unless null, moment are [rows, channels / groups, *kernel],
// norms (unless null) is [batch], and bias (unless null) [batch, channels of the output].
template <typename scalar_t>
struct ConvResults {
  scalar_t *grad, *norms, *bias, *moment;
};

}  // namespace fastminima

// rows is [batch, rows, *out] and image [batch, channels, *image], both contiguous. `bias` may be
// null. second_moment adds to total, [rows, channels / groups, *kernel].
#define FM_KERNELS(scalar_t, suffix)                                                             \
  void conv_direct_##suffix(const scalar_t* rows, const scalar_t* image, const ConvSizes& sizes, \
                            scalar_t* weight, scalar_t* bias, int threads);                      \
  void conv_gram_##suffix(const scalar_t* rows, const scalar_t* image, const ConvSizes& sizes,   \
                          scalar_t* weight, scalar_t* bias, int threads);                        \
  void conv_second_moment_##suffix(const scalar_t* rows, const scalar_t* image,                  \
                                   const ConvSizes& sizes, scalar_t* total, int threads);        \
  void conv_fused_##suffix(const scalar_t* rows, const scalar_t* image, const ConvSizes& sizes,  \
                           scalar_t* grad, scalar_t* norms, scalar_t* bias, scalar_t* moment,    \
                           int threads);

FM_DECLARE_KERNELS(FM_KERNELS)
#undef FM_KERNELS
