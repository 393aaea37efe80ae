// How the sequences of a dense layer cross from Python.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "bind.h"
#include "cpu/dense.h"

namespace fastminima {

// a, a_batch, a_time, g, g_batch, g_time, batch, time, d_in, d_out
template <typename scalar_t>
struct Argument<const Sequences<scalar_t>&> {
  using type = const std::array<int64_t, 10>&;
  static Sequences<scalar_t> made(type x) {
    const scalar_t *a = pointer<scalar_t>(x[0]), *g = pointer<scalar_t>(x[3]);
    return {a, x[1], x[2], g, x[4], x[5], x[6], x[7], x[8], x[9]};
  }
};

}  // namespace fastminima
