// Products of inputs quantised to bytes with int8 and int4 weights.
//
// What inputs of one scale come to is an integer, exact in any order: a sum of products, of int4 the two sums of its
// groups by their scales. It becomes a float, is multiplied with the inputs' scale and added to the output's sum
// in ascending order; the sum of all is multiplied with the column's scale or unit. So an output has the same
// bits in any batch, on any number of threads, and with vectors of any width.
#pragma once

#include "ahead.h"
#include "dot4.h"
#include "quantise_rows.h"
#include "store_outputs.h"

namespace {

using namespace headgate;

// Vectors of columns at a time: few rows take all of a panel, so that they read memory in one stream.
template <int R>
constexpr int kVectorsOf = R > 2 ? 2 : kPanel / VL < 4 ? kPanel / VL : 4;

// With one vector, eight rows' sums of both groups of int4 and of all blocks fit into the registers of AVX-512.
// That is the faster where several row tiles read what the first one of them has asked memory for.
template <int Q, int R>
constexpr bool kOneVector = VL == 16 && Q == kInt4 && R > 4;

// How many blocks ahead a weight is asked for where one row tile of R rows takes them all.
template <int Q, int R>
constexpr int kBlocksAhead = Q == kInt4 ? 4 : R == 1 ? 2 : 3;

// (Measured on Zen 4: rows take less by way of the second-level cache, and few of them where nothing is asked
// for at all, since each thread reads columns of its own from end to end; but not one row of int8.)
constexpr int kUnaskedRows = 4;
template <int Q>
HG_INLINE Fetch fetch_quantised_alone(int64_t rows) {
  if (VL != 16) return fetch_alone(kPassingBy);
  return fetch_alone(rows <= kUnaskedRows && (Q == kInt4 || rows > 1) ? kUnasked : kSecondLevel);
}

// Loads of weights for one vector of columns in a block.
template <int Q>
constexpr int kStepsOf = kInputGroup / (Q == kInt4 ? 8 : 4);

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

// sums[r][v] += the products of so many steps. x as InputFormat says; w at the first of V vectors of columns.
template <int Q, int STEPS, int R, int V>
HG_INLINE void add_products(const int8_t* x, const char* w, Ahead& ahead, vi (&sums)[R][V]) {
  typedef Dot4<Q> Dot;
  for (int step = 0; step < STEPS; ++step, w += kPanel * 4) {
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

// The sums of each row begin at a number of its inputs.
template <int R, int V>
HG_INLINE void begin_at(const int32_t* numbers, vi (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = set1i(numbers ? numbers[r] : 0);
}

// What a group of inputs and a block's columns from `first` on come to, a whole number. x as quantised.h has it.
template <int Q, int R, int V>
HG_INLINE void sum_block(const char* x, const char* block, int first, Ahead& ahead, vi (&sums)[R][V]) {
  const int32_t* numbers = (const int32_t*)x + R;
  const int8_t* values = (const int8_t*)x + R * row_header_bytes(kFormatOf<Q>);
  const char* weights = block + block_header(Q) + first * 4;
  if constexpr (Q == kInt8) {
    begin_at(kSignedWeights ? nullptr : numbers, sums);
    add_products<Q, kStepsOf<Q>>(values, weights, ahead, sums);
  } else {
    constexpr int kSteps = kStepsOf<Q> / 2;
    Int4Scales scales[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      scales[v] = load_int4_scales(block + (first + v * VL) * 2, block + (kPanel + first + v * VL) * 2);
    vi before[R][V];
    ask_for_header<block_header(Q)>(ahead);
    begin_at(kCentred ? numbers + R : nullptr, before);
    add_products<Q, kSteps>(values, weights, ahead, before);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) before[r][v] = scale_first(scales[v], before[r][v], set1i(numbers[r]));
    begin_at(kCentred ? numbers + 2 * R : nullptr, sums);
    add_products<Q, kSteps>(values + R * kInt4Group, weights + kSteps * kPanel * 4, ahead, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = scale_second(scales[v], sums[r][v], before[r][v]);
  }
}

// The scales of int8's columns, or the units of int4's.
template <int Q>
HG_INLINE vf scale_of(const char* panel, int column) {
  return Q == kInt8 ? load_bf16((const uint16_t*)panel + column) : load((const float*)panel + column);
}

// R rows, V vectors of columns from `first` of the panel on, where y points.
template <int Q, int R, int V>
void multiply_quantised(const char* x, const char* panel, Ahead ahead, const char* soon, int first,
                        int64_t blocks, float* y, int64_t y_stride, int64_t columns, const float* bias) {
  ask_for_outputs<R, V>(y, y_stride);
  const char* block = panel + panel_header(Q);
  vf totals[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) totals[r][v] = set1(0.0f);
  for (int64_t b = 0; b < blocks; ++b, block += block_bytes(Q), x += R * row_group_bytes(kFormatOf<Q>)) {
    vi sums[R][V];
    if (ahead.is_alone() && b == blocks - kBlocksAhead<Q, R>) ahead.address = soon;
    sum_block<Q>(x, block, first, ahead, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf scale = set1(((const float*)x)[r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) totals[r][v] = fma(to_float(sums[r][v]), scale, totals[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const vf scale = scale_of<Q>(panel, first + v * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) totals[r][v] = totals[r][v] * scale;
  }
  store_outputs<R, V>(totals, y, y_stride, columns, bias);
}

// All columns of one panel for R rows, V vectors of them at a time.
template <int Q, int R, int V>
HG_INLINE void multiply_in_passes(const char* x, const char* panel, Ahead ahead, const char* soon,
                                  int64_t blocks, float* y, int64_t y_stride, int64_t columns, const float* bias) {
  for (int first = 0; first < kPanel && first < columns; first += V * VL) {
    const Ahead part =
        ahead_of_pass(ahead, first / (V * VL), kPanel / (V * VL), blocks * kStepsOf<Q>);
    multiply_quantised<Q, R, V>(x, panel, part, soon, first, blocks, y + first, y_stride,
                                columns - first, bias ? bias + first : nullptr);
  }
}

template <int Q, int R>
void multiply_quantised_panel(const char* x, const char* panel, Ahead ahead, const char* soon,
                              int64_t blocks, float* y, int64_t y_stride, int64_t columns, const float* bias) {
  if constexpr (kOneVector<Q, R>)
    if (!ahead.is_alone() && !is_intel())
      return multiply_in_passes<Q, R, 1>(x, panel, ahead, soon, blocks, y, y_stride, columns, bias);
  multiply_in_passes<Q, R, kVectorsOf<R>>(x, panel, ahead, soon, blocks, y, y_stride, columns, bias);
}

using QuantisedPanel = void (*)(const char*, const char*, Ahead, const char*, int64_t, float*, int64_t,
                                int64_t, const float*);

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
  const int64_t blocks = block_count(job.inner, Q), size = panel_bytes(job.inner, Q);
  const int64_t panels = (job.columns + kPanel - 1) / kPanel;
  const int64_t count = tiles.last - tiles.first;
  const int64_t on = job.rows == 1 ? kBlocksAhead<Q, 1> : kBlocksAhead<Q, 2>;
  const int64_t lead = panel_header(Q) + on * block_bytes(Q);
  const Share share = share_of(size, block_header(Q), kPanel * 4, kStepsOf<Q>, count);
  const RowWalk from_first(job.rows, job.row_tiles, tiles.first);
  const Fetch alone = fetch_quantised_alone<Q>(job.rows);
  for (int64_t panel = first; panel < last; ++panel) {
    const char* weight = job.weight + panel * size;
    const int64_t column = panel * kPanel;
    const int64_t columns = job.columns - column < kPanel ? job.columns - column : kPanel;
    const char* soon = job.weight + panel_after(panel, last, later, panels) * size;
    RowWalk rows = from_first;
    for (int64_t tile = 0; tile < count; ++tile) {
      const RowRange range = rows.next();
      const Ahead ahead = ahead_of(weight, lead, soon, share, tile, alone);
      quantised_panel<Q>(range.last - range.first)(
          job.x + range.first * blocks * row_group_bytes(kFormatOf<Q>), weight, ahead, soon, blocks,
          job.y + range.first * job.y_stride + column, job.y_stride, columns,
          job.bias ? job.bias + column : nullptr);
    }
  }
}

}  // namespace
