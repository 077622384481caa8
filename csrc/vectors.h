// Vectors of kLanes floats, written in the vector extensions of GCC and Clang, so that one text serves every
// instruction set. Included by attention_kernel.cpp only: everything has internal linkage and nothing comes from the
// C++ library (see attention.h).
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FAP_LANES 16
#elif defined(__AVX2__)
#define FAP_LANES 8
#else
#define FAP_LANES 4
#endif

#define FAP_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kLanes = FAP_LANES;
constexpr float kInfinity = __builtin_inff();

typedef float Vec __attribute__((vector_size(4 * FAP_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * FAP_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * FAP_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * FAP_LANES), aligned(4), may_alias));
typedef uint16_t ShortVec __attribute__((vector_size(2 * FAP_LANES)));
typedef uint16_t UnalignedShortVec __attribute__((vector_size(2 * FAP_LANES), aligned(2), may_alias));

FAP_INLINE Vec broadcast(float x) { return x - Vec{}; }
FAP_INLINE IntVec broadcast(int32_t x) { return x - IntVec{}; }
FAP_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
FAP_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

// The second operand where either is NaN, as the x86 instruction does.
#if defined(__AVX512F__)
FAP_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
FAP_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
#else
FAP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif

// 2^x for x <= 0: relative error 1.5e-7; exactly 1 at 0 and 0 below -126.5; NaN stays NaN.
// x = n + f with integer n and |f| <= 1/2; 2^f is a minimax polynomial, 2^n goes into the exponent bits.
FAP_INLINE Vec exp2_nonpositive(Vec x) {
  const Vec lowest = broadcast(-127.0f);
  x = max(lowest, x);
  // Adding 1.5 * 2^23 rounds to an integer; the further 127 makes its low bits the biased exponent.
  const Vec round = broadcast(12582912.0f + 127.0f);
  const Vec shifted = x + round;
  const Vec f = x - (shifted - round);
  Vec p = broadcast(0x1.5bba14p-10f);
  p = p * f + broadcast(0x1.3cea88p-7f);
  p = p * f + broadcast(0x1.c6b752p-5f);
  p = p * f + broadcast(0x1.ebf9bcp-3f);
  p = p * f + broadcast(0x1.62e42ap-1f);
  p = p * f + broadcast(1.0f);
  // A multiplication and not an addition to p's exponent: it keeps every NaN, and 2^-127 becomes a plain 0.
  return p * (Vec)((BitVec)shifted << 23);
}

// Storage types of the inputs and of the output.
struct Float {
  typedef float Bits;
};
struct BFloat16 {
  typedef uint16_t Bits;
};
struct Half {
  typedef uint16_t Bits;
};

FAP_INLINE Vec widen(Float, const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

FAP_INLINE BitVec widen_bits(const uint16_t* p) {
  const ShortVec x = *reinterpret_cast<const UnalignedShortVec*>(p);
  return __builtin_convertvector(x, BitVec);
}

FAP_INLINE Vec widen(BFloat16, const uint16_t* p) { return (Vec)(widen_bits(p) << 16); }

FAP_INLINE Vec widen(Half, const uint16_t* p) {
  const BitVec bits = widen_bits(p);
  // Exponent and fraction move to their places in a float; the product with 2^112 mends the bias, subnormals too.
  const BitVec magnitude = (bits & 0x7fffu) << 13;
  BitVec x = (BitVec)((Vec)magnitude * broadcast(0x1p112f));
  x |= (BitVec)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;  // infinity and NaN
  return (Vec)(x | (bits & 0x8000u) << 16);
}

FAP_INLINE void narrow(Float, Vec x, float* p) { *reinterpret_cast<UnalignedVec*>(p) = x; }

FAP_INLINE void narrow_bits(BitVec bits, uint16_t* p) {
  *reinterpret_cast<UnalignedShortVec*>(p) = __builtin_convertvector(bits, ShortVec);
}

FAP_INLINE void narrow(BFloat16, Vec x, uint16_t* p) {
  const BitVec bits = (BitVec)x;
  const BitVec rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  narrow_bits(x == x ? rounded : (bits >> 16 | 0x40u), p);
}

FAP_INLINE void narrow(Half, Vec x, uint16_t* p) {
  const BitVec bits = (BitVec)x;
  const BitVec magnitude = bits & 0x7fffffffu;
  // Normal results: rebias, then round to nearest even at bit 13; 65520 and above carry into infinity.
  const BitVec normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Subnormal results: adding 1/2 leaves the fraction, rounded to multiples of 2^-24, in the low bits.
  const BitVec subnormal = (BitVec)((Vec)magnitude + broadcast(0.5f)) - (126u << 23);
  BitVec half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x47800000u ? (BitVec{} + 0x7c00u) : half;
  half = magnitude > 0x7f800000u ? (BitVec{} + 0x7e00u) : half;
  narrow_bits(half | (bits >> 16 & 0x8000u), p);
}

}  // namespace
