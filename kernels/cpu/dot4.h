// Bytes: products of four with four, summed into each 32-bit lane, and how they become floats.
//
// A sum of products is exact on every path. It is one instruction where there is VNNI or NEON's dot
// product; elsewhere bytes are widened to 16 bits first, because AVX2's product of bytes
// would saturate. Weights are bytes below 256, inputs from -127 to 127.
#pragma once

#include "simd.h"

namespace {

// ------------------------------------------------------------------ bytes

#if defined(__AVX512F__)

HG_INLINE vi low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
HG_INLINE vi high_nibbles(vi a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}
HG_INLINE vf load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

#else

#if defined(__AVX2__)

HG_INLINE vi low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
HG_INLINE vi high_nibbles(vi a) {
  return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15));
}
HG_INLINE vf load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

#else

HG_INLINE vi low_nibbles(vi a) { return a & 0x0f0f0f0f; }
HG_INLINE vi high_nibbles(vi a) { return (a >> 4) & 0x0f0f0f0f; }
HG_INLINE vf load_i8(const int8_t* p) {
  return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
}

#endif

#endif

// ------------------------------------------------------------------ products

// NEON multiplies signed bytes with signed ones: there int8 weights lose the 128 they are stored with.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kSignedWeights = true;
#else
constexpr bool kSignedWeights = false;
#endif

HG_INLINE vi broadcast4(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return set1i(four);
}

#if defined(__AVX512VNNI__)

struct Weights {
  vi all;
};
typedef Weights Inputs;
HG_INLINE Weights weights_of(vi bytes) { return {bytes}; }
HG_INLINE Inputs inputs_at(const int8_t* x) { return {broadcast4(x)}; }
// In assembly, because compilers (GCC 12) copy the sums around the intrinsic and store them at each
// step, which takes twice the time.
HG_INLINE vi dot4(vi sum, Weights w, Inputs x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w.all), "v"(x.all));
  return sum;
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct Weights {
  vi all;
};
typedef Weights Inputs;
HG_INLINE Weights weights_of(vi bytes) { return {bytes}; }
HG_INLINE Inputs inputs_at(const int8_t* x) { return {broadcast4(x)}; }
HG_INLINE vi dot4(vi sum, Weights w, Inputs x) {
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w.all, (int8x16_t)x.all);
}

#else

// The bytes 0 and 2, and the bytes 1 and 3, of each lane as 16-bit numbers.
struct Weights {
  vi even, odd;
};
typedef Weights Inputs;

#if defined(__AVX2__)

HG_INLINE Weights weights_of(vi bytes) {
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
HG_INLINE Inputs inputs_at(const int8_t* x) {
  const vi all = broadcast4(x);
  return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
}
HG_INLINE vi dot4(vi sum, Weights w, Inputs x) {
  return add_int(sum, add_int(_mm256_madd_epi16(w.even, x.even), _mm256_madd_epi16(w.odd, x.odd)));
}

#else

typedef int16_t vs __attribute__((vector_size(16)));
typedef uint16_t vu __attribute__((vector_size(16)));

HG_INLINE Weights weights_of(vi bytes) { return {(vi)((vu)bytes & 255), (vi)((vu)bytes >> 8)}; }
HG_INLINE Inputs inputs_at(const int8_t* x) {
  const vi all = broadcast4(x);
  return {(vi)((vs)((vu)all << 8) >> 8), (vi)((vs)all >> 8)};
}
// Each product fits 16 bits: 255 * 127 < 2^15.
HG_INLINE vi dot4(vi sum, Weights w, Inputs x) {
  const vi even = (vi)((vs)w.even * (vs)x.even), odd = (vi)((vs)w.odd * (vs)x.odd);
  return sum + ((even << 16 >> 16) + (even >> 16)) + ((odd << 16 >> 16) + (odd >> 16));
}

#endif
#endif

}  // namespace
