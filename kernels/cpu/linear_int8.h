// Products of inputs quantised to bytes with int8 and int4 weights.
//
// A group's sum of products is an integer, exact in any order; it becomes a float, is multiplied with
// its scales (int8: of the inputs; the sum of all groups with the weights') and added to the output's
// sum in ascending order of groups. So an output has the same bits in any batch, on any number of
// threads, and with vectors of any width.
#pragma once

#include "ahead.h"
#include "dot4.h"
#include "load_bytes.h"
#include "quantise_rows.h"
#include "store_outputs.h"

namespace {

using namespace headgate;

// Vectors of columns whose sums stay in registers, and how far ahead a weight is asked for.
constexpr int kQuantisedVectors = 2;
constexpr int kQuantisedPrefetch = 2048;

// Loads of weights for one vector of columns in a group.
template <int Q>
constexpr int kStepsOf = Q == kInt4 ? kInt4Group / 8 : kInt8Group / 4;

template <int Q>
constexpr int kFormatOf = Q == kInt4 ? kInt4Inputs : kInt8Format;

// How many parts of what is stored in a lane are multiplied one after the other.
template <int Q>
constexpr int kPartsOf = kFormatOf<Q> == kInt8Inputs ? 1 : 2;

// Stored weights as the products take them; int4: the low halves (part 0) or the high ones; words: the even
// bytes or the odd ones.
template <int Q>
HG_INLINE vi bytes_of(vi stored, int part) {
  if (Q == kInt4) return part == 0 ? low_nibbles(stored) : high_nibbles(stored);
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  return part == 0 ? even_bytes(stored) : odd_bytes(stored);
#endif
  return kSignedWeights ? xor_int(stored, set1i((int)0x80808080u)) : stored;
}

// sums[r][v] += the products of one group. x as InputFormat says; w at the first of V vectors of columns.
template <int Q, int R, int V>
HG_INLINE void add_group(const int8_t* x, const char* w, Ahead& ahead, vi (&sums)[R][V]) {
  typedef Dot4<Q> Dot;
  for (int step = 0; step < kStepsOf<Q>; ++step, w += kPanel * 4) {
    ask_for<kPanel * 4, kPanel / (V * VL)>(ahead);
    vi loaded[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) loaded[v] = load_int(w + v * VL * 4);
#pragma GCC unroll 2
    for (int part = 0; part < kPartsOf<Q>; ++part, x += R * 4) {
      if constexpr (V > R) {  // the inputs stay in registers, not the weights
        typename Dot::Inputs a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) a[r] = Dot::inputs(x + r * 4);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const typename Dot::Weights values = Dot::weights(bytes_of<Q>(loaded[v], part));
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sums[r][v] = Dot::add(sums[r][v], values, a[r]);
        }
        continue;
      }
      typename Dot::Weights values[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) values[v] = Dot::weights(bytes_of<Q>(loaded[v], part));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename Dot::Inputs a = Dot::inputs(x + r * 4);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = Dot::add(sums[r][v], values[v], a);
      }
    }
  }
}

