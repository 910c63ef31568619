// Quantised weights: their layout, and what one instruction set offers to multiply with them.
//
// A weight matrix is cut into panels of kPanel output columns and, along K, into blocks, which are as long as
// what shares a scale of the inputs. Of int8-weight-only a block is kPanel scales in bfloat16, then the values.
// Of int4 it has two groups, each with scales and minima of its own: whole numbers below 256 of a unit that a
// column has for all its groups, minima of eight times the unit, negative, each in a byte; then the values of
// the first group and those of the second. A panel of int4 begins with kPanel units in float32. An int8 column
// has one scale for all groups: a panel begins with kPanel of them, in bfloat16, and its blocks have values
// alone. Blocks of a panel follow one another, so a product reads one stream. Past the end of K a block holds
// any values, since inputs there are zeros; so does it for columns that are missing.
//
//   int8              value + 128 as a byte, [block / 4][kPanel][4]: w = scale * value
//   int8-weight-only  value as a signed byte, [block][kPanel]:       w = scale * value
//   int4              scales [kPanel][2], minima [kPanel][2], then bytes of two values of 0..15,
//                     [2][group / 8][kPanel][4], the low half for the first four k's of eight, the high half
//                     for the others: w = unit * (scale * value - 8 * minimum)
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace headgate {

enum QuantKind : int32_t { kInt8 = 0, kInt8WeightOnly = 1, kInt4 = 2 };

// Values along K that share a scale: of inputs, and of weights but for int8.
constexpr int kInputGroup = 64;
constexpr int kWeightOnlyGroup = 32;
constexpr int kInt4Group = 32;

// int4's scales and minima are at most so many units, and a unit of minima is so many of scales.
constexpr int kMostUnits = 255;
constexpr int kMinimumShift = 3, kUnitsOfMinimum = 1 << kMinimumShift;

// Values along K in a block.
static constexpr int block_size(int32_t kind) {
  return kind == kInt8WeightOnly ? kWeightOnlyGroup : kInputGroup;
}
// Bytes of a block's scales (and minima), and of what stands before a panel's blocks.
static constexpr int64_t block_header(int32_t kind) {
  return kind == kInt8 ? 0 : kind == kInt4 ? kPanel * 4 : kPanel * 2;
}
static constexpr int64_t panel_header(int32_t kind) {
  return kind == kInt8 ? kPanel * 2 : kind == kInt4 ? kPanel * 4 : 0;
}
static constexpr int64_t block_bytes(int32_t kind) {
  return block_header(kind) + kPanel * block_size(kind) / (kind == kInt4 ? 2 : 1);
}
static inline int64_t block_count(int64_t inner, int32_t kind) {
  return (inner + block_size(kind) - 1) / block_size(kind);
}
static inline int64_t panel_bytes(int64_t inner, int32_t kind) {
  return panel_header(kind) + block_count(inner, kind) * block_bytes(kind);
}

// Inputs are quantised to signed bytes, x = scale * value, before they meet int8 or int4 weights. A row tile of
// m rows is stored group by group: m scales (float), m numbers or three times m, then [group / 4][m][4] values,
// or for kInt8Words [group / 4][2][m][2] in 16 bits, of each four the even ones, then the odd ones.
// The numbers, int32, are multiples of the sum of the values. int8: -128 times it, since weights are stored with
// 128 too much. int4: -8 times the sums of the two halves, each of which meets a group of weights; first both
// side by side in 16 bits, then each by itself.
static constexpr int row_header_bytes(int32_t format) { return format == kInt4Inputs ? 16 : 8; }
static constexpr int64_t row_group_bytes(int32_t format) {
  return row_header_bytes(format) + kInputGroup * (format == kInt8Words ? 2 : 1);
}

// weight[N, K] without gaps, to panels of blocks.
struct QuantiseWeightJob {
  const void* weight;
  char* packed;
  int64_t columns, inner;
  int32_t dtype, kind;
};

// Bytes of a row of the inputs in a format; of its first columns, where these are whole blocks.
static inline int64_t input_row_bytes(int64_t columns, int32_t format) {
  if (format == kFloats || format == kRoundedFloats) return columns * int64_t(sizeof(float));
  if (format == kPairs) return (columns + 1) / 2 * int64_t(sizeof(float));
  return (columns + kInputGroup - 1) / kInputGroup * row_group_bytes(format);
}

// y[M, N] = x[M, K] w[N, K]^T + bias[N]
struct QuantisedLinearJob {
  const char* x;          // quantised row tiles; floats in row tiles for weight-only
  const char* weight;
  const float* bias;      // or null
  float* y;
  int64_t rows, inner, columns, y_stride;
  int32_t kind;
  int32_t row_tiles, row_groups, sharing;  // see LinearJob
  int64_t panel_tiles, panels_per_tile;
};

// y[M, N], products of x[M, K] with int8 weights, to the products with the weights themselves where
// these may be a row's largest (see shortlist.h).
struct ShortlistJob {
  const float* x;
  const uint16_t* table;  // bfloat16 [N, K]: the weights
  const float* norms;     // [N]: of each column's weights, and of what int8 makes of them wrongly
  const float* errors;
  const float* panel_norms;  // the largest of each panel
  const float* panel_errors;
  float* y;
  float* known;  // [M, ranks]: of each rank's columns the exact product of the likeliest
  int64_t x_stride, y_stride, columns, inner;
  int32_t rank, ranks;
  bool rounded;  // products take inputs rounded to bfloat16
};

// Such norms and errors of bfloat16 weights [N, K] and the int8 panels made of them.
struct ColumnLengthsJob {
  const uint16_t* table;
  const char* packed;
  float* norms;
  float* errors;
  float* panel_norms;
  float* panel_errors;
  int64_t columns, inner;
};

struct QuantisedKernels {
  const char* name;
  int tile_rows;     // tallest row tile of int8 and int4
  int widened_rows;  // and of weight-only
  int32_t int8_inputs;  // the format of what int8 weights are multiplied with
  void (*quantise_weight)(const void* job, int64_t tile);
  void (*linear)(const void* job, int64_t tile);
  void (*likeliest)(const void* job, int64_t tile);
  void (*shortlist)(const void* job, int64_t tile);
  void (*column_lengths)(const void* job, int64_t tile);
};

extern const QuantisedKernels quantised_generic;
#if defined(__x86_64__)
extern const QuantisedKernels quantised_avx2;
extern const QuantisedKernels quantised_avx512;
#elif defined(__aarch64__)
extern const QuantisedKernels quantised_neon;
#endif

}  // namespace headgate
