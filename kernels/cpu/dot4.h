// Products of four bytes with four signed bytes, summed into each 32-bit lane, exactly.
//
// One instruction where there is VNNI; elsewhere the bytes are widened to 16 bits first, because
// AVX2's product of bytes would saturate. `values` below 256, inputs from -127 to 127.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512VNNI__)

struct Bytes {
  vi all;
};
struct Inputs {
  const int8_t* four;
};
HG_INLINE Bytes weights_of(vi values) { return {values}; }
HG_INLINE Inputs inputs_at(const int8_t* x) { return {x}; }
// In assembly, because compilers (GCC 12) copy the sums around the intrinsic and store them at each
// step, which takes twice the time, and don't fold the broadcast into it.
HG_INLINE vi dot4(vi sum, Bytes w, Inputs x) {
  typedef int8_t Four __attribute__((vector_size(4)));
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w.all), "m"(*(const Four*)x.four));
  return sum;
}
HG_INLINE vi low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
HG_INLINE vi high_nibbles(vi a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}
HG_INLINE vf load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
HG_INLINE void store_i8(int8_t* p, vi a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a));
}

#else

// The bytes 0 and 2, and the bytes 1 and 3, of each lane as 16-bit numbers.
struct Bytes {
  vi even, odd;
};
typedef Bytes Inputs;

#if defined(__AVX2__)

HG_INLINE Bytes weights_of(vi values) {
  return {_mm256_and_si256(values, _mm256_set1_epi16(255)), _mm256_srli_epi16(values, 8)};
}
HG_INLINE Inputs inputs_at(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  const vi all = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
}
HG_INLINE vi dot4(vi sum, Bytes w, Inputs x) {
  return add_int(sum, add_int(_mm256_madd_epi16(w.even, x.even), _mm256_madd_epi16(w.odd, x.odd)));
}
HG_INLINE vi low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
HG_INLINE vi high_nibbles(vi a) {
  return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15));
}
HG_INLINE vf load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

#else

typedef int16_t vs __attribute__((vector_size(16)));
typedef uint16_t vu __attribute__((vector_size(16)));

HG_INLINE Bytes weights_of(vi values) { return {(vi)((vu)values & 255), (vi)((vu)values >> 8)}; }
HG_INLINE Inputs inputs_at(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  const vi all = set1i(four);
  return {(vi)((vs)((vu)all << 8) >> 8), (vi)((vs)all >> 8)};
}
// Each product fits 16 bits: 255 * 127 < 2^15.
HG_INLINE vi dot4(vi sum, Bytes w, Inputs x) {
  const vi even = (vi)((vs)w.even * (vs)x.even), odd = (vi)((vs)w.odd * (vs)x.odd);
  return sum + ((even << 16 >> 16) + (even >> 16)) + ((odd << 16 >> 16) + (odd >> 16));
}
HG_INLINE vi low_nibbles(vi a) { return a & 0x0f0f0f0f; }
HG_INLINE vi high_nibbles(vi a) { return (a >> 4) & 0x0f0f0f0f; }
HG_INLINE vf load_i8(const int8_t* p) {
  return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
}

#endif

HG_INLINE void store_i8(int8_t* p, vi a) {
  int32_t lane[VL];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < VL; ++i) p[i] = (int8_t)lane[i];
}

#endif

}  // namespace
