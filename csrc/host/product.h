// The product that makes a weight's gradient and its samples' norms, as the ops call it.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/dense_fused.h"
#include "host/typed.h"

namespace fastminima {
namespace host {

// Numbers of scratch that `multiply` needs.
inline int64_t part_size(int64_t batch, int64_t rows_at_a_time) {
  return rows_at_a_time ? batch * (rows_at_a_time + 1) : 0;
}

// `sequence_fused`; of a large gradient so many rows at a time, unless that is 0: as
// `sequence_fused` of ops/native/dense.py.
template <typename scalar_t>
void multiply(const Kernels<scalar_t>& kernels, const Sequences<scalar_t>& x,
              int64_t rows_at_a_time, const FusedResults<scalar_t>& to, scalar_t* scratch,
              int threads) {
  if (!rows_at_a_time)
    return kernels.sequence_fused(x, to.grad, to.norms, to.bias, nullptr, threads);
  scalar_t* bias = to.bias ? scratch + x.batch : nullptr;
  std::vector<double> total(x.batch, 0.0);
  for (int64_t lo = 0; lo < x.d_out; lo += rows_at_a_time) {
    Sequences<scalar_t> part = x;
    part.g += lo;
    part.d_out = std::min(rows_at_a_time, x.d_out - lo);
    kernels.sequence_fused(part, to.grad + lo * x.d_in, scratch, bias, nullptr, threads);
    for (int64_t n = 0; n < x.batch; n++) {
      total[n] += scratch[n];
      if (bias) std::copy_n(bias + n * part.d_out, part.d_out, to.bias + n * x.d_out + lo);
    }
  }
  for (int64_t n = 0; n < x.batch; n++) to.norms[n] = static_cast<scalar_t>(total[n]);
}

}  // namespace host
}  // namespace fastminima
