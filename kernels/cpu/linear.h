// y = x w^T + bias in float32 arithmetic, with weights in float32, bfloat16 or float16.
//
// Each output is one chain of fused multiply-adds over k in ascending order, whatever the number of
// rows, the tile, the number of threads or the width of the vectors: bit-identical in any batch.
// A product of pairs (bf16_pairs.h) is two links of such a chain.
//
// Packed weights: panels of kPanel output columns. float32 and float16: [K][kPanel]. bfloat16: two k's
// share a 32-bit lane, [K/2][kPanel][2], the second one first, so that one mask and one shift widen
// them, without a shuffle; an odd K is padded with zeros. Missing columns are zeros.
#pragma once

#include "ahead.h"
#include "bf16_pairs.h"

namespace {

using namespace headgate;

// Rows and vectors of the inner loop: their product of sums stays in registers.
constexpr int kTileRows = VL == 16 ? 12 : 6;
constexpr int kPanelVectors = kPanel / VL;
// Inputs and weights of so many k's are used while they are in the second-level cache, and the inputs of a
// tile in the first-level one, which is smaller where there is no AVX-512. A sum leaves
// and enters registers between two such blocks unrounded: the chain stays one.
constexpr int64_t kInnerBlock = VL == 16 ? 1536 : 288;
// How far ahead of its use a weight is asked for where one row tile takes them all, in bytes.
constexpr int64_t kLead = 6144;

// (Measured on Zen 4: several rows take less by way of the second-level cache, one takes more.)
HG_INLINE Fetch fetch_floats_alone(int64_t rows) {
  return fetch_alone(VL == 16 && rows > 1 ? kSecondLevel : kPassingBy);
}

template <int T>
constexpr int kElement = T == kFloat32 ? 4 : 2;
// k's that share a lane of weights, and how many 32-bit numbers of one row meet them.
template <int T>
constexpr int kStep = T == kBFloat16 || T == kRoundedPairs ? 2 : 1;
template <int T>
constexpr int kInputs = T == kBFloat16 ? 2 : 1;

template <int T>
HG_INLINE const char* weight_at(const char* panel, int64_t k) {
  return panel + k * kPanel * kElement<T>;
}

// sums[r][v] += x[k][r] * w[k][v] for the k's of one step.
template <int T, int R, int V>
HG_INLINE void step(const float* x, const char* w, bool both, vf (&sums)[R][V]) {
#if defined(__AVX512F__)
  if constexpr (T == kRoundedPairs) {
    vi pairs[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) pairs[v] = load_int(w + v * VL * 4);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vi a = as_int(set1(x[r]));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = dot2(sums[r][v], pairs[v], a);
    }
    return;
  }
#endif
  vf values[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if constexpr (T == kFloat32) values[v] = load((const float*)w + v * VL);
    else if constexpr (T == kFloat16) values[v] = load_f16((const uint16_t*)w + v * VL);
    else values[v] = widen_high(load_int(w + v * VL * 4));
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    vf a = set1(x[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) add_product(sums[r][v], a, values[v]);
  }
  if constexpr (T == kBFloat16) {
    if (!both) return;
    if constexpr (VL != 16) __asm__("" : "+r"(w));  // to be loaded anew: there are no registers for both halves
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = widen_low(load_int(w + v * VL * 4));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      vf a = set1(x[R + r]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) add_product(sums[r][v], a, values[v]);
    }
  }
}

// One block of k's for R rows and V vectors of columns. x[k][R]; y points at the first column.
template <int T, int R, int V>
void multiply(const float* x, const char* w, Ahead ahead, const char* soon, int64_t inner, float* y,
              int64_t y_stride, int64_t columns, bool resume) {
  vf sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * VL;
      if (!resume || left <= 0) sums[r][v] = set1(0.0f);
      else if (left >= VL) sums[r][v] = load(y + r * y_stride + v * VL);
      else sums[r][v] = load_n(y + r * y_stride + v * VL, (int)left);
    }
  }
  constexpr int kLane = kStep<T> * kElement<T>;
  const int64_t turn = ahead.is_alone() ? (inner / kStep<T> - kLead / (kPanel * kLane)) * kStep<T> : inner;
  int64_t k = 0;
  for (; k + kStep<T> <= inner; k += kStep<T>) {
    if (k == turn) ahead.address = soon;
    ask_for<kPanel * kLane, kPanelVectors / V>(ahead);
    step<T, R, V>(x, w, true, sums);
    x += kInputs<T> * R;
    w += kPanel * kLane;
  }
  if (k < inner) step<T, R, V>(x, w, false, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * VL;
      if (left >= VL) store(y + r * y_stride + v * VL, sums[r][v]);
      else if (left > 0) store_n(y + r * y_stride + v * VL, sums[r][v], (int)left);
    }
  }
}

