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

typedef float Values[kPanel];  // of a k, by column

struct Scaling {
  vf scale, minimum;
};

// Values of a column from k on; what lies past the column's end is its last value.
HG_INLINE void load_values(const QuantiseWeightJob& job, int64_t column, int64_t k, int count,
                           float* values) {
  const int64_t at = column * job.inner + k, left = job.inner - k;
  const int n = left < count ? (int)left : count;
  const uint16_t* narrow = (const uint16_t*)job.weight + at;
  if (job.dtype == kFloat32) memcpy(values, (const float*)job.weight + at, sizeof(float) * n);
  else if (job.dtype == kBFloat16) widen_row<true>(narrow, values, n);
  else widen_row<false>(narrow, values, n);
  for (int i = n; i < count; ++i) values[i] = values[n - 1];
}

// One block of a panel; missing columns are zeros.
template <int SIZE>
void load_block(const QuantiseWeightJob& job, int64_t column, int64_t k, Values (&x)[SIZE]) {
  for (int c = 0; c < kPanel; ++c) {
    float values[SIZE] = {};
    if (column + c < job.columns) load_values(job, column + c, k, SIZE, values);
    for (int i = 0; i < SIZE; ++i) x[i][c] = values[i];
  }
}

// The largest of each column of a panel, over all of K.
void find_largest(const QuantiseWeightJob& job, int64_t column, Values& largest) {
  for (int c = 0; c < kPanel; ++c) {
    vf most = set1(0.0f);
    for (int64_t k = 0; k < job.inner && column + c < job.columns; k += kInputGroup) {
      float values[kInputGroup];
      load_values(job, column + c, k, kInputGroup, values);
      for (int i = 0; i < kInputGroup; i += VL) most = vmax(most, vabs(load(values + i)));
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

// The units of a panel's columns: the largest number of a column, of scales or of minima, has 8 bits.
void find_units(const QuantiseWeightJob& job, int64_t column, Values& units) {
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
    const float scale = widest * kScaleParts[0], minimum = lowest / -kUnitsOfMinimum;
    units[c] = power_below(scale > minimum ? scale : minimum) / 128.0f;
  }
}

HG_INLINE vf in_units(vf x, vf unit, float least) {
  return vmin(vmax(round_even(x / unit), set1(least)), set1((float)kMostUnits)) * unit;
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

HG_INLINE Scaling fit_symmetric(const Values* x, int first) {
  vf most = set1(0.0f);
  for (int k = 0; k < kWeightOnlyGroup; ++k) most = vmax(most, vabs(load(x[k] + first)));
  return by_largest(most);
}

// The line through `values` fitted to x by linear regression, `mean` of x.
HG_INLINE Scaling fit_line(const Values* x, int first, const vf (&values)[kInt4Group], vf mean) {
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
HG_INLINE Scaling fit_offset(const Values* x, int first, vf unit, vf minimum_unit) {
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
      now.scale = in_units(now.scale, unit, 1.0f);
      now.minimum = in_units(now.minimum, minimum_unit, 0.0f);
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

// Whole numbers, of a vector, as bytes; `stride` bytes from one to the next.
HG_INLINE void store_numbers(vf values, int stride, char* to) {
  const vi numbers = to_int(values);
  int32_t lane[VL];
  memcpy(lane, &numbers, sizeof lane);
  for (int i = 0; i < VL; ++i) to[i * stride] = (char)lane[i];
}

// One vector of columns of a block of values [block][kPanel], signed bytes.
HG_INLINE void store_bytes(const Values* x, int first, Scaling by, char* values) {
  for (int k = 0; k < kWeightOnlyGroup; ++k)
    store_numbers(chosen_value(load(x[k] + first), by, -127.0f, 127.0f), 1, values + k * kPanel + first);
}

// The same of int8 and int4, of so many values.
template <int Q, int SIZE>
HG_INLINE void store_words(const Values* x, int first, Scaling by, char* values) {
  constexpr int kShared = Q == kInt4 ? 8 : 4;  // values in 32 bits
  const float low = Q == kInt4 ? 0.0f : -127.0f, high = Q == kInt4 ? 15.0f : 127.0f;
  for (int k = 0; k < SIZE; k += kShared) {
    vi word = set1i(Q == kInt4 ? 0 : (int)0x80808080u);
    for (int i = 0; i < kShared; ++i) {
      const vi value = to_int(chosen_value(load(x[k + i] + first), by, low, high));
      // Bytes of int8 are value + 128, so adding to the word carries as it should.
      word = add_int(word, shift_left(value, i % 4 * 8 + i / 4 * 4));
    }
    store((float*)values + k / kShared * kPanel + first, as_float(word));
  }
}

// One vector of columns of a block of int4: the groups' scales and minima, and their values.
HG_INLINE void store_groups(const Values* x, int first, vf unit, char* block) {
  const vf minimum_unit = unit * set1((float)-kUnitsOfMinimum);
  char* minima = block + kPanel * 2;
  char* values = block + block_header(kInt4);
  for (int group = 0; group < kInputGroup / kInt4Group; ++group) {
    const Values* of_group = x + group * kInt4Group;
    const Scaling by = fit_offset(of_group, first, unit, minimum_unit);
    store_numbers(by.scale / unit, 2, block + first * 2 + group);
    store_numbers(by.minimum / minimum_unit, 2, minima + first * 2 + group);
    store_words<kInt4, kInt4Group>(of_group, first, by, values + group * kPanel * kInt4Group / 2);
  }
}

// One vector of columns of a block. `of_columns`: int8's largest values, int4's units.
template <int Q>
HG_INLINE void store_block(const Values* x, int first, const Values& of_columns, char* block) {
  if constexpr (Q == kInt8) {
    store_words<Q, kInputGroup>(x, first, by_largest(load(of_columns + first)), block);
  } else if constexpr (Q == kInt4) {
    store_groups(x, first, load(of_columns + first), block);
  } else {
    const Scaling by = fit_symmetric(x, first);
    store_scales(by.scale, (uint16_t*)block + first);
    store_bytes(x, first, by, block + block_header(Q));
  }
}

template <int Q>
void quantise_panel(const QuantiseWeightJob& job, int64_t panel) {
  char* packed = job.packed + panel * panel_bytes(job.inner, Q);
  Values of_columns;
  if (Q == kInt8) {
    find_largest(job, panel * kPanel, of_columns);
    for (int first = 0; first < kPanel; first += VL)
      store_scales(by_largest(load(of_columns + first)).scale, (uint16_t*)packed + first);
  }
  if (Q == kInt4) {
    find_units(job, panel * kPanel, of_columns);
    memcpy(packed, of_columns, sizeof of_columns);
  }
  char* block = packed + panel_header(Q);
  for (int64_t k = 0; k < job.inner; k += block_size(Q), block += block_bytes(Q)) {
    Values x[block_size(Q)] __attribute__((aligned(64)));
    load_block(job, panel * kPanel, k, x);
    for (int first = 0; first < kPanel; first += VL) store_block<Q>(x, first, of_columns, block);
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
