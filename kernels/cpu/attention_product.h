// How keys and values of each kind are read and multiplied. T: the job's `product`.
#pragma once

#include <type_traits>

#include "attention_tile.h"
#include "byte_dots.h"

namespace {

using namespace headgate;

// Keys whose values are read together, and how many of them share a lane of weights.
template <int T>
constexpr int kKeyStep = in_bytes(T) ? 4 : in_pairs(T) ? 2 : 1;

// Rows of the inner products: halves of pairs that are multiplied apart take registers of their own.
template <int T>
constexpr int kRowsOf = T == kRounded ? 4 : kRows;

// Eight lanes of each of VL keys: vector i of eight (see load_lanes in simd.h). `at`: in lanes.
template <int T>
HG_INLINE vf load_keys(const void* const* keys, int i, ptrdiff_t at) {
  if constexpr (T == kBFloat16) return load_lanes_bf16((const uint16_t* const*)keys, i, at);
  else if constexpr (T == kFloat16) return load_lanes_f16((const uint16_t* const*)keys, i, at);
  else if constexpr (T == kScaledBytes) return load_lanes_i8((const int8_t* const*)keys, i, at);
  else if constexpr (in_bytes(T)) return as_float(biased(as_int(load_lanes((const float* const*)keys, i, at))));
  else return load_lanes((const float* const*)keys, i, at);
}

// Lays the values of a block's keys [first, last), which are bytes, side by side: those of four keys in each lane, of
// a quad in each row of `wide_vals`.
void lay_quads(Tile& t, int first, int last) {
  for (int key = first / 4 * 4; key < last; key += 4) {
    float* row = t.wide_vals + key / 4 * t.padded_dim;
    int d = 0;
#if defined(__AVX512F__)
    for (; d + 4 * VL <= t.dim; d += 4 * VL) {
      vi quads[4];
      quad_rows64(t.vals + key, d, quads);
      in_order(quads);
      for (int v = 0; v < 4; ++v) store(row + d + v * VL, as_float(quads[v]));
    }
#endif
    for (; d < t.dim; d += VL) store(row + d, as_float(quad_rows(t.vals + key, d)));
  }
}

// VL dimensions, from `at` on, of the values of a step's keys.
template <int T>
HG_INLINE vf load_values(const void* const* values, ptrdiff_t at) {
  if constexpr (in_bytes(T)) {
    return as_float(quad_rows(values, at));
  } else if constexpr (in_pairs(T)) {
    return as_float(pair_rows((const uint16_t*)values[0] + at, (const uint16_t*)values[1] + at));
  } else {
    const void* value = values[0];
    if constexpr (T == kBFloat16) return load_bf16((const uint16_t*)value + at);
    else if constexpr (T == kFloat16) return load_f16((const uint16_t*)value + at);
    else if constexpr (T == kScaledBytes) return load_i8((const int8_t*)value + at);
    else return load((const float*)value + at);
  }
}

// The first n < VL of them; pairs and bytes have no such rest.
template <int T>
HG_INLINE vf load_values_n(const void* const* values, ptrdiff_t at, int n) {
  const void* value = values[0];
  if constexpr (T == kBFloat16) return load_bf16_n((const uint16_t*)value + at, n);
  else if constexpr (T == kFloat16) return load_f16_n((const uint16_t*)value + at, n);
  else if constexpr (T == kScaledBytes) return load_i8_n((const int8_t*)value + at, n);
  else if constexpr (T == kFloat32) return load_n((const float*)value + at, n);
  else return load_values<T>(values, at);
}

// What products are added up in; bytes' are whole numbers.
template <int T>
using Sum = std::conditional_t<in_bytes(T), vi, vf>;
template <int T>
HG_INLINE Sum<T> no_sum() {
  if constexpr (in_bytes(T)) return set1i(0);
  else return set1(0.0f);
}
HG_INLINE vf bits_of(vi sum) { return as_float(sum); }
HG_INLINE vf bits_of(vf sum) { return sum; }

// The sum of two such sums, by their bits.
template <int T>
HG_INLINE vf add_sum(vf a, vf b) {
  if constexpr (in_bytes(T)) return as_float(add_int(as_int(a), as_int(b)));
  else return a + b;
}

// sum + a * b, lane by lane; of bytes a is unsigned, and b signed.
template <int T>
HG_INLINE Sum<T> multiply_add(vf a, vf b, Sum<T> sum) {
  if constexpr (in_bytes(T)) return multiply_bytes<T>(sum, as_int(a), as_int(b));
  else if constexpr (in_pairs(T)) return multiply_pairs<T>(sum, as_int(a), as_int(b));
  else return fma(a, b, sum);
}

}  // namespace