// All columns of one panel for R rows and one block of k's.
template <int T, int R>
void multiply_panel(const float* x, const char* w, Ahead ahead, const char* soon, int64_t inner, float* y,
                    int64_t y_stride, int64_t columns, bool resume) {
  // As many vectors as the registers hold sums for.
  constexpr int kMost = VL == 16 ? 2 : (R <= 3 ? 4 : 2);
  constexpr int V = kMost < kPanelVectors ? kMost : kPanelVectors;
  constexpr int kLane = kStep<T> * kElement<T>;
  for (int v = 0; v < kPanelVectors && v * VL < columns; v += V) {
    const Ahead part = ahead_of_pass(ahead, v / V, kPanelVectors / V, inner / kStep<T>);
    multiply<T, R, V>(x, w + v * VL * kLane, part, soon, inner, y + v * VL, y_stride, columns - v * VL,
                      resume);
  }
}

using PanelFunction = void (*)(const float*, const char*, Ahead, const char*, int64_t, float*, int64_t,
                              int64_t, bool);

template <int T>
PanelFunction panel_function(int64_t rows) {
  static const PanelFunction table[] = {
      multiply_panel<T, 1>, multiply_panel<T, 2>, multiply_panel<T, 3>,
      multiply_panel<T, 4>, multiply_panel<T, 5>, multiply_panel<T, 6>,
#if defined(__AVX512F__)
      multiply_panel<T, 7>, multiply_panel<T, 8>, multiply_panel<T, 9>,
      multiply_panel<T, 10>, multiply_panel<T, 11>, multiply_panel<T, 12>,
#endif
  };
  static_assert(sizeof table / sizeof *table == kTileRows, "one function for each height");
  return table[rows - 1];
}

void add_bias(float* y, int64_t y_stride, int64_t rows, const float* bias, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) y[r * y_stride + c] += bias[c];
}

template <int T>
void linear_typed(const LinearJob& job, int64_t panel_first, int64_t panel_last, int64_t later,
                  RowRange tiles) {
  const int64_t padded = (job.inner + kStep<T> - 1) / kStep<T> * kStep<T>;
  const int64_t panel_bytes = padded * kPanel * kElement<T>;
  // 32-bit numbers of a packed row, and for one k.
  constexpr int kShared = kStep<T> / kInputs<T>;
  const int64_t row = T == kRoundedPairs ? padded / kShared : job.inner;
  const int64_t panels = (job.columns + kPanel - 1) / kPanel, count = tiles.last - tiles.first;
  const RowWalk from_first(job.rows, job.row_tiles, tiles.first);
  const Fetch alone = fetch_floats_alone(job.rows);
  for (int64_t panel = panel_first; panel < panel_last; ++panel) {
    const char* weight = (const char*)job.weight + panel * panel_bytes;
    const int64_t next = panel_after(panel, panel_last, later, panels);
    const char* after = (const char*)job.weight + next * panel_bytes;
    const int64_t column = panel * kPanel;
    const int64_t columns = job.columns - column < kPanel ? job.columns - column : kPanel;
    for (int64_t k = 0; k < job.inner; k += kInnerBlock) {
      const int64_t inner = job.inner - k < kInnerBlock ? job.inner - k : kInnerBlock;
      const char* weights = weight_at<T>(weight, k);
      const int64_t size = weight_at<T>(weight, k + inner) - weights;
      const Share share = share_of(size, 0, kStep<T> * kPanel * kElement<T>, 1, count);
      // Several tiles ask for the same part of the panel after, one for what it reads next.
      const char* soon = weight_at<T>(after, k);
      if (share.is_all) soon = k + inner < job.inner ? weights + size : after;
      RowWalk rows = from_first;
      for (int64_t tile = 0; tile < count; ++tile) {
        const RowRange range = rows.next();
        const int64_t height = range.last - range.first;
        const Ahead ahead = ahead_of(weights, kLead, soon, share, tile, alone);
        panel_function<T>(height)(job.x + range.first * row + k / kShared * height, weights, ahead, soon,
                                  inner, job.y + range.first * job.y_stride + column, job.y_stride,
                                  columns, k > 0);
      }
    }
    if (job.bias) {
      const int64_t first = row_range(job.rows, job.row_tiles, tiles.first).first;
      const int64_t last = row_range(job.rows, job.row_tiles, tiles.last - 1).last;
      add_bias(job.y + first * job.y_stride + column, job.y_stride, last - first,
               job.bias + column, columns);
    }
  }
}

// Tile: a run of panels for one group of row tiles.
void linear_tile(const void* data, int64_t tile) {
  const LinearJob& job = *(const LinearJob*)data;
  const int64_t panels = (job.columns + kPanel - 1) / kPanel;
  const int64_t panel_tile = tile % job.panel_tiles, first = panel_tile * job.panels_per_tile;
  const int64_t last = first + job.panels_per_tile < panels ? first + job.panels_per_tile : panels;
  const RowRange tiles = row_range(job.row_tiles, job.row_groups, tile / job.panel_tiles);
  const int64_t later = (panel_tile + job.sharing) * job.panels_per_tile;
#if defined(__AVX512F__)
  if (job.product == kRoundedPairs)
    return linear_typed<kRoundedPairs>(job, first, last, later, tiles);
#endif
  if (job.product == kBFloat16) linear_typed<kBFloat16>(job, first, last, later, tiles);
  else if (job.product == kFloat16) linear_typed<kFloat16>(job, first, last, later, tiles);
  else linear_typed<kFloat32>(job, first, last, later, tiles);
}

}  // namespace
