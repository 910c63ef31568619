// Weights in the panels that linear.h describes.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace headgate {

// weight[columns, inner] in `dtype`.
struct PackWeightJob {
  const void* weight;
  void* packed;
  int64_t columns, inner;
  int32_t dtype;
};

// Values of a row that are moved at once: what they become, of all rows of a panel, stays in the
// first-level cache until it is whole.
constexpr int64_t kPackedTogether = 64;

// panel[at][row] = value(row, at) for `count` places of a row; rows that are missing are zeros.
template <class Item, class Value>
void pack_panel(Item* panel, int64_t rows, int64_t count, const Value& value) {
  for (int64_t first = 0; first < count; first += kPackedTogether) {
    const int64_t last = first + kPackedTogether < count ? first + kPackedTogether : count;
    for (int64_t row = 0; row < kPanel; ++row)
      for (int64_t at = first; at < last; ++at)
        panel[at * kPanel + row] = row < rows ? value(row, at) : Item(0);
  }
}

// Tile: one panel.
static inline void pack_weight_tile(const void* data, int64_t panel) {
  const PackWeightJob& job = *static_cast<const PackWeightJob*>(data);
  const int64_t first = panel * kPanel, inner = job.inner;
  const int64_t rows = job.columns - first < kPanel ? job.columns - first : kPanel;
  const auto pack = [&](auto item, int64_t count, const auto& value) {
    using Item = decltype(item);
    pack_panel(static_cast<Item*>(job.packed) + first * count, rows, count, value);
  };
  if (job.dtype == kFloat32) {
    const uint32_t* from = static_cast<const uint32_t*>(job.weight) + first * inner;
    pack(uint32_t(), inner, [=](int64_t row, int64_t k) { return from[row * inner + k]; });
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(job.weight) + first * inner;
  if (job.dtype == kFloat16) {
    pack(uint16_t(), inner, [=](int64_t row, int64_t k) { return from[row * inner + k]; });
    return;
  }
  pack(uint32_t(), (inner + 1) / 2, [=](int64_t row, int64_t pair) {
    const uint16_t* both = from + row * inner + 2 * pair;
    const uint32_t second = 2 * pair + 1 < inner ? both[1] : 0;
    return uint32_t(both[0]) << 16 | second;
  });
}

}  // namespace headgate
