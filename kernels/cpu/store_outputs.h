// The end of a product: the bias is added and what lies within the matrix is stored.
#pragma once

#include "simd.h"

namespace {

// Has what store_outputs will write fetched meanwhile: another core may have it.
template <int R, int V>
HG_INLINE void ask_for_outputs(float* y, int64_t y_stride) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V * VL; i += 16) __builtin_prefetch(y + r * y_stride + i, 1, 3);
}

// totals[r][v] + bias to y, whose first of `columns` columns it points at.
template <int R, int V>
HG_INLINE void store_outputs(const vf (&totals)[R][V], float* y, int64_t y_stride, int64_t columns,
                             const float* bias) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int64_t left = columns - v * VL;
    if (left <= 0) break;
    const int n = left < VL ? (int)left : VL;
    vf b = set1(0.0f);
    if (bias) b = n == VL ? load(bias + v * VL) : load_n(bias + v * VL, n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf total = bias ? totals[r][v] + b : totals[r][v];
      if (n == VL) store(y + r * y_stride + v * VL, total);
      else store_n(y + r * y_stride + v * VL, total, n);
    }
  }
}

}  // namespace
