// Embedding, norms, gated activations, rotary embedding and the write into the paged cache, with
// float32 results.
//
// A row's result depends on that row alone.
#pragma once

#include "int8_rows.h"
#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

struct Rows {
  int64_t first, last;
};

HG_INLINE Rows rows_of_tile(int64_t rows, int64_t rows_per_tile, int64_t tile) {
  const int64_t first = tile * rows_per_tile;
  return {first, first + rows_per_tile < rows ? first + rows_per_tile : rows};
}

// Rows of the table; zeros for ids that it does not hold.
void embedding_tile(const void* data, int64_t tile) {
  const EmbeddingJob& job = *(const EmbeddingJob*)data;
  const Rows rows = rows_of_tile(job.tokens, job.tokens_per_tile, tile);
  for (int64_t t = rows.first; t < rows.last; ++t) {
    const int64_t row = job.ids[t] - job.first_id;
    float* out = job.out + t * job.size;
    if (row < 0 || row >= job.rows) {
      memset(out, 0, sizeof(float) * job.size);
      continue;
    }
    const uint16_t* narrow = (const uint16_t*)job.table + row * job.size;
    if (job.dtype == kFloat32) memcpy(out, (const float*)job.table + row * job.size, sizeof(float) * job.size);
    else if (job.dtype == kBFloat16) widen_row<true>(narrow, out, job.size);
    else widen_row<false>(narrow, out, job.size);
  }
}

// Calls body(offset, load function, store function) for each vector of `size` floats.
template <class Body>
HG_INLINE void for_each_vector(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + VL <= size; i += VL)
    body(i, [](const float* p) { return load(p); }, [](float* p, vf x) { store(p, x); });
  if (i < size) {
    const int n = (int)(size - i);
    body(i, [n](const float* p) { return load_n(p, n); },
         [n](float* p, vf x) { store_n(p, x, n); });
  }
}

// A row before its norm: x, or x + residual, which is to be left in `total`.
struct NormRow {
  const float* x;
  const float* residual;  // or null, and `total` with it
  float* total;
};
struct Columns {
  int64_t first, last;
};

enum NormSource { kAlone, kWithResidual, kLeavingTotal };

// Adds up the squares of columns [first, last), of vector i in sums[i % 4]; `first` is a multiple of four
// vectors.
template <NormSource S>
HG_INLINE void add_squares(NormRow row, int64_t first, int64_t last, vf (&sums)[4]) {
  const auto add = [row](int64_t i, auto get, auto put, vf sum) {
    vf y = get(row.x + i);
    if (S != kAlone) y = y + get(row.residual + i);
    if (S == kLeavingTotal) put(row.total + i, y);
    return fma(y, y, sum);
  };
  int64_t i = first;
  for (; i + 4 * VL <= last; i += 4 * VL)  // the four stay in registers
    for (int j = 0; j < 4; ++j) sums[j] = add(i + j * VL, load, store, sums[j]);
  for_each_vector(last - i, [&](int64_t at, auto get, auto put) {
    sums[at / VL] = add(i + at, get, put, sums[at / VL]);
  });
}

// What a row is multiplied with before its weights. Of the total only the columns `kept` are left.
float norm_scale(NormRow row, Columns kept, int64_t size, float eps) {
  vf squares[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  if (row.residual) {
    const int64_t last = kept.last < size ? kept.last : size;
    add_squares<kWithResidual>(row, 0, kept.first, squares);
    add_squares<kLeavingTotal>(row, kept.first, last, squares);
    add_squares<kWithResidual>(row, last, size, squares);
  } else {
    add_squares<kAlone>(row, 0, size, squares);
  }
  const float mean = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)size;
  return 1.0f / __builtin_sqrtf(mean + eps);
}

// Some of a row's values after the norm.
void norm_values(const float* x, const float* weight, float scale, float* out, int64_t size) {
  const vf factor = set1(scale);
  for_each_vector(size, [&](int64_t i, auto get, auto put) {
    put(out + i, get(x + i) * factor * get(weight + i));
  });
}

void rms_norm_row(NormRow row, const float* weight, float* out, int64_t size, float eps) {
  const float scale = norm_scale(row, {0, size}, size, eps);
  norm_values(row.residual ? row.total : row.x, weight, scale, out, size);
}

void rms_norm_tile(const void* data, int64_t tile) {
  const NormJob& job = *(const NormJob*)data;
  const Rows rows = rows_of_tile(job.rows, job.rows_per_tile, tile);
  for (int64_t r = rows.first; r < rows.last; ++r)
    rms_norm_row({job.x + r * job.x_stride,
                  job.residual ? job.residual + r * job.residual_stride : nullptr,
                  job.total ? job.total + r * job.size : nullptr},
                 job.weight, job.out + r * job.size, job.size, job.eps);
}

template <int A>
HG_INLINE vf activate(vf x) {
  if constexpr (A == kSilu) return x * sigmoid_v(x);
  const vf half = x * set1(0.5f);
  if constexpr (A == kGeluErf)
    return half * (set1(1.0f) + erf_v(x * set1(0.70710678118654752f)));
  const vf inner = fma(x * x * x, set1(0.044715f), x) * set1(0.79788456080286536f);
  return half * (set1(1.0f) + tanh_v(inner));
}

template <int A>
HG_INLINE void activate_and_multiply(const float* gate, const float* up, float* out, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto get, auto put) {
    put(out + i, activate<A>(get(gate + i)) * get(up + i));
  });
}

