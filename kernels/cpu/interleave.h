// Rows side by side: how a product's inner loop reads its inputs.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__)

// 16 values of each of eight rows: two[j] = {value 2j of the rows, value 2j + 1 of the rows}.
HG_INLINE void interleave8(const float* const* rows, int64_t at, vf two[8]) {
  __m512d pairs[8];  // [p][4]: rows 2p and 2p + 1
  for (int p = 0; p < 4; ++p) {
    const vf a = load(rows[2 * p] + at), b = load(rows[2 * p + 1] + at);
    pairs[p] = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    pairs[4 + p] = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  }
  // Of values 4l + 2h and the next one, in the 128 bits l of each vector: four rows each.
  for (int h = 0; h < 2; ++h) {
    const __m512d* from = pairs + 4 * h;
    const vf even_low = _mm512_castpd_ps(_mm512_unpacklo_pd(from[0], from[1]));
    const vf even_high = _mm512_castpd_ps(_mm512_unpacklo_pd(from[2], from[3]));
    const vf odd_low = _mm512_castpd_ps(_mm512_unpackhi_pd(from[0], from[1]));
    const vf odd_high = _mm512_castpd_ps(_mm512_unpackhi_pd(from[2], from[3]));
    const vf even01 = _mm512_shuffle_f32x4(even_low, even_high, 0x44);
    const vf even23 = _mm512_shuffle_f32x4(even_low, even_high, 0xee);
    const vf odd01 = _mm512_shuffle_f32x4(odd_low, odd_high, 0x44);
    const vf odd23 = _mm512_shuffle_f32x4(odd_low, odd_high, 0xee);
    two[h] = _mm512_shuffle_f32x4(even01, odd01, 0x88);
    two[2 + h] = _mm512_shuffle_f32x4(even01, odd01, 0xdd);
    two[4 + h] = _mm512_shuffle_f32x4(even23, odd23, 0x88);
    two[6 + h] = _mm512_shuffle_f32x4(even23, odd23, 0xdd);
  }
}

// The first multiple of 16 values of `count` <= 8 rows; returns how many.
HG_INLINE int interleave_whole(const float* rows, int64_t stride, int64_t height, int count, int n,
                               float* out) {
  const float* from[8];
  for (int j = 0; j < 8; ++j) from[j] = rows + (j < count ? j : 0) * stride;
  const __mmask8 some = (__mmask8)((1u << count) - 1);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    vf two[8];
    interleave8(from, i, two);
    for (int j = 0; j < 8; ++j, out += 2 * height) {
      if (height == 8) {
        store(out, two[j]);
        continue;
      }
      _mm256_mask_storeu_ps(out, some, _mm512_castps512_ps256(two[j]));
      _mm256_mask_storeu_ps(out + height, some, _mm512_extractf32x8_ps(two[j], 1));
    }
  }
  return i;
}

constexpr int kRowsSideBySide = 8;

#else

HG_INLINE int interleave_whole(const float*, int64_t, int64_t, int, int, float*) { return 0; }

constexpr int kRowsSideBySide = VL;

#endif

// out[i][r] = row r's value i of n; a value is any 32 bits.
HG_INLINE void interleave(const float* rows, int64_t stride, int64_t height, int n, float* out) {
  if (height == 1) {
    memcpy(out, rows, sizeof(float) * n);
    return;
  }
  for (int64_t first = 0; first < height; first += kRowsSideBySide, out += kRowsSideBySide) {
    const int64_t left = height - first;
    const int count = left < kRowsSideBySide ? (int)left : kRowsSideBySide;
    const float* block = rows + first * stride;
    int i = interleave_whole(block, stride, height, count, n, out);
    if (i == n) continue;
    const float* from[VL];
    for (int j = 0; j < VL; ++j) from[j] = block + (j < count ? j : 0) * stride;
    for (; i + 4 <= n; i += 4) {
      vf columns[4];
      load_columns4(from, i, columns);
      for (int j = 0; j < 4; ++j) {
        float* to = out + (i + j) * height;
        if (count == VL) store(to, columns[j]);
        else store_n(to, columns[j], count);
      }
    }
    for (; i < n; ++i)
      for (int j = 0; j < count; ++j) out[i * height + j] = from[j][i];
  }
}

}  // namespace
