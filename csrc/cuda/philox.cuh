// Philox4x32-10: random bits as a function of a key and a counter, with no state.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
// constants as in Random123's philox.h.
#pragma once

#include "portable.h"

namespace fastminima {
namespace cuda {

struct Words {
  uint32_t w[4];
};

FM_DEVICE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t* const c = counter.w;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t c0 = uint32_t(b >> 32) ^ c[1] ^ key0, c2 = uint32_t(a >> 32) ^ c[3] ^ key1;
    c[0] = c0, c[1] = uint32_t(b), c[2] = c2, c[3] = uint32_t(a);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return counter;
}

// A stream of random numbers: the key, and the upper half of the counter.
struct NoiseStream {
  uint64_t seed, step;

  // The words of elements 4 index to 4 index + 3.
  FM_DEVICE Words operator()(uint64_t index) const {
    const Words counter = {uint32_t(index), uint32_t(index >> 32), uint32_t(step),
                           uint32_t(step >> 32)};
    return philox(counter, uint32_t(seed), uint32_t(seed >> 32));
  }
};

// ln((w + 1/2) / 2^32), as exact near one as near zero.
template <typename R>
FM_DEVICE R log_uniform(uint32_t w) {
  const bool is_low = w < 0x80000000u;
  const R x = (R(is_low ? w : ~w) + R(0.5)) * R(0x1p-32);
  return is_low ? ln(x) : ln_1p(-x);
}

// Four standard normal numbers by Box and Muller: words 0 and 2 are radii, 1 and 3 signed angles.
template <typename R>
FM_DEVICE void normals(const Words& words, R (&z)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const R radius = root(R(-2) * log_uniform<R>(words.w[i]));
    R s, c;
    sin_cos_pi(R(int32_t(words.w[i + 1])) * R(0x1p-31), s, c);
    z[i] = radius * c, z[i + 1] = radius * s;
  }
}

}  // namespace cuda
}  // namespace fastminima
