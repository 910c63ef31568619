// Numbers as signed bytes: rows of keys and values stored by a scale.
#pragma once

#include "load_bytes.h"

namespace {

#if defined(__AVX512F__)

// The lowest byte of each lane.
HG_INLINE void store_i8(int8_t* p, vi a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a));
}
// As load_lanes in simd.h.
HG_INLINE vf load_lanes_i8(const int8_t* const* rows, int i, ptrdiff_t at) {
  const int8_t* const* row = rows + i / 2 + i % 2 * 8;
  const __m128i low = _mm_loadl_epi64((const __m128i*)(row[0] + at));
  const __m128i high = _mm_loadl_epi64((const __m128i*)(row[4] + at));
  return to_float(_mm512_cvtepi8_epi32(_mm_unpacklo_epi64(low, high)));
}
HG_INLINE vi max_int(vi a, vi b) { return _mm512_max_epi32(a, b); }

#elif defined(__AVX2__)

HG_INLINE void store_i8(int8_t* p, vi a) {
  const __m128i lowest = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(a), lowest);
  const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256(a, 1), lowest);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(low, high));
}
HG_INLINE vf load_lanes_i8(const int8_t* const* rows, int i, ptrdiff_t at) {
  return load_i8(rows[i / 2 + i % 2 * 4] + at);
}
HG_INLINE vi max_int(vi a, vi b) { return _mm256_max_epi32(a, b); }

#else

HG_INLINE void store_i8(int8_t* p, vi a) {
  for (int i = 0; i < VL; ++i) p[i] = (int8_t)a[i];
}
HG_INLINE vf load_lanes_i8(const int8_t* const* rows, int i, ptrdiff_t at) {
  return load_i8(rows[i / 2] + at + i % 2 * 4);
}
HG_INLINE vi max_int(vi a, vi b) { return a > b ? a : b; }

#endif

// The first n < VL lanes, without reading past them.
HG_INLINE vf load_i8_n(const int8_t* p, int n) {
  int8_t part[VL] = {};
  memcpy(part, p, n);
  return load_i8(part);
}

void widen_bytes(const int8_t* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + VL <= size; i += VL) store(to + i, load_i8(from + i));
  if (i < size) store_n(to + i, load_i8_n(from + i, (int)(size - i)), (int)(size - i));
}

// x = scale * value, the largest as 127: returns the scale. It is NaN if some x is, whose bits are
// above those of any number.
HG_INLINE float quantise_row(const float* x, int8_t* values, int64_t size) {
  const int64_t whole = size / VL * VL;
  const int rest = (int)(size - whole);
  const vi magnitude = set1i(0x7fffffff);
  vi most = set1i(0);
  for (int64_t i = 0; i < whole; i += VL)
    most = max_int(most, and_int(as_int(load(x + i)), magnitude));
  if (rest) most = max_int(most, and_int(as_int(load_n(x + whole, rest)), magnitude));
  int32_t lane[VL], bits = 0;
  memcpy(lane, &most, sizeof lane);
  for (int i = 0; i < VL; ++i) bits = lane[i] > bits ? lane[i] : bits;
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  const bool zero = largest < kSmallestInput;
  const vf inverse = set1(zero ? 0.0f : 127.0f / largest);
  for (int64_t i = 0; i < whole; i += VL)
    store_i8(values + i, to_int(round_even(load(x + i) * inverse)));
  if (rest) {
    int8_t part[VL];
    store_i8(part, to_int(round_even(load_n(x + whole, rest) * inverse)));
    memcpy(values + whole, part, rest);
  }
  return zero ? 0.0f : largest / 127.0f;
}

}  // namespace