// R rows, V vectors of columns from `first` of the panel on, where y points.
template <int Q, int R, int V>
void multiply_quantised(const char* x, const char* panel, Ahead ahead, int first, int64_t groups,
                        float* y, int64_t y_stride, int64_t columns, const float* bias) {
  constexpr int kHeader = block_header(Q);
  ask_for_outputs<R, V>(y, y_stride);
  const char* block = panel + panel_header(Q);
  vf totals[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) totals[r][v] = set1(0.0f);
  for (int64_t g = 0; g < groups; ++g, block += block_bytes(Q), x += R * row_group_bytes(kFormatOf<Q>)) {
    const float* scale = (const float*)x;
    const int32_t* correction = (const int32_t*)(x + R * 4);
    vi sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sums[r][v] = set1i(Q == kInt8 && !kSignedWeights ? correction[r] : 0);
    add_group<Q, R, V>((const int8_t*)(x + R * 8), block + kHeader + first * 4, ahead, sums);
    const float* units = (const float*)panel + first;
    const uint8_t* in_units = (const uint8_t*)block + first;
    vf scales[V], minima[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (Q != kInt4) continue;
      scales[v] = load_u8(in_units + v * VL) * load(units + v * VL);
      minima[v] = load_u8(in_units + kPanel + v * VL) * load(units + kPanel + v * VL);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf s = set1(scale[r]), c = set1(((const float*)correction)[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vf by = Q == kInt4 ? scales[v] * s : s;
        totals[r][v] = fma(to_float(Dot4<Q>::whole(sums[r][v])), by, totals[r][v]);
        if (Q == kInt4) totals[r][v] = fma(minima[v], c, totals[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if (Q != kInt8) continue;
    const vf scale = load_bf16((const uint16_t*)panel + first + v * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) totals[r][v] = totals[r][v] * scale;
  }
  store_outputs<R, V>(totals, y, y_stride, columns, bias);
}

// All columns of one panel for R rows.
template <int Q, int R>
void multiply_quantised_panel(const char* x, const char* panel, Ahead ahead, int64_t groups,
                              float* y, int64_t y_stride, int64_t columns, const float* bias) {
  constexpr int kMost = R <= 2 ? 2 * kQuantisedVectors : kQuantisedVectors;
  constexpr int V = kMost < kPanel / VL ? kMost : kPanel / VL;
  for (int first = 0; first < kPanel && first < columns; first += V * VL) {
    const Ahead part =
        ahead_of_pass(ahead, first / (V * VL), kPanel / (V * VL), groups * kStepsOf<Q>);
    multiply_quantised<Q, R, V>(x, panel, part, first, groups, y + first, y_stride,
                                columns - first, bias ? bias + first : nullptr);
  }
}

using QuantisedPanel = void (*)(const char*, const char*, Ahead, int64_t, float*, int64_t, int64_t,
                                const float*);

template <int Q>
QuantisedPanel quantised_panel(int64_t rows) {
  static const QuantisedPanel table[] = {
      multiply_quantised_panel<Q, 1>, multiply_quantised_panel<Q, 2>,
      multiply_quantised_panel<Q, 3>, multiply_quantised_panel<Q, 4>,
#if defined(__AVX512F__)
      multiply_quantised_panel<Q, 5>, multiply_quantised_panel<Q, 6>,
      multiply_quantised_panel<Q, 7>, multiply_quantised_panel<Q, 8>,
#endif
  };
  static_assert(sizeof table / sizeof *table == kQuantisedRows, "one function for each height");
  return table[rows - 1];
}

// Panels [first, last), and then, probably, those from `later` on.
template <int Q>
void multiply_panels(const QuantisedLinearJob& job, int64_t first, int64_t last, int64_t later,
                     RowRange tiles) {
  const int64_t groups = group_count(job.inner, Q), size = panel_bytes(job.inner, Q);
  const int64_t panels = (job.columns + kPanel - 1) / kPanel;
  const int64_t count = tiles.last - tiles.first;
  const int64_t on = job.rows == 1 ? kQuantisedPrefetch : 2 * kQuantisedPrefetch;
  const Share share = share_of(size, (block_bytes(Q) + kStepsOf<Q> - 1) / kStepsOf<Q>, count);
  const RowWalk from_first(job.rows, job.row_tiles, tiles.first);
  for (int64_t panel = first; panel < last; ++panel) {
    const char* weight = job.weight + panel * size;
    const int64_t column = panel * kPanel;
    const int64_t columns = job.columns - column < kPanel ? job.columns - column : kPanel;
    const char* soon = job.weight + panel_after(panel, last, later, panels) * size;
    RowWalk rows = from_first;
    for (int64_t tile = 0; tile < count; ++tile) {
      const RowRange range = rows.next();
      const Ahead ahead = ahead_of(weight, on, soon, share, tile);
      quantised_panel<Q>(range.last - range.first)(
          job.x + range.first * groups * row_group_bytes(kFormatOf<Q>), weight, ahead, groups,
          job.y + range.first * job.y_stride + column, job.y_stride, columns,
          job.bias ? job.bias + column : nullptr);
    }
  }
}

}  // namespace
