// A row tile's inputs to bytes, laid out as int8 and int4 weights are multiplied with (quantised.h).
//
// A group of a row is quantised by its own largest value: the same bits in any batch and tile. Scales
// and sums of the rows of a tile are worked out side by side, a row in each lane.
#pragma once

#include "interleave.h"
#include "quantised.h"

namespace {

using namespace headgate;

// The tallest row tile of int8 and int4. Sums of a group and of all groups before it are more than the
// registers hold; with taller tiles moving them costs more than reading weights less often gives.
constexpr int kQuantisedRows = VL == 16 ? 8 : 4;
static_assert(kQuantisedRows <= VL && kQuantisedRows <= kMaxTileRows, "a lane for each row");

// The lanes of each row's vector put together by `join`, which must not mind their order: a row in
// each of the first lanes.
#if defined(__AVX512F__)

template <class Join>
HG_INLINE vf join_lanes(const vf (&rows)[kQuantisedRows], Join join) {
  vf a[4], b[2];
  for (int p = 0; p < 4; ++p) {
    const vf x = rows[2 * p], y = rows[2 * p + 1];
    a[p] = join(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  for (int p = 0; p < 2; ++p) {
    const vf x = a[2 * p], y = a[2 * p + 1];
    b[p] = join(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  // Rows l and 4 + l in the 128 bits l.
  const vf c = join(_mm512_shuffle_ps(b[0], b[1], 0x44), _mm512_shuffle_ps(b[0], b[1], 0xee));
  const vf d = join(_mm512_shuffle_ps(c, c, 0x88), _mm512_shuffle_ps(c, c, 0xdd));
  const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
  return _mm512_permutexvar_ps(order, d);
}

#elif defined(__AVX2__)

template <class Join>
HG_INLINE vf join_lanes(const vf (&rows)[kQuantisedRows], Join join) {
  vf a[2];
  for (int p = 0; p < 2; ++p) {
    const vf x = rows[2 * p], y = rows[2 * p + 1];
    a[p] = join(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  const vf b = join(_mm256_shuffle_ps(a[0], a[1], 0x44), _mm256_shuffle_ps(a[0], a[1], 0xee));
  // Rows 0 and 2 in the lower half, 1 and 3 in the upper one.
  const vf c = join(_mm256_shuffle_ps(b, b, 0x88), _mm256_shuffle_ps(b, b, 0xdd));
  return _mm256_permutevar8x32_ps(c, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
}

#else

template <class Join>
HG_INLINE vf join_lanes(const vf (&rows)[kQuantisedRows], Join join) {
  float lanes[kQuantisedRows][VL], joined[VL] = {};
  for (int r = 0; r < kQuantisedRows; ++r) {
    store(lanes[r], rows[r]);
    for (int width = VL / 2; width; width /= 2) {
      float halves[2][VL] = {};
      for (int i = 0; i < width; ++i) halves[0][i] = lanes[r][i], halves[1][i] = lanes[r][i + width];
      store(lanes[r], join(load(halves[0]), load(halves[1])));
    }
    joined[r] = lanes[r][0];
  }
  return load(joined);
}

#endif

// kInputColumns whole numbers from -127 to 127 as bytes.
HG_INLINE void store_bytes(const vi (&x)[kInputColumns / VL], int8_t* to) {
#if defined(__AVX512F__)
  static_assert(kInputColumns == 64, "one vector of bytes");
  const vi packed = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
  // Each 128 bits hold their part of all four.
  const vi order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, packed));
#elif defined(__AVX2__)
  const vi order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int v = 0; v < kInputColumns / VL; v += 4) {
    const vi low = _mm256_packs_epi32(x[v], x[v + 1]), high = _mm256_packs_epi32(x[v + 2], x[v + 3]);
    const vi packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i*)(to + v * VL), packed);
  }
#else
  for (int v = 0; v < kInputColumns / VL; ++v) {
    int32_t lane[VL];
    memcpy(lane, &x[v], sizeof lane);
    for (int i = 0; i < VL; ++i) to[v * VL + i] = (int8_t)lane[i];
  }
#endif
}

// The same in 16 bits, of each four the even ones first.
HG_INLINE void store_words(const vi (&x)[kInputColumns / VL], int16_t* to) {
#if defined(__AVX2__)
  for (int i = 0; i < kInputColumns; i += 16) {
#if defined(__AVX512F__)
    __m256i words = _mm512_cvtepi32_epi16(x[i / VL]);
#else
    __m256i words = _mm256_packs_epi32(x[i / VL], x[i / VL + 1]);
    words = _mm256_permute4x64_epi64(words, 0xd8);  // each 128 bits held their part of both
#endif
    words = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8);
    _mm256_storeu_si256((__m256i*)(to + i), words);
  }
#else
  for (int i = 0; i < kInputColumns; ++i) {
    int32_t lane[VL];
    memcpy(lane, &x[i / VL], sizeof lane);
    to[i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = (int16_t)lane[i % VL];
  }
#endif
}

// The scale of a group of each row, and what its values are multiplied with.
HG_INLINE vf find_scales(const float* rows, int64_t stride, int64_t height, vf* inverses) {
  vf most[kQuantisedRows];
  for (int r = 0; r < kQuantisedRows; ++r) {
    most[r] = set1(0.0f);
    if (r < height)
      for (int i = 0; i < kInputGroup; i += VL) most[r] = vmax(most[r], vabs(load(rows + r * stride + i)));
  }
  const vf largest = join_lanes(most, [](vf a, vf b) { return vmax(a, b); });
  const vf least = set1(kSmallestInput), zero = set1(0.0f), limit = set1(127.0f);
  *inverses = if_less(largest, least, zero, limit / largest);
  return if_less(largest, least, zero, largest / limit);
}

// -2^shift times the sum of each row's whole numbers, which are in the lanes of `sums`.
HG_INLINE vi negative_sums(const vf (&sums)[kQuantisedRows], int shift) {
  const vi sum = as_int(join_lanes(sums, [](vf a, vf b) { return as_float(add_int(as_int(a), as_int(b))); }));
  return shift_left(add_int(xor_int(sum, set1i(-1)), set1i(1)), shift);
}

// One group of each row.
template <int F>
void quantise_rows(const float* rows, int64_t stride, int64_t height, char* out) {
  static_assert(kInputGroup == kInputColumns, "a buffer of columns is a group");
  constexpr int kBytes = F == kInt8Words ? 2 : 1;
  constexpr int kSums = F == kInt4Inputs ? 2 : 1, kSummed = kInputGroup / kSums;
  vf inverse;
  float inverses[VL];
  const vf scales = find_scales(rows, stride, height, &inverse);
  store(inverses, inverse);
  int8_t stored[kQuantisedRows][kInputColumns * kBytes] __attribute__((aligned(64)));
  vf sums[kSums][kQuantisedRows] = {};
  for (int64_t r = 0; r < height; ++r) {
    vi values[kInputColumns / VL];
    for (int part = 0; part < kSums; ++part) {
      vi sum = set1i(0);
      for (int i = part * kSummed; i < (part + 1) * kSummed; i += VL) {
        values[i / VL] = round_to_int(load(rows + r * stride + i) * set1(inverses[r]));
        sum = add_int(sum, values[i / VL]);
      }
      sums[part][r] = as_float(sum);
    }
    if constexpr (F == kInt8Words) store_words(values, (int16_t*)stored[r]);
    else store_bytes(values, stored[r]);
  }
  float* header = (float*)out;
  store_n(header, scales, (int)height);
  if constexpr (F == kInt4Inputs) {
    const vi first = negative_sums(sums[0], kMinimumShift), second = negative_sums(sums[1], kMinimumShift);
    const vi both = add_int(and_int(first, set1i(0xffff)), shift_left(second, 16));
    store_n(header + height, as_float(both), (int)height);
    store_n(header + 2 * height, as_float(first), (int)height);
    store_n(header + 3 * height, as_float(second), (int)height);
  } else {
    store_n(header + height, as_float(negative_sums(sums[0], 7)), (int)height);
  }
  constexpr int kWords = kInputColumns * kBytes / 4;  // of 32 bits
  interleave((const float*)stored[0], kWords, height, kWords, (float*)(out + height * row_header_bytes(F)));
}

}  // namespace
