// Standard normal numbers as a function of a key and a counter, with no state: Philox4x32-10, and
// Box and Muller. Loops that a compiler makes vectors of: no call and no branch in them.
//
// Sources: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
// constants as in Random123's philox.h; the polynomials are those of Moshier's Cephes (logf.c,
// sinf.c) and of FreeBSD's msun (e_log.c, k_sin.c, k_cos.c).
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastminima {
namespace FM_ISA {

// A stream of random numbers: the key, and the upper half of the counter.
struct Stream {
  uint64_t seed, step;
};

// One 32-bit word in each lane of 64 bits, below bits that mean nothing.
typedef uint64_t word_vec __attribute__((vector_size(FM_BYTES)));
typedef uint32_t packed_words __attribute__((vector_size(FM_BYTES / 2), aligned(4), may_alias));

// The 64 bits of each product of two words.
FM_INLINE word_vec times(word_vec a, word_vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<word_vec>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<word_vec>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<word_vec>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return reinterpret_cast<word_vec>(vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)),
                                              vmovn_u64(reinterpret_cast<uint64x2_t>(b))));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// words[j][i]: word j of the counter (first + i, step), for i < count; N is a multiple of the
// lanes.
template <int N>
FM_INLINE void philox(const Stream& stream, uint64_t first, int count, uint32_t (&words)[4][N]) {
  constexpr int W = FM_BYTES / 8;
  const word_vec zero{}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
  word_vec index;
  for (int i = 0; i < W; i++) index[i] = first + uint64_t(i);
  for (int i = 0; i < count; i += W) {
    word_vec c0 = index + uint64_t(i), c1 = c0 >> 32;
    word_vec c2 = zero + stream.step, c3 = zero + (stream.step >> 32);
    uint32_t key0 = uint32_t(stream.seed), key1 = uint32_t(stream.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
      const word_vec a = times(m0, c0), b = times(m1, c2);
      c0 = (b >> 32) ^ c1 ^ key0, c2 = (a >> 32) ^ c3 ^ key1;
      c1 = b, c3 = a;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    const word_vec c[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; j++)
      *reinterpret_cast<packed_words*>(words[j] + i) = __builtin_convertvector(c[j], packed_words);
  }
}

template <typename to_t, typename from_t>
FM_INLINE to_t bits_as(from_t x) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  to_t y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// x = 2^e (1 + f), with 1 + f between the square roots of 1/2 and 2.
FM_INLINE void split(float x, float& f, int32_t& e) {
  const uint32_t root = 0x3f3504f3, bits = bits_as<uint32_t>(x) - root;
  e = int32_t(bits) >> 23;
  f = bits_as<float>((bits & 0x7fffff) + root) - 1;
}
FM_INLINE void split(double x, double& f, int32_t& e) {
  const uint64_t root = 0x3fe6a09e667f3bcd, bits = bits_as<uint64_t>(x) - root;
  e = int32_t(bits >> 32) >> 20;
  f = bits_as<double>((bits & 0xfffffffffffff) + root) - 1;
}

// ln(2^e (1 + f)).
FM_INLINE float log_of(float f, float e) {
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  return e * 6.93147181e-1f + (f + (square * f * p - 0.5f * square));
}
FM_INLINE double log_of(double f, double e) {
  const double s = f / (2 + f), z = s * s, half_square = 0.5 * f * f;
  double p = 1.479819860511658591e-1;
  p = p * z + 1.531383769920937332e-1;
  p = p * z + 1.818357216161805012e-1;
  p = p * z + 2.222219843214978396e-1;
  p = p * z + 2.857142874366239149e-1;
  p = p * z + 3.999999999940941908e-1;
  p = p * z + 6.666666666666735130e-1;
  return e * 6.931471805599453094e-1 + (f - (half_square - s * (half_square + p * z)));
}

// ln((w + 1/2) / 2^32), as exact near one as near zero: as the logarithm of x, or of 1 - x.
template <typename scalar_t>
FM_INLINE scalar_t log_uniform(uint32_t w) {
  const int32_t sign = int32_t(w) >> 31;
  const scalar_t x = (scalar_t(int32_t(w) ^ sign) + scalar_t(0.5)) * scalar_t(0x1p-32);
  scalar_t low;
  int32_t low_e;
  split(x, low, low_e);
  const bool is_near = x < scalar_t(0.29289321881345248);
  const scalar_t high = is_near ? -x : 1 - 2 * x;  // of 1 - x = (2 - 2 x) / 2
  const int32_t high_e = is_near ? 0 : -1;
  return log_of(sign ? high : low, scalar_t(sign ? high_e : low_e));
}

// Sine and cosine of |x| up to pi / 4.
FM_INLINE void sin_cos(float x, float& s, float& c) {
  const float z = x * x;
  s = x + x * z * ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f);
  c = (2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
  c = 1 - z * (0.5f - z * c);
}
FM_INLINE void sin_cos(double x, double& s, double& c) {
  const double z = x * x;
  s = 1.58969099521155010221e-10 * z - 2.50507602534068634195e-8;
  s = s * z + 2.75573137070700676789e-6;
  s = s * z - 1.98412698298579493134e-4;
  s = s * z + 8.33333333332248946124e-3;
  s = x + x * z * (s * z - 1.66666666666666324348e-1);
  c = -1.13596475577881948265e-11 * z + 2.08757232129817482790e-9;
  c = c * z - 2.75573143513906633035e-7;
  c = c * z + 2.48015872894767294178e-5;
  c = c * z - 1.38888888888741095749e-3;
  c = c * z + 4.16666666666666019037e-2;
  c = 1 - z * (0.5 - z * c);
}

// x, or -x where bit 1 of `quarter` is set.
FM_INLINE float signed_by(uint32_t quarter, float x) {
  return bits_as<float>(bits_as<uint32_t>(x) ^ (quarter & 2) << 30);
}
FM_INLINE double signed_by(uint32_t quarter, double x) {
  return bits_as<double>(bits_as<uint64_t>(x) ^ uint64_t(quarter & 2) << 62);
}

// Two standard normal numbers: one word is a radius, one a signed angle in units of 2^-31 pi.
template <typename scalar_t>
FM_INLINE void box_muller(uint32_t radius, uint32_t angle, scalar_t* z) {
  const scalar_t size = scalar_t(__builtin_sqrt(-2 * log_uniform<scalar_t>(radius)));
  const uint32_t quarter = (angle + (1u << 29)) >> 30;
  const int32_t rest = int32_t(angle - (quarter << 30));
  scalar_t s, c;
  sin_cos(scalar_t(rest) * scalar_t(3.14159265358979324 * 0x1p-31), s, c);
  const bool is_odd = quarter & 1;
  z[0] = size * signed_by(quarter + 1, is_odd ? s : c);
  z[1] = size * signed_by(quarter, is_odd ? c : s);
}

// z[4 i + j]: the number of word j of the counter (first + i, step), for i < count.
template <typename scalar_t, int N>
FM_INLINE void normals(const Stream& stream, uint64_t first, int count, scalar_t (&z)[4 * N]) {
  uint32_t words[4][N];
  philox(stream, first, count, words);
  for (int i = 0; i < count; i++) {
    box_muller(words[0][i], words[1][i], z + 4 * i);
    box_muller(words[2][i], words[3][i], z + 4 * i + 2);
  }
}

}  // namespace FM_ISA
}  // namespace fastminima
