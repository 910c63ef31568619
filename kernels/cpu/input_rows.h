// The inputs of a product: rows as they are, after a norm or after a gated activation, laid out as the
// product reads them. What comes before the product never goes to memory by itself.
//
// A few columns of a row tile are computed into a buffer that stays in the first-level cache, then
// quantised, if they are to be, and written side by side. Every step works on one row, or on one group
// of values of a row: a row's inputs have the same bits in any batch and however the columns are cut.
#pragma once

#include "bf16_pairs.h"
#include "elementwise.h"
#include "interleave.h"
#include "quantise_rows.h"

namespace {

using namespace headgate;

struct Buffer {
  float rows[kMaxTileRows][kInputColumns];
};

// Columns [first, first + n) of a row; `scale`: of its norm, by which x + residual is in `total`.
HG_INLINE void input_values(const RowSource& source, int64_t row, float scale, int64_t inner,
                            int64_t first, int n, float* out) {
  const float* x = source.x + row * source.x_stride + first;
  if (source.activation >= 0) {
    gate_values(source.activation, x, x + source.up, out, n);
  } else if (source.norm) {
    const float* summed = source.residual ? source.total + row * inner + first : x;
    norm_values(summed, source.norm + first, scale, out, n);
  } else {
    memcpy(out, x, sizeof(float) * n);
  }
}

// Rounds a row of the buffer to bfloat16; `pairs`: and puts two values into the place of one.
HG_INLINE void round_row(float (&x)[kInputColumns], bool pairs) {
  for (int i = 0; i < kInputColumns; i += VL) {
    const vf rounded = round_bf16(load(x + i));
#if defined(__AVX512F__)
    if (pairs) {
      store_pairs(x + i / 2, rounded);
      continue;
    }
#endif
    store(x + i, rounded);
  }
}

// Whether a format's values are rounded to bfloat16.
HG_INLINE bool is_rounded(int32_t format) { return format == kRoundedFloats || format == kPairs; }

// Columns [first, first + n) of a tile's rows, filled up with zeros.
void fill(Buffer& buffer, const InputRowsJob& job, RowRange range, const float* scales,
          int64_t first, int n) {
  for (int64_t r = 0; r < range.last - range.first; ++r) {
    float* row = buffer.rows[r];
    input_values(job.source, range.first + r, scales[r], job.inner, first, n, row);
    for (int i = n; i < kInputColumns; ++i) row[i] = 0.0f;
    if (is_rounded(job.format)) round_row(buffer.rows[r], job.format == kPairs);
  }
}

// The first n of kInputColumns columns of rows in a format, of which bytes take all.
void write_columns(const float* rows, int64_t stride, int64_t height, int n, int32_t format,
                   char* out) {
  if (format == kInt8Inputs) return quantise_rows<kInt8Inputs>(rows, stride, height, out);
  if (format == kInt8Words) return quantise_rows<kInt8Words>(rows, stride, height, out);
  if (format == kInt4Inputs) return quantise_rows<kInt4Inputs>(rows, stride, height, out);
  interleave(rows, stride, height, format == kPairs ? (n + 1) / 2 : n, (float*)out);
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
      const NormRow from = {
          source.x + row * source.x_stride,
          source.residual ? source.residual + row * source.residual_stride : nullptr,
          source.residual ? source.total + row * job.inner : nullptr};
      const Columns kept = {blocks.first * kInputColumns, blocks.last * kInputColumns};
      scales[r] = norm_scale(from, kept, job.inner, source.eps);
    }
  char* out = job.out + range.first * input_row_bytes(job.inner, job.format);
  const bool as_they_are = !source.norm && source.activation < 0 && !is_rounded(job.format);
  Buffer buffer __attribute__((aligned(64)));
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t first = block * kInputColumns;
    const int n = job.inner - first < kInputColumns ? (int)(job.inner - first) : kInputColumns;
    const float* rows = source.x + range.first * source.x_stride + first;
    int64_t stride = source.x_stride;
    if (!as_they_are || n < kInputColumns) {
      fill(buffer, job, range, scales, first, n);
      rows = buffer.rows[0];
      stride = kInputColumns;
    }
    write_columns(rows, stride, height, n, job.format,
                  out + height * input_row_bytes(first, job.format));
  }
}

}  // namespace
