// The packed panels that products over the time of a sequence read.
#pragma once

#include "cpu/dense.h"
#include "tile.h"

namespace fastminima {
namespace FM_ISA {
namespace {

FM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Packs `width` columns of x [time, .] into left panels, some rows at a time: each is read once.
template <typename scalar_t>
void pack_panels(const scalar_t* x, int64_t stride, int64_t time, int64_t width, scalar_t* out) {
  constexpr int R = Tile<scalar_t>::rows;
  for (int64_t t = 0; t < time; t += 16)
    for (int64_t i = 0; i < width; i += R)
      pack_left(x + t * stride + i, stride, least(time - t, 16), least(width - i, R),
                out + i * time + t * R);
}

// Which of the two sides is broadcast (in panels of Tile::rows) and which fills vectors: the
// choice that pads less.
template <typename scalar_t>
struct Sides {
  const scalar_t *left, *right;
  int64_t left_time, right_time, left_width, right_width;
  bool is_swapped;  // the inputs are on the left

  Sides(const Sequences<scalar_t>& x, int64_t n) {
    constexpr int R = Tile<scalar_t>::rows, W = Tile<scalar_t>::width;
    const scalar_t *a = x.a + n * x.a_batch, *g = x.g + n * x.g_batch;
    auto padded = [](int64_t width, int64_t size) { return (width + size - 1) / size * size; };
    is_swapped = padded(x.d_out, R) * padded(x.d_in, W) > padded(x.d_in, R) * padded(x.d_out, W);
    if (!is_swapped) {
      left = g, left_time = x.g_time, left_width = x.d_out;
      right = a, right_time = x.a_time, right_width = x.d_in;
    } else {
      left = a, left_time = x.a_time, left_width = x.d_in;
      right = g, right_time = x.g_time, right_width = x.d_out;
    }
  }
};

}  // namespace
}  // namespace FM_ISA
}  // namespace fastminima
