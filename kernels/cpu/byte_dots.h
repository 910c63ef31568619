// Four bytes in each 32-bit lane, unsigned ones multiplied with signed ones: attention in whole numbers.
//
// Sums of such products are exact, on every path and in any order.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

#if defined(__AVX512F__)

// In assembly for the reasons given at Dot4, and so that all but this runs without AVX512_VNNI.
HG_INLINE vi byte_dot(vi sum, vi a, vi b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
HG_INLINE vi even_words(vi a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); }
HG_INLINE vi odd_words(vi a) { return _mm512_srli_epi16(a, 8); }
HG_INLINE vi even_signed(vi a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
HG_INLINE vi odd_signed(vi a) { return _mm512_srai_epi16(a, 8); }
HG_INLINE vi add_words(vi sum, vi a, vi b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }

// VL columns of four rows of bytes, a column in each lane.
HG_INLINE vi quad_rows(const void* const* rows, ptrdiff_t at) {
  __m128i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_si128((const __m128i*)((const int8_t*)rows[i] + at));
  const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpacklo_epi8(r[2], r[3]);
  const __m128i c = _mm_unpackhi_epi8(r[0], r[1]), d = _mm_unpackhi_epi8(r[2], r[3]);
  const __m256i low = _mm256_setr_m128i(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
  const __m256i high = _mm256_setr_m128i(_mm_unpacklo_epi16(c, d), _mm_unpackhi_epi16(c, d));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// 64 columns, without moving them across the vectors' quarters: quarter q of vector v has columns 16 q + 4 v to
// 16 q + 4 v + 3. `in_order` puts such vectors right.
HG_INLINE void quad_rows64(const void* const* rows, ptrdiff_t at, vi (&out)[4]) {
  vi r[4];
  for (int i = 0; i < 4; ++i) r[i] = load_int((const int8_t*)rows[i] + at);
  const vi a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpacklo_epi8(r[2], r[3]);
  const vi c = _mm512_unpackhi_epi8(r[0], r[1]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  out[0] = _mm512_unpacklo_epi16(a, b);
  out[1] = _mm512_unpackhi_epi16(a, b);
  out[2] = _mm512_unpacklo_epi16(c, d);
  out[3] = _mm512_unpackhi_epi16(c, d);
}
HG_INLINE void in_order(vi (&x)[4]) {
  const vi a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const vi c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

#elif defined(__AVX2__)

HG_INLINE vi even_words(vi a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
HG_INLINE vi odd_words(vi a) { return _mm256_srli_epi16(a, 8); }
HG_INLINE vi even_signed(vi a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
HG_INLINE vi odd_signed(vi a) { return _mm256_srai_epi16(a, 8); }
HG_INLINE vi add_words(vi sum, vi a, vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
HG_INLINE vi quad_rows(const void* const* rows, ptrdiff_t at) {
  __m128i r[4];
  for (int i = 0; i < 4; ++i) r[i] = _mm_loadl_epi64((const __m128i*)((const int8_t*)rows[i] + at));
  const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpacklo_epi8(r[2], r[3]);
  return _mm256_setr_m128i(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
}

#else

HG_INLINE vi quad_rows(const void* const* rows, ptrdiff_t at) {
  uint8_t columns[VL][4];
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < VL; ++i) columns[i][r] = ((const uint8_t*)rows[r] + at)[i];
  return load_int(columns);
}

#endif

// The whole numbers below 256 that x times the factor is nearest to, each in the lowest byte of its lane. In the other
// bytes there may be anything.
HG_INLINE vi whole_bytes(vf x, vf factor) { return as_int(fma(x, factor, set1(kWholeNumbers))); }

// The lowest bytes of four, the first one's lowest.
HG_INLINE vi side_by_side(const vi (&x)[4]) {
  vi bytes = x[3];
#pragma GCC unroll 3
  for (int i = 2; i >= 0; --i) {
    const vi moved = shift_left(bytes, 8), lowest = set1i(255);
#if defined(__AVX512F__)
    bytes = _mm512_ternarylogic_epi32(x[i], moved, lowest, 0xe4);  // bits of x where `lowest` has them, else of `moved`
#else
    bytes = add_int(moved, and_int(x[i], lowest));
#endif
  }
  return bytes;
}

// sum + the four products of each lane, of unsigned bytes a and signed bytes b. T: kByteDots for the instruction,
// or kBytes.
template <int T>
HG_INLINE vi multiply_bytes(vi sum, vi a, vi b) {
#if defined(__AVX512F__)
  if constexpr (T == kByteDots) return byte_dot(sum, a, b);
#endif
#if defined(__AVX2__)
  return add_words(add_words(sum, even_words(a), even_signed(b)), odd_words(a), odd_signed(b));
#else
  for (int i = 0; i < 32; i += 8) sum += ((a << (24 - i)) >> 24 & 255) * ((b << (24 - i)) >> 24);
  return sum;
#endif
}

}  // namespace
