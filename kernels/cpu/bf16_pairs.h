// Two bfloat16 numbers in each 32-bit lane: multiplied pair by pair, in one instruction where there is
// one.
//
// AVX512_BF16's product of pairs is two links of a chain of fused multiply-adds, the upper half of a
// lane before the lower one, but for subnormal numbers, which it takes and leaves as zeros.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

HG_INLINE vf widen_low(vi pair) { return as_float(shift_left(pair, 16)); }
HG_INLINE vf widen_high(vi pair) { return as_float(and_int(pair, set1i((int)0xffff0000u))); }

#if defined(__AVX512F__)

// In assembly for the reasons given at Dot4, and so that all but this runs without AVX512_BF16.
HG_INLINE vf dot2(vf sum, vi a, vi b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
HG_INLINE __m256i round_by_instruction(vf x) {
  __m256i rounded;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x));
  return rounded;
}
// Lane i: number i of `low` below number i of `high`.
HG_INLINE vi interleave_halves(__m256i low, __m256i high) {
  const vi order = _mm512_add_epi32(_mm512_mullo_epi32(iota(), set1i(0x10001)), set1i(0x100000));
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
HG_INLINE vi pair_rows(const uint16_t* low, const uint16_t* high) {
  return interleave_halves(_mm256_loadu_si256((const __m256i*)low),
                           _mm256_loadu_si256((const __m256i*)high));
}

// Rounded numbers, two neighbours in a lane, the first one in the upper half.
HG_INLINE void store_pairs(float* p, vf rounded) {
  const __m512i x = as_int(rounded), upper = _mm512_set1_epi64(0xffff0000);
  const __m512i pairs = _mm512_or_si512(_mm512_and_si512(x, upper), _mm512_srli_epi64(x, 48));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi64_epi32(pairs));
}

#elif defined(__AVX2__)

HG_INLINE vi pair_rows(const uint16_t* low, const uint16_t* high) {
  const __m128i a = _mm_loadu_si128((const __m128i*)low), b = _mm_loadu_si128((const __m128i*)high);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(a, b)),
                                 _mm_unpackhi_epi16(a, b), 1);
}

#else

HG_INLINE vi pair_rows(const uint16_t* low, const uint16_t* high) {
  return load_u16(low) | load_u16(high) << 16;
}

#endif

// sum + the products of both halves of a and b. T: kRoundedPairs for the instruction, or kRounded.
template <int T>
HG_INLINE vf multiply_pairs(vf sum, vi a, vi b) {
#if defined(__AVX512F__)
  if constexpr (T == kRoundedPairs) return dot2(sum, a, b);
#endif
  sum = fma(widen_high(a), widen_high(b), sum);
  return fma(widen_low(a), widen_low(b), sum);
}

// e^x for x <= 0, right to 17 bits, which is enough for what is rounded next; exactly 0 below -87.3.
HG_INLINE vf exp_to_round(vf x) {
  const Exponent e = split_exponent(x);
  vf p = fma(set1(4.1277334e-2f), e.rest, set1(1.6753602e-1f));
  p = fma(p, e.rest, set1(5.0005126e-1f));
  p = fma(p, e.rest, set1(1.0f));
  p = fma(p, e.rest, set1(1.0f));
  return times_power(p, e.shifted, x);
}

// Rounded to the nearest bfloat16, ties to even, but for subnormal numbers.
template <int T>
HG_INLINE void store_rounded(uint16_t* p, vf x) {
#if defined(__AVX512F__)
  if constexpr (T == kRoundedPairs)
    return _mm256_storeu_si256((__m256i*)p, round_by_instruction(x));
#endif
  store_bf16(p, x);
}
// Such numbers, not negative, in pairs.
template <int T>
HG_INLINE vi pair_rounded(vf low, vf high) {
#if defined(__AVX512F__)
  if constexpr (T == kRoundedPairs)
    return interleave_halves(round_by_instruction(low), round_by_instruction(high));
#endif
  return add_int(shift_right(as_int(round_bf16(low)), 16), as_int(round_bf16(high)));
}

}  // namespace