void gate_values(int32_t activation, const float* gate, const float* up, float* out, int64_t size) {
  if (activation == kSilu) activate_and_multiply<kSilu>(gate, up, out, size);
  else if (activation == kGeluTanh) activate_and_multiply<kGeluTanh>(gate, up, out, size);
  else activate_and_multiply<kGeluErf>(gate, up, out, size);
}

void gate_tile(const void* data, int64_t tile) {
  const GateJob& job = *(const GateJob*)data;
  const Rows rows = rows_of_tile(job.rows, job.rows_per_tile, tile);
  for (int64_t r = rows.first; r < rows.last; ++r) {
    const float* gate = job.x + r * job.x_stride;
    gate_values(job.activation, gate, gate + job.size, job.out + r * job.size, job.size);
  }
}

void rotate_heads(float* x, int64_t head_stride, int heads, const float* cos, const float* sin,
                  int64_t half) {
  for (int h = 0; h < heads; ++h, x += head_stride) {
    for_each_vector(half, [&](int64_t i, auto get, auto put) {
      const vf a = get(x + i), b = get(x + half + i), c = get(cos + i), s = get(sin + i);
      put(x + i, fma(a, c, set1(0.0f) - b * s));
      put(x + half + i, fma(b, c, a * s));
    });
  }
}

void rotate_token(const RotaryJob& job, int64_t t) {
  const int64_t half = job.rotary_dim / 2;
  const float* cos = job.cos_sin + job.positions[t] * job.rotary_dim;
  rotate_heads(job.q + t * job.q_token_stride, job.q_head_stride, job.heads, cos, cos + half, half);
  rotate_heads(job.k + t * job.k_token_stride, job.k_head_stride, job.kv_heads, cos, cos + half,
               half);
}

void rotary_tile(const void* data, int64_t tile) {
  const RotaryJob& job = *(const RotaryJob*)data;
  const Rows rows = rows_of_tile(job.tokens, job.tokens_per_tile, tile);
  for (int64_t t = rows.first; t < rows.last; ++t) rotate_token(job, t);
}

template <int DTYPE>
void narrow_row(const float* from, uint16_t* to, int64_t size) {
  int64_t i = 0;
  for (; i + VL <= size; i += VL) {
    if constexpr (DTYPE == kBFloat16) store_bf16(to + i, load(from + i));
    else store_f16(to + i, load(from + i));
  }
  if (i < size) {
    uint16_t part[VL];
    const vf x = load_n(from + i, (int)(size - i));
    if constexpr (DTYPE == kBFloat16) store_bf16(part, x);
    else store_f16(part, x);
    memcpy(to + i, part, sizeof(uint16_t) * (size - i));
  }
}

void write_heads(const WriteKvJob& job, int64_t slot, const float* from, int64_t head_stride,
                 void* cache, float* scales) {
  const int heads = job.kv_heads, dim = job.head_dim, dtype = job.cache_dtype;
  const int64_t size = job.block_size;
  int64_t at = slot * heads * dim, scale_at = slot / size * heads * size + slot % size;
  for (int h = 0; h < heads; ++h, from += head_stride, at += dim, scale_at += size) {
    if (dtype == kFloat32) memcpy((float*)cache + at, from, sizeof(float) * dim);
    else if (dtype == kBFloat16) narrow_row<kBFloat16>(from, (uint16_t*)cache + at, dim);
    else if (dtype == kFloat16) narrow_row<kFloat16>(from, (uint16_t*)cache + at, dim);
    else scales[scale_at] = quantise_row(from, (int8_t*)cache + at, dim);
  }
}

void write_token(const WriteKvJob& job, int64_t t) {
  const int64_t slot = job.slots[t];
  write_heads(job, slot, job.k + t * job.k_token_stride, job.k_head_stride, job.k_cache,
              job.k_scales);
  write_heads(job, slot, job.v + t * job.v_token_stride, job.v_head_stride, job.v_cache,
              job.v_scales);
}

void write_kv_tile(const void* data, int64_t tile) {
  const WriteKvJob& job = *(const WriteKvJob*)data;
  const Rows rows = rows_of_tile(job.tokens, job.tokens_per_tile, tile);
  for (int64_t t = rows.first; t < rows.last; ++t) write_token(job, t);
}

void norm_heads(float* x, int64_t head_stride, int heads, const float* weight, const HeadsJob& job) {
  for (int h = 0; h < heads; ++h, x += head_stride)
    rms_norm_row({x, nullptr, nullptr}, weight, x, job.write.head_dim, job.eps);
}

void heads_tile(const void* data, int64_t tile) {
  const HeadsJob& job = *(const HeadsJob*)data;
  const RotaryJob& rotary = job.rotary;
  const Rows rows = rows_of_tile(rotary.tokens, rotary.tokens_per_tile, tile);
  for (int64_t t = rows.first; t < rows.last; ++t) {
    if (job.q_norm) {
      norm_heads(rotary.q + t * rotary.q_token_stride, rotary.q_head_stride, rotary.heads,
                 job.q_norm, job);
      norm_heads(rotary.k + t * rotary.k_token_stride, rotary.k_head_stride, rotary.kv_heads,
                 job.k_norm, job);
    }
    rotate_token(rotary, t);
    write_token(job.write, t);
  }
}

}  // namespace
