// The largest of each row's products with a vocabulary, from products with quantised weights and a
// bound on what these are wrong by.
//
// With w = v + e, where v is what int8 stores of a column w, and likewise x = u + d for a row,
//   w.x = v.u + e.u + w.d, so |w.x - v.u| <= |e| |u| + |w| |d|  (Cauchy and Schwarz).
// One column whose approximate product v.u is the largest gets the exact one, with the bits that
// linear.h gives it. Ranks that have a part of the columns each tell each other theirs. Where another's
// approximate product and its bound together stay below the largest of those, it is
// not the largest. The few that are left, the shortlist, get theirs exactly too; all others stay
// approximate, and smaller than the largest. So the largest is exact, the first of equals too, and an
// input or weight that is not a number makes its bounds so, and puts what it touches on the shortlist.
#pragma once

#include "bf16_pairs.h"
#include "quantise_rows.h"

namespace {

using namespace headgate;

// Exact products worked out side by side, and inputs of them that are rounded at once.
constexpr int kChains = 8;
constexpr int kChainInputs = 512;
// More than any rounding of the bounds themselves.
constexpr float kBoundMargin = 1.001f;
// Rows with squares that sum to less may have parts whose squares are lost.
constexpr float kLeastSquares = 1e-20f;

// What a column's |e| and |w| are to be multiplied with.
struct BoundFactors {
  float of_error, of_weights;
};

// A group of a row, filled up with zeros.
HG_INLINE void copy_group(const float* x, int n, float* to) {
  memcpy(to, x, sizeof(float) * n);
  for (int i = n; i < kInputGroup; ++i) to[i] = 0.0f;
}

// Of a row as quantise_rows stores it. Products are float32 sums: the rounding of those, approximate and
// exact, is at most inner + groups and some more times 2^-24 |w| |x|.
BoundFactors bound_factors(const ShortlistJob& job, const float* x) {
  vf stored = set1(0.0f), missed = set1(0.0f), whole = set1(0.0f);
  for (int64_t first = 0; first < job.inner; first += kInputGroup) {
    const int64_t left = job.inner - first;
    alignas(64) float group[kInputGroup];
    copy_group(x + first, left < kInputGroup ? (int)left : kInputGroup, group);
    vf inverses;
    alignas(64) float scale[VL], inverse[VL];
    store(scale, find_scales(group, kInputGroup, 1, &inverses));
    store(inverse, inverses);
    for (int i = 0; i < kInputGroup; i += VL) {
      const vf given = load(group + i), value = job.rounded ? round_bf16(given) : given;
      const vf kept = to_float(round_to_int(given * set1(inverse[0]))) * set1(scale[0]);
      const vf error = value - kept;
      stored = fma(kept, kept, stored);
      missed = fma(error, error, missed);
      whole = fma(value, value, whole);
    }
  }
  const float squares = sum_lanes(whole);
  if (!(squares >= kLeastSquares)) return {__builtin_nanf(""), __builtin_nanf("")};
  const float rounding = (float)(2 * (job.inner + kInputGroup)) * 0x1p-24f * __builtin_sqrtf(squares);
  return {kBoundMargin * __builtin_sqrtf(sum_lanes(stored)),
          kBoundMargin * (__builtin_sqrtf(sum_lanes(missed)) + rounding)};
}

// What the columns with such lengths are wrong by at most.
HG_INLINE float bound(const BoundFactors& factors, float error, float norm) {
  return error * factors.of_error + norm * factors.of_weights;
}

// The first of the largest products that are numbers; -1 where there is none.
int64_t first_largest(const float* y, int64_t columns) {
  vf best = set1(-__builtin_inff());
  int64_t j = 0;
  for (; j + VL <= columns; j += VL) best = vmax(load(y + j), best);
  float most = max_lanes(best);
  for (; j < columns; ++j) most = y[j] > most ? y[j] : most;
  for (j = 0; j + VL <= columns && all_less(load(y + j), set1(most)); j += VL) {}
  while (j < columns && y[j] != most) ++j;
  return j < columns ? j : -1;
}

// The products of x with the columns: each one chain of multiply-adds over k, as in linear.h.
void exact_products(const ShortlistJob& job, const float* x, const int64_t* columns, int count,
                    float* y) {
  const uint16_t* rows[kChains];
  float sums[kChains] = {};
  for (int c = 0; c < kChains; ++c) rows[c] = job.table + columns[c < count ? c : 0] * job.inner;
  for (int64_t first = 0; first < job.inner; first += kChainInputs) {
    const int64_t left = job.inner - first;
    const int n = left < kChainInputs ? (int)left : kChainInputs;
    alignas(64) float inputs[kChainInputs];
    for (int i = 0; i < n; i += VL) {
      const int lanes = n - i < VL ? n - i : VL;
      const vf value = lanes < VL ? load_n(x + first + i, lanes) : load(x + first + i);
      store(inputs + i, job.rounded ? round_bf16(value) : value);
    }
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const uint32_t bits = (uint32_t)rows[c][first + i] << 16;
        float weight;
        memcpy(&weight, &bits, sizeof weight);
        sums[c] = fma_lane(inputs[i], weight, sums[c]);
      }
  }
  for (int c = 0; c < count; ++c) y[columns[c]] = sums[c];
}

