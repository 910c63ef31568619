// Products of float inputs with int8 weights that are widened in registers.
//
// Within a group each output is one chain of fused multiply-adds over k in ascending order; groups
// are scaled and added in ascending order: the same bits in any batch, as in linear.h.
#pragma once

#include "ahead.h"
#include "load_bytes.h"
#include "quantised.h"
#include "store_outputs.h"

namespace {

using namespace headgate;

// The tallest row tile; inputs are packed as linear's are.
constexpr int kWeightOnlyRows = VL == 16 ? 12 : 6;
constexpr int kWeightOnlyVectors = 2;
constexpr int kAskedAtOnce = 2;  // rows of a panel: a cache line
constexpr int kWeightOnlyLead = 2;  // blocks ahead that a weight is asked for where one row tile takes them all

// R rows, V vectors of columns; x[inner][R], y points at the first column.
template <int R, int V>
void multiply_widened(const float* x, const char* block, Ahead ahead, const char* soon, int first,
                      int64_t inner, float* y, int64_t y_stride, int64_t columns, const float* bias) {
  constexpr int kHeader = block_header(kInt8WeightOnly);
  vf totals[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) totals[r][v] = set1(0.0f);
  for (int64_t left = block_count(inner, kInt8WeightOnly); left > 0; --left) {
    if (ahead.is_alone() && left == kWeightOnlyLead) ahead.address = soon;
    ask_for_header<kHeader>(ahead);
    vf sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = set1(0.0f);
    const int8_t* w = (const int8_t*)block + kHeader + first;
    const int size = inner < kWeightOnlyGroup ? (int)inner : kWeightOnlyGroup;
    for (int k = 0; k < size; ++k, w += kPanel, x += R) {
      if (k % kAskedAtOnce == 0) ask_for<kPanel * kAskedAtOnce, 1>(ahead);
      vf values[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) values[v] = load_i8(w + v * VL);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf a = set1(x[r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = fma(a, values[v], sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const vf scale = load_bf16((const uint16_t*)block + first + v * VL);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) totals[r][v] = fma(sums[r][v], scale, totals[r][v]);
    }
    block += block_bytes(kInt8WeightOnly);
    inner -= kWeightOnlyGroup;
  }
  store_outputs<R, V>(totals, y, y_stride, columns, bias);
}

// All columns of one panel for R rows.
template <int R>
void multiply_widened_panel(const float* x, const char* panel, Ahead ahead, const char* soon,
                            int64_t inner, float* y, int64_t y_stride, int64_t columns,
                            const float* bias) {
  constexpr int V = kWeightOnlyVectors;
  for (int first = 0; first < kPanel && first < columns; first += V * VL)
    multiply_widened<R, V>(x, panel, ahead, soon, first, inner, y + first, y_stride, columns - first,
                           bias ? bias + first : nullptr);
}

using WidenedPanel = void (*)(const float*, const char*, Ahead, const char*, int64_t, float*, int64_t,
                              int64_t, const float*);

WidenedPanel widened_panel(int64_t rows) {
  static const WidenedPanel table[] = {
      multiply_widened_panel<1>,  multiply_widened_panel<2>,  multiply_widened_panel<3>,
      multiply_widened_panel<4>,  multiply_widened_panel<5>,  multiply_widened_panel<6>,
#if defined(__AVX512F__)
      multiply_widened_panel<7>,  multiply_widened_panel<8>,  multiply_widened_panel<9>,
      multiply_widened_panel<10>, multiply_widened_panel<11>, multiply_widened_panel<12>,
#endif
  };
  static_assert(sizeof table / sizeof *table == kWeightOnlyRows, "one function for each height");
  return table[rows - 1];
}

// As multiply_panels.
void multiply_widened_panels(const QuantisedLinearJob& job, int64_t first, int64_t last,
                             int64_t later, RowRange tiles) {
  const int64_t size = panel_bytes(job.inner, job.kind);
  const int64_t panels = (job.columns + kPanel - 1) / kPanel, count = tiles.last - tiles.first;
  const Share share = share_of(size, block_header(kInt8WeightOnly), kPanel * kAskedAtOnce,
                               kWeightOnlyGroup / kAskedAtOnce, count);
  const int64_t lead = kWeightOnlyLead * block_bytes(kInt8WeightOnly);
  const RowWalk from_first(job.rows, job.row_tiles, tiles.first);
  const Fetch alone = fetch_alone(kPassingBy);
  for (int64_t panel = first; panel < last; ++panel) {
    const char* weight = job.weight + panel * size;
    const char* soon = job.weight + panel_after(panel, last, later, panels) * size;
    const int64_t column = panel * kPanel;
    const int64_t columns = job.columns - column < kPanel ? job.columns - column : kPanel;
    RowWalk rows = from_first;
    for (int64_t tile = 0; tile < count; ++tile) {
      const RowRange range = rows.next();
      const Ahead ahead = ahead_of(weight, lead, soon, share, tile, alone);
      widened_panel(range.last - range.first)(
          (const float*)job.x + range.first * job.inner, weight, ahead, soon, job.inner,
          job.y + range.first * job.y_stride + column, job.y_stride, columns,
          job.bias ? job.bias + column : nullptr);
    }
  }
}

}  // namespace
