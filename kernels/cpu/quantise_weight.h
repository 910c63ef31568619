// Quantises a weight matrix into blocks: to the bit what headgate/kernels/quantised.py does.
//
// Lanes are columns. Sums over a group's values are taken one value after the other, as there, and
// products are rounded before they are added; so vectors of any width give the same bits.
#pragma once

#include "dot4.h"
#include "quantised.h"

namespace {

using namespace headgate;

// int4: the ranges to start from, as the scale's part of a group's whole range, and how often values
// are chosen from each.
constexpr float kScaleParts[] = {(float)(1.0 / 15), (float)(0.85 / 15)};
constexpr int kFits = 2;
constexpr float kLeastSpread = 1e-30f;

typedef float GroupValues[kMaxGroup][kPanel];  // [k][column]

struct Scaling {
  vf scale, minimum;
};

// What int4 scales and minima of a column are whole numbers of, up to kMostUnits; that of minima is negative.
struct Units {
  vf scale, minimum;
};
constexpr float kMostUnits = 255.0f;

// One group of a column; what lies past the column's end is its last value.
HG_INLINE void load_values(const QuantiseWeightJob& job, int64_t column, int64_t k, int group,
                           float* values) {
  const int64_t at = column * job.inner + k, left = job.inner - k;
  const int n = left < group ? (int)left : group;
  const uint16_t* narrow = (const uint16_t*)job.weight + at;
  if (job.dtype == kFloat32) memcpy(values, (const float*)job.weight + at, sizeof(float) * n);
  else if (job.dtype == kBFloat16) widen_row<true>(narrow, values, n);
  else widen_row<false>(narrow, values, n);
  for (int i = n; i < group; ++i) values[i] = values[n - 1];
}

// One group of a panel; missing columns are zeros.
void load_group(const QuantiseWeightJob& job, int64_t column, int64_t k, int group, GroupValues& x) {
  for (int c = 0; c < kPanel; ++c) {
    float values[kMaxGroup] = {};
    if (column + c < job.columns) load_values(job, column + c, k, group, values);
    for (int i = 0; i < group; ++i) x[i][c] = values[i];
  }
}

// The largest of each column of a panel, over all of K.
void find_largest(const QuantiseWeightJob& job, int64_t column, float (&largest)[kPanel]) {
  for (int c = 0; c < kPanel; ++c) {
    vf most = set1(0.0f);
    for (int64_t k = 0; k < job.inner && column + c < job.columns; k += kInt8Group) {
      float values[kInt8Group];
      load_values(job, column + c, k, kInt8Group, values);
      for (int i = 0; i < kInt8Group; i += VL) most = vmax(most, vabs(load(values + i)));
    }
    largest[c] = max_lanes(most);
  }
}

// The largest power of two that is not above x; 1 for what is less than any normal one.
HG_INLINE float power_below(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0x7f800000;
  memcpy(&x, &bits, sizeof x);
  return bits ? x : 1.0f;
}

// The units of a panel's columns, of scales and of minima: the largest number of a column has 8 bits.
void find_units(const QuantiseWeightJob& job, int64_t column, float (&units)[2][kPanel]) {
  for (int c = 0; c < kPanel; ++c) {
    float widest = 0.0f, lowest = 0.0f;
    for (int64_t k = 0; k < job.inner && column + c < job.columns; k += kInt4Group) {
      float values[kInt4Group];
      load_values(job, column + c, k, kInt4Group, values);
      vf below = set1(0.0f), high = load(values);
      for (int i = 0; i < kInt4Group; i += VL) {
        below = vmax(below, set1(0.0f) - load(values + i));
        high = vmax(high, load(values + i));
      }
      const float low = -max_lanes(below), range = max_lanes(high) - low;
      widest = range > widest ? range : widest;
      lowest = low < lowest ? low : lowest;
    }
    units[0][c] = power_below(widest * kScaleParts[0]) / 128.0f;
    units[1][c] = power_below(-lowest) / -128.0f;
  }
}

HG_INLINE vf in_units(vf x, vf unit, float least) {
  return vmin(vmax(round_even(x / unit), set1(least)), set1(kMostUnits)) * unit;
}

HG_INLINE vf positive_or_one(vf scale) {
  return if_less(set1(0.0f), scale, scale, set1(1.0f));
}

HG_INLINE vf chosen_value(vf x, Scaling by, float low, float high) {
  return round_even(vmin(vmax((x - by.minimum) / by.scale, set1(low)), set1(high)));
}

HG_INLINE Scaling by_largest(vf most) {
  return {positive_or_one(round_bf16(most / set1(127.0f))), set1(0.0f)};
}

HG_INLINE Scaling fit_symmetric(const GroupValues& x, int first, int group) {
  vf most = set1(0.0f);
  for (int k = 0; k < group; ++k) most = vmax(most, vabs(load(x[k] + first)));
  return by_largest(most);
}

// The line through `values` fitted to x by linear regression, `mean` of x.
HG_INLINE Scaling fit_line(const GroupValues& x, int first, const vf (&values)[kInt4Group], vf mean) {
  vf total = values[0];
  for (int k = 1; k < kInt4Group; ++k) total = total + values[k];
  const vf middle = total / set1((float)kInt4Group);
  vf spread = (values[0] - middle) * (values[0] - middle);
  vf shared = values[0] * (load(x[0] + first) - mean);
  for (int k = 1; k < kInt4Group; ++k) {
    const vf apart = values[k] - middle;
    spread = spread + apart * apart;
    shared = shared + values[k] * (load(x[k] + first) - mean);
  }
  const vf scale = shared / vmax(spread, set1(kLeastSpread));
  return {scale, mean - scale * middle};
}

// The least squared error found: from each range, by its values, then by the line through them.
HG_INLINE Scaling fit_offset(const GroupValues& x, int first, Units units) {
  vf low = load(x[0] + first), high = low, total = low;
  for (int k = 1; k < kInt4Group; ++k) {
    const vf value = load(x[k] + first);
    low = vmin(low, value);
    high = vmax(high, value);
    total = total + value;
  }
  low = vmin(low, set1(0.0f));
  const vf mean = total / set1((float)kInt4Group);
  Scaling best = {};
  vf least = set1(__builtin_inff());
  for (const float part : kScaleParts) {
    Scaling now;
    now.scale = (high - low) * set1(part);
    now.minimum = (low + high) / set1(2.0f) - set1(7.5f) * now.scale;
    for (int fit = 0; fit < kFits; ++fit) {
      now.scale = in_units(now.scale, units.scale, 1.0f);
      now.minimum = in_units(now.minimum, units.minimum, 0.0f);
      vf values[kInt4Group], error = set1(0.0f);
      for (int k = 0; k < kInt4Group; ++k) {
        const vf value = load(x[k] + first);
        values[k] = chosen_value(value, now, 0.0f, 15.0f);
        const vf off = values[k] * now.scale + now.minimum - value;
        error = error + off * off;
      }
      best.scale = if_less(error, least, now.scale, best.scale);
      best.minimum = if_less(error, least, now.minimum, best.minimum);
      least = vmin(error, least);
      if (fit + 1 < kFits) now = fit_line(x, first, values, mean);
    }
  }
  return best;
}

HG_INLINE void store_scales(vf values, uint16_t* to) {
  uint32_t bits[VL];
  memcpy(bits, &values, sizeof bits);
  for (int i = 0; i < VL; ++i) to[i] = (uint16_t)(bits[i] >> 16);
}

// Whole numbers, of a vector, as bytes.
HG_INLINE void store_numbers(vf values, char* to) {
  const vi numbers = to_int(values);
  int32_t lane[VL];
  memcpy(lane, &numbers, sizeof lane);
  for (int i = 0; i < VL; ++i) to[i] = (char)lane[i];
}

// One vector of columns of a block of values [group][kPanel], signed bytes.
HG_INLINE void store_bytes(const GroupValues& x, int first, Scaling by, char* values) {
  for (int k = 0; k < kWeightOnlyGroup; ++k)
    store_numbers(chosen_value(load(x[k] + first), by, -127.0f, 127.0f), values + k * kPanel + first);
}

// The same of int8 and int4.
template <int Q>
HG_INLINE void store_words(const GroupValues& x, int first, Scaling by, char* values) {
  constexpr int kShared = Q == kInt4 ? 8 : 4;  // values in 32 bits
  const float low = Q == kInt4 ? 0.0f : -127.0f, high = Q == kInt4 ? 15.0f : 127.0f;
  for (int k = 0; k < group_size(Q); k += kShared) {
    vi word = set1i(Q == kInt4 ? 0 : (int)0x80808080u);
    for (int i = 0; i < kShared; ++i) {
      const vi value = to_int(chosen_value(load(x[k + i] + first), by, low, high));
      // Bytes of int8 are value + 128, so adding to the word carries as it should.
      word = add_int(word, shift_left(value, i % 4 * 8 + i / 4 * 4));
    }
    store((float*)values + k / kShared * kPanel + first, as_float(word));
  }
}

// One vector of columns of a block: its scales (and minima), unless the columns have theirs, and its values.
template <int Q>
HG_INLINE void store_block(const GroupValues& x, int first, const float (&largest)[kPanel],
                           const float (&units)[2][kPanel], char* block) {
  char* values = block + block_header(Q);
  if constexpr (Q == kInt8) {
    store_words<Q>(x, first, by_largest(load(largest + first)), values);
  } else if constexpr (Q == kInt4) {
    const Units unit = {load(units[0] + first), load(units[1] + first)};
    const Scaling by = fit_offset(x, first, unit);
    store_numbers(by.scale / unit.scale, block + first);
    store_numbers(by.minimum / unit.minimum, block + kPanel + first);
    store_words<Q>(x, first, by, values);
  } else {
    const Scaling by = fit_symmetric(x, first, group_size(Q));
    store_scales(by.scale, (uint16_t*)block + first);
    store_bytes(x, first, by, values);
  }
}

template <int Q>
void quantise_panel(const QuantiseWeightJob& job, int64_t panel) {
  char* packed = job.packed + panel * panel_bytes(job.inner, Q);
  float largest[kPanel], units[2][kPanel];
  if (Q == kInt8) {
    find_largest(job, panel * kPanel, largest);
    for (int first = 0; first < kPanel; first += VL)
      store_scales(by_largest(load(largest + first)).scale, (uint16_t*)packed + first);
  }
  if (Q == kInt4) {
    find_units(job, panel * kPanel, units);
    memcpy(packed, units, sizeof units);
  }
  char* block = packed + panel_header(Q);
  for (int64_t k = 0; k < job.inner; k += group_size(Q), block += block_bytes(Q)) {
    GroupValues x __attribute__((aligned(64)));
    load_group(job, panel * kPanel, k, group_size(Q), x);
    for (int first = 0; first < kPanel; first += VL) store_block<Q>(x, first, largest, units, block);
  }
}

// Tile: a panel.
void quantise_weight_tile(const void* data, int64_t tile) {
  const QuantiseWeightJob& job = *(const QuantiseWeightJob*)data;
  if (job.kind == kInt4) quantise_panel<kInt4>(job, tile);
  else if (job.kind == kInt8) quantise_panel<kInt8>(job, tile);
  else quantise_panel<kInt8WeightOnly>(job, tile);
}

}  // namespace