// Columns of a row that are to be worked out exactly, until there are as many as that is done for at once.
struct Shortlist {
  const ShortlistJob& job;
  const float* x;
  float* y;
  float largest;  // of the exact products so far
  int count;
  int64_t columns[kChains];

  void add(int64_t column) {
    columns[count++] = column;
    if (count == kChains) work_out();
  }
  void work_out() {
    exact_products(job, x, columns, count, y);
    for (int c = 0; c < count; ++c) largest = y[columns[c]] > largest ? y[columns[c]] : largest;
    count = 0;
  }
};

// Whether a column of the panel may have the largest product.
HG_INLINE bool is_open(const ShortlistJob& job, const BoundFactors& factors, int64_t panel,
                       float largest, const float* y) {
  const vf most = set1(bound(factors, job.panel_errors[panel], job.panel_norms[panel]));
  for (int v = 0; v < kPanel; v += VL)
    if (!all_less(load(y + v) + most, set1(largest))) return true;
  return false;
}

// Tile: a row.
void likeliest_tile(const void* data, int64_t row) {
  const ShortlistJob& job = *(const ShortlistJob*)data;
  float* y = job.y + row * job.y_stride;
  float* known = job.known + row * job.ranks;
  for (int rank = 0; rank < job.ranks; ++rank) known[rank] = 0.0f;
  known[job.rank] = -__builtin_inff();
  const int64_t likeliest = first_largest(y, job.columns);
  if (likeliest < 0) return;
  exact_products(job, job.x + row * job.x_stride, &likeliest, 1, y);
  known[job.rank] = y[likeliest];
}

// Tile: a row.
void shortlist_tile(const void* data, int64_t row) {
  const ShortlistJob& job = *(const ShortlistJob*)data;
  float* y = job.y + row * job.y_stride;
  const float* known = job.known + row * job.ranks;
  float largest = -__builtin_inff();
  for (int rank = 0; rank < job.ranks; ++rank)
    largest = known[rank] > largest ? known[rank] : largest;
  Shortlist list = {job, job.x + row * job.x_stride, y, largest, 0, {}};
  const BoundFactors factors = bound_factors(job, list.x);
  for (int64_t start = 0; start < job.columns; start += kPanel) {
    const int64_t end = start + kPanel < job.columns ? start + kPanel : job.columns;
    if (end - start == kPanel && !is_open(job, factors, start / kPanel, list.largest, y + start))
      continue;
    for (int64_t j = start; j < end; ++j)
      // What is not a number is not less.
      if (!(y[j] + bound(factors, job.errors[j], job.norms[j]) < list.largest)) list.add(j);
  }
  if (list.count) list.work_out();
}

// What is not a number counts as the largest.
HG_INLINE float larger(float a, float b) { return a != a || a > b ? a : b; }

// Tile: a panel. Of each column the lengths |w| and |e|, a little above what they are; and the largest
// of each in the panel.
void column_lengths_tile(const void* data, int64_t panel) {
  const ColumnLengthsJob& job = *(const ColumnLengthsJob*)data;
  const char* packed = job.packed + panel * panel_bytes(job.inner, kInt8);
  const uint8_t* values = (const uint8_t*)packed + panel_header(kInt8);
  float& largest_norm = job.panel_norms[panel] = 0.0f;
  float& largest_error = job.panel_errors[panel] = 0.0f;
  for (int lane = 0; lane < kPanel; ++lane) {
    const int64_t column = panel * kPanel + lane;
    if (column >= job.columns) return;
    const uint32_t scale_bits = (uint32_t)((const uint16_t*)packed)[lane] << 16;
    float scale;
    memcpy(&scale, &scale_bits, sizeof scale);
    double errors = 0.0, squares = 0.0;
    for (int64_t k = 0; k < job.inner; ++k) {
      const uint32_t bits = (uint32_t)job.table[column * job.inner + k] << 16;
      float weight;
      memcpy(&weight, &bits, sizeof weight);
      const double stored = (double)scale * (values[k / 4 * kPanel * 4 + lane * 4 + k % 4] - 128);
      errors += (weight - stored) * (weight - stored);
      squares += (double)weight * weight;
    }
    job.errors[column] = (float)__builtin_sqrt(errors) * kBoundMargin + __FLT_MIN__;
    job.norms[column] = (float)__builtin_sqrt(squares) * kBoundMargin + __FLT_MIN__;
    largest_error = larger(largest_error, job.errors[column]);
    largest_norm = larger(largest_norm, job.norms[column]);
  }
}

}  // namespace
