// The inputs of a product: rows as they are, after a norm or after a gated activation, laid out as the
// product reads them. What comes before the product never goes to memory by itself.
//
// A few columns of a row tile are computed into a buffer that stays in the first-level cache, then
// quantised, if they are to be, and written side by side. Every step works on one row, or on one group
// of values of a row: a row's inputs have the same bits in any batch and however the columns are cut.
#pragma once

#include "elementwise.h"
#include "quantised.h"

namespace {

using namespace headgate;

struct Buffer {
  float rows[kMaxTileRows][kInputColumns];
};

// n columns of a row from `first` on; `scale`: of its norm.
HG_INLINE void input_values(const RowSource& source, int64_t row, float scale, int64_t inner,
                            int64_t first, int n, float* out) {
  const float* x = source.x + row * source.x_stride + first;
  if (source.activation >= 0) {
    gate_values(source.activation, x, x + inner, out, n);
  } else if (source.norm) {
    const float* residual =
        source.residual ? source.residual + row * source.residual_stride + first : nullptr;
    norm_values(x, residual, source.norm + first, scale, out,
                residual ? source.total + row * inner + first : nullptr, n);
  } else {
    memcpy(out, x, sizeof(float) * n);
  }
}

// out[i][r] = row r's value i of n; a value is any 32 bits.
HG_INLINE void interleave(const float* rows, int64_t stride, int64_t height, int n, float* out) {
  if (height == 1) {
    memcpy(out, rows, sizeof(float) * n);
    return;
  }
  for (int64_t first = 0; first < height; first += VL) {
    const int count = height - first < VL ? (int)(height - first) : VL;
    const float* from[VL];
    for (int j = 0; j < VL; ++j) from[j] = rows + (first + (j < count ? j : 0)) * stride;
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      vf columns[4];
      load_columns4(from, i, columns);
      for (int j = 0; j < 4; ++j) {
        float* to = out + (i + j) * height + first;
        if (count == VL) store(to, columns[j]);
        else store_n(to, columns[j], count);
      }
    }
    for (; i < n; ++i)
      for (int j = 0; j < count; ++j) out[i * height + first + j] = from[j][i];
  }
}

// Rounds a row of the buffer to bfloat16; `pairs`: and puts two values into the place of one.
HG_INLINE void round_row(float (&x)[kInputColumns], bool pairs) {
  for (int i = 0; i < kInputColumns; i += VL) store(x + i, round_bf16(load(x + i)));
  if (!pairs) return;
  uint32_t bits[kInputColumns];
  memcpy(bits, x, sizeof bits);
  for (int i = 0; i < kInputColumns / 2; ++i) bits[i] = bits[2 * i] | bits[2 * i + 1] >> 16;
  memcpy(x, bits, sizeof bits / 2);
}

HG_INLINE int32_t sum_lanes_int(vi x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(x);
#else
  int32_t lane[VL], sum = 0;
  memcpy(lane, &x, sizeof lane);
  for (int i = 0; i < VL; ++i) sum += lane[i];
  return sum;
#endif
}

// One group of one row, x = scale * value: returns the scale, and the sum of the values.
template <int G>
HG_INLINE float quantise_group(const float* x, int8_t* values, int32_t* sum) {
  vf most = set1(0.0f);
  for (int i = 0; i < G; i += VL) most = vmax(most, vabs(load(x + i)));
  const float largest = max_lanes(most);
  const bool zero = largest < kSmallestInput;
  const vf inverse = set1(zero ? 0.0f : 127.0f / largest);
  vi total = set1i(0);
  for (int i = 0; i < G; i += VL) {
    const vi value = to_int(round_even(load(x + i) * inverse));
    total = add_int(total, value);
    store_i8(values + i, value);
  }
  *sum = sum_lanes_int(total);
  return zero ? 0.0f : largest / 127.0f;
}

// The groups of the buffer's first n columns, as quantised.h lays them out.
template <int Q>
void quantise_columns(Buffer& buffer, int64_t height, int n, char* out) {
  constexpr int G = Q == kInt8 ? kInt8Group : kInt4Group;
  int8_t values[kMaxTileRows][G] __attribute__((aligned(64)));
  for (int first = 0; first < n; first += G, out += height * row_group_bytes(Q)) {
    for (int64_t r = 0; r < height; ++r) {
      int32_t sum;
      const float scale = quantise_group<G>(buffer.rows[r] + first, values[r], &sum);
      ((float*)out)[r] = scale;
      if (Q == kInt8) ((int32_t*)out)[height + r] = -128 * sum;
      else ((float*)out)[height + r] = scale * (float)sum;
    }
    interleave((const float*)values, G / 4, height, G / 4, (float*)(out + height * 8));
  }
}

// The buffer's first n columns in a format.
void write_columns(Buffer& buffer, int64_t height, int n, int32_t format, char* out) {
  if (format == kInt8Inputs) return quantise_columns<kInt8>(buffer, height, n, out);
  if (format == kInt4Inputs) return quantise_columns<kInt4>(buffer, height, n, out);
  const bool pairs = format == kPairs;
  if (format != kFloats)
    for (int64_t r = 0; r < height; ++r) round_row(buffer.rows[r], pairs);
  interleave(buffer.rows[0], kInputColumns, height, pairs ? (n + 1) / 2 : n, (float*)out);
}

// Tile: some columns of one row tile.
void input_rows_tile(const void* data, int64_t tile) {
  const InputRowsJob& job = *(const InputRowsJob*)data;
  const RowSource& source = job.source;
  const RowRange range = row_range(job.rows, job.row_tiles, tile / job.parts);
  const RowRange blocks = row_range((job.inner + kInputColumns - 1) / kInputColumns, job.parts,
                                    tile % job.parts);
  const int64_t height = range.last - range.first;
  float scales[kMaxTileRows] = {};
  if (source.norm)
    for (int64_t r = 0; r < height; ++r) {
      const int64_t row = range.first + r;
      const float* residual =
          source.residual ? source.residual + row * source.residual_stride : nullptr;
      scales[r] = norm_scale(source.x + row * source.x_stride, residual, job.inner, source.eps);
    }
  char* out = job.out + range.first * input_row_bytes(job.inner, job.format);
  Buffer buffer __attribute__((aligned(64)));
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t first = block * kInputColumns;
    const int n = job.inner - first < kInputColumns ? (int)(job.inner - first) : kInputColumns;
    for (int64_t r = 0; r < height; ++r) {
      input_values(source, range.first + r, scales[r], job.inner, first, n, buffer.rows[r]);
      for (int i = n; i < kInputColumns; ++i) buffer.rows[r][i] = 0.0f;
    }
    write_columns(buffer, height, n, job.format, out + height * input_row_bytes(first, job.format));
  }
}

}  // namespace
