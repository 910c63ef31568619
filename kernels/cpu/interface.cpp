// The library's C functions: each describes an operation as a job and shares its tiles out.
//
// Pointers are the caller's; nothing is kept after a call returns. Strides are in elements. Shapes
// are checked in Python, before the call.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention_plans.h"
#include "export.h"
#include "gated.h"
#include "pack_weight.h"
#include "product.h"
#include "quantised.h"
#include "scratch.h"

namespace headgate {
namespace {

const Kernels* kernels = nullptr;

bool supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!strcmp(name, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!strcmp(name, "avx2")) return avx2;
#endif
  return !strcmp(name, "generic");
}

// Whether products of pairs of bfloat16 numbers are one instruction here.
bool multiplies_pairs() {
#if defined(__x86_64__)
  static const bool machine = __builtin_cpu_supports("avx512bf16");
  return kernels->pairs && machine;
#else
  return false;
#endif
}

// Whether products of four bytes are one instruction here.
bool multiplies_bytes() {
#if defined(__x86_64__)
  static const bool machine = __builtin_cpu_supports("avx512vnni");
  return kernels->pairs && machine;
#else
  return false;
#endif
}

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_generic,
};

// Rows that one tile takes when each costs about `cost` nanoseconds: enough that claiming it is cheap.
int64_t rows_per_tile(int64_t rows, int64_t cost) {
  const int64_t least = divide_up(kWorthSharing / 2, cost < 1 ? 1 : cost);
  const int64_t even = divide_up(rows, int64_t(num_threads()) * 4);
  return least > even ? least : even;
}

constexpr int64_t kTokens = int64_t(1) << 31;  // more than any vocabulary has

// What is larger for a larger score, whatever the token, and of equal scores for the first token; for what
// is not a number larger than for any. Above 0.
int64_t likeliest_key(float score, int64_t token) {
  const float value = score + 0.0f;  // one zero
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t order = bits ^ (bits >> 31 ? ~uint32_t(0) : uint32_t(1) << 31);
  if (value != value) order = ~uint32_t(0);
  return int64_t(order) * kTokens + (kTokens - 1 - token);
}
int64_t token_of_key(int64_t key) { return kTokens - 1 - key % kTokens; }

}  // namespace

const Kernels& active_kernels() { return *kernels; }

bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

}  // namespace headgate

using namespace headgate;

// Chooses the instruction set: `name`, or the best there is where it is empty. Returns its name, or
// null where this machine or build does not have it.
HG_API const char* hg_init(const char* name) {
  for (const Kernels* k : kAll) {
    if ((!*name || !strcmp(name, k->name)) && supported(k->name)) {
      kernels = k;
      return k->name;
    }
  }
  return nullptr;
}

HG_API void hg_set_num_threads(int32_t count) { set_num_threads(count); }
HG_API int32_t hg_num_threads() { return num_threads(); }

namespace {

// Of packed weights for a product.
int64_t packed_bytes(int64_t columns, int64_t inner, int32_t product) {
  const bool in_twos = product == kBFloat16 || product == kRounded;
  const int64_t padded = in_twos ? (inner + 1) / 2 * 2 : inner;
  return divide_up(columns, kPanel) * kPanel * padded * (product == kFloat32 ? 4 : 2);
}

}  // namespace

HG_API int64_t hg_packed_bytes(int64_t columns, int64_t inner, int32_t dtype) {
  return packed_bytes(columns, inner, dtype);
}

// weight[columns, inner] in `dtype` to the panels that hg_linear reads (see linear.h).
HG_API void hg_pack_weight(const void* weight, int64_t columns, int64_t inner, int32_t dtype,
                           void* packed) {
  const PackWeightJob job = {weight, packed, columns, inner, dtype};
  run(pack_weight_tile, job, divide_up(columns, kPanel), columns * inner);
}

namespace {

// How inputs are laid out for a product, and which one is computed then: for kRounded what the machine has.
struct Chosen {
  int32_t product, format;
};
Chosen choose_product(int32_t product) {
  if (product != kRounded) return {product, kFloats};
  if (multiplies_pairs()) return {kRoundedPairs, kPairs};
  return {kBFloat16, kRoundedFloats};
}

// Nanoseconds of a product, roughly: the weights are to be read from memory, and the products to be computed.
int64_t product_cost(int64_t rows, int64_t inner, int64_t columns) {
  return columns * inner / 16 + rows * columns * inner / 64;
}

}  // namespace

// product: the weight's DType, or kRounded for bfloat16 weights and inputs to be rounded. What comes
// before it: see RowSource; `norm` is null where there is no norm, `activation` -1 where there is none.
HG_API int32_t hg_linear(const float* x, int64_t rows, int64_t inner, int64_t x_stride,
                         const void* weight, int32_t product, int64_t columns, const float* bias,
                         float* y, int64_t y_stride, const float* norm, float eps,
                         const float* residual, int64_t residual_stride, float* total,
                         int32_t activation) {
  if (rows == 0) return 0;
  const RowSource source = {x, x_stride, norm, residual, residual_stride, total, eps, activation, inner};
  const int32_t row_tiles = row_tiles_of(rows, kernels->tile_rows);
  const Chosen chosen = choose_product(product);
  const bool ready = is_ready(source, rows, chosen.format);
  InputRowsJob inputs = {source, nullptr, rows, inner, row_tiles, chosen.format, 1};
  if (!ready && !(inputs.out = input_memory(rows * input_row_bytes(inner, chosen.format)))) return -1;
  const LinearJob job = {ready ? x : reinterpret_cast<const float*>(inputs.out), weight, bias, y, rows, inner, columns,
                         y_stride, chosen.product, row_tiles};
  share_and_run(ready ? nullptr : &inputs, kernels->linear, job, product_cost(rows, inner, columns));
  return 0;
}

// A gated MLP (see gated.h) after the norm of x, or of x + residual: `middle` columns of gate, then as many of up, a
// multiple of hg_gated_columns. Products as hg_linear's; both have weights of one kind.
HG_API int32_t hg_gated_mlp(const float* x, int64_t rows, int64_t inner, int64_t x_stride, const float* norm,
                            float eps, const float* residual, int64_t residual_stride, float* total,
                            const void* gate_up, int32_t product, int64_t middle, const float* gate_up_bias,
                            int32_t activation, const void* down, int64_t columns, const float* bias, float* y,
                            int64_t y_stride) {
  if (rows == 0) return 0;
  const int32_t row_tiles = row_tiles_of(rows, kernels->tile_rows);
  const Chosen chosen = choose_product(product);
  const RowSource source = {x, x_stride, norm, residual, residual_stride, total, eps, -1, 0};
  GatedInputs inputs;
  if (!inputs.take(source, activation, rows, inner, middle, row_tiles, chosen.format)) return -1;
  const LinearJob first = {reinterpret_cast<const float*>(inputs.first.out), gate_up, gate_up_bias, nullptr, rows,
                           inner, middle, 0, chosen.product, row_tiles};
  run_gated(inputs, first, packed_bytes(middle, inner, product), kernels->linear,
            product_cost(rows, inner, 2 * middle));
  const LinearJob second = {reinterpret_cast<const float*>(inputs.second.out), down, bias, y, rows, middle, columns,
                            y_stride, chosen.product, row_tiles};
  share_and_run(nullptr, kernels->linear, second, product_cost(rows, middle, columns));
  return 0;
}

// What the number of a gated MLP's columns of gate must be a multiple of.
HG_API int64_t hg_gated_columns() { return kInputColumns; }

// rounded: where the cache is bfloat16, queries and weights are rounded to it (see attention.h).
HG_API int32_t hg_paged_attention(const float* q, int64_t q_token_stride, int64_t q_head_stride,
                                  const void* k_cache, const void* v_cache, const float* k_scales,
                                  const float* v_scales, int32_t cache_dtype, int32_t block_size,
                                  const int32_t* cu_query_lens, const int32_t* context_lens,
                                  const int32_t* block_tables, int64_t table_stride, int32_t rows,
                                  int32_t heads, int32_t kv_heads, int32_t head_dim, float scale,
                                  int32_t window, float soft_cap, int32_t rounded, float* out) {
  static std::atomic<int64_t> jobs{0};
  AttentionJob job = {};
  job.number = ++jobs;
  job.q = q;
  job.k_cache = k_cache;
  job.v_cache = v_cache;
  job.k_scales = k_scales;
  job.v_scales = v_scales;
  job.out = out;
  job.cu_query_lens = cu_query_lens;
  job.context_lens = context_lens;
  job.block_tables = block_tables;
  job.q_token_stride = q_token_stride;
  job.q_head_stride = q_head_stride;
  job.table_stride = table_stride;
  job.rows = rows;
  job.heads = heads;
  job.kv_heads = kv_heads;
  job.head_dim = head_dim;
  job.block_size = block_size;
  job.cache_dtype = job.product = cache_dtype;
  if (rounded && cache_dtype == kBFloat16 && head_dim % kPairedDims == 0)
    job.product = multiplies_pairs() ? kRoundedPairs : kRounded;
  if (rounded && cache_dtype == kScaledBytes && head_dim % kByteDims == 0)
    job.product = multiplies_bytes() ? int32_t(kByteDots) : int32_t(kBytes);
  job.window = window;
  job.scale = scale;
  job.soft_cap = soft_cap;
  thread_local AttentionPlans plans;
  const AttentionItems& items = plans.plan(job, num_threads());
  thread_local Scratch partials;
  if (items.partials) {
    char* memory = partials.take(items.partials * int64_t(sizeof(float)));
    if (!memory) return -1;
    job.partials = reinterpret_cast<float*>(memory);
  }
  job.sharers = items.sharers.data();
  job.sharer_tokens = items.sharer_tokens.data();
  job.items = items.attend.data();
  job.item_count = int64_t(items.attend.size());
  job.item_stride = divide_up(num_threads(), items.homes.count);
  run(kernels->attention, job, items.homes, items.cost);
  if (!items.merge.empty()) {
    const MergeJob merge = {&job, items.merge.data()};
    run(kernels->attention_merge, merge, int64_t(items.merge.size()),
        items.partials / kMergedPerNanosecond);
  }
  return 0;
}

HG_API void hg_embedding(const int64_t* ids, int64_t tokens, const void* table, int32_t dtype,
                         int64_t rows, int64_t size, int64_t first_id, float* out) {
  const int64_t cost = size / 2, per_tile = rows_per_tile(tokens, cost);
  const EmbeddingJob job = {ids, table, out, tokens, per_tile, rows, size, first_id, dtype};
  run(kernels->embedding, job, group_by_home(tokens, divide_up(tokens, per_tile)), tokens * cost);
}

// out[i] = x[indices[i]]
HG_API void hg_take_rows(const float* x, int64_t x_stride, const int64_t* indices, int64_t rows,
                         int64_t size, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    memcpy(out + r * size, x + indices[r] * x_stride, sizeof(float) * size);
}

// out = rms_norm(x) * weight; with a residual: total = x + residual, out = rms_norm(total) * weight.
HG_API void hg_rms_norm(const float* x, int64_t x_stride, const float* residual,
                        int64_t residual_stride, const float* weight, float* out, float* total,
                        int64_t rows, int64_t size, float eps) {
  const int64_t cost = size / 4, per_tile = rows_per_tile(rows, cost);
  const NormJob job = {x,    residual, weight,   out,      total,           rows,
                       size, per_tile, x_stride, residual_stride, eps};
  run(kernels->rms_norm, job, group_by_home(rows, divide_up(rows, per_tile)), rows * cost);
}

HG_API void hg_gate(const float* x, int64_t x_stride, float* out, int64_t rows, int64_t size,
                    int32_t activation) {
  const int64_t cost = size / 2, per_tile = rows_per_tile(rows, cost);
  const GateJob job = {x, out, rows, size, per_tile, x_stride, activation};
  run(kernels->gate, job, group_by_home(rows, divide_up(rows, per_tile)), rows * cost);
}

HG_API void hg_rotary(float* q, int64_t q_token_stride, int64_t q_head_stride, float* k,
                      int64_t k_token_stride, int64_t k_head_stride, const int64_t* positions,
                      const float* cos_sin, int64_t tokens, int32_t heads, int32_t kv_heads,
                      int32_t rotary_dim) {
  const int64_t cost = int64_t(heads + kv_heads) * rotary_dim / 8;
  const int64_t per_tile = rows_per_tile(tokens, cost);
  const RotaryJob job = {q,        k,        positions,      cos_sin,       tokens,
                         per_tile, q_token_stride, q_head_stride, k_token_stride, k_head_stride,
                         heads,    kv_heads, rotary_dim};
  run(kernels->rotary, job, group_by_home(tokens, divide_up(tokens, per_tile)), tokens * cost);
}

HG_API void hg_write_kv(const float* k, int64_t k_token_stride, int64_t k_head_stride,
                        const float* v, int64_t v_token_stride, int64_t v_head_stride, void* k_cache,
                        void* v_cache, float* k_scales, float* v_scales, int32_t cache_dtype,
                        int32_t block_size, const int64_t* slots, int64_t tokens, int32_t kv_heads,
                        int32_t head_dim) {
  const int64_t cost = int64_t(kv_heads) * head_dim / 8, per_tile = rows_per_tile(tokens, cost);
  const WriteKvJob job = {k,         v,         k_cache,        v_cache,       k_scales,
                          v_scales,  slots,     tokens,         per_tile,      k_token_stride,
                          k_head_stride, v_token_stride, v_head_stride, kv_heads, head_dim,
                          cache_dtype, block_size};
  run(kernels->write_kv, job, group_by_home(tokens, divide_up(tokens, per_tile)), tokens * cost);
}

// q_norm, k_norm: null where queries and keys have no norm.
HG_API void hg_rotary_and_write_kv(float* q, int64_t q_token_stride, int64_t q_head_stride, float* k,
                                   int64_t k_token_stride, int64_t k_head_stride, const float* v,
                                   int64_t v_token_stride, int64_t v_head_stride,
                                   const float* q_norm, const float* k_norm, float eps,
                                   const int64_t* positions, const float* cos_sin,
                                   int32_t rotary_dim, void* k_cache, void* v_cache,
                                   float* k_scales, float* v_scales, int32_t cache_dtype,
                                   int32_t block_size, const int64_t* slots, int64_t tokens,
                                   int32_t heads, int32_t kv_heads, int32_t head_dim) {
  const int64_t cost = int64_t(heads + 2 * kv_heads) * head_dim * 2 / 3;
  const int64_t per_tile = rows_per_tile(tokens, cost);
  const HeadsJob job = {
      {q, k, positions, cos_sin, tokens, per_tile, q_token_stride, q_head_stride, k_token_stride,
       k_head_stride, heads, kv_heads, rotary_dim},
      {k, v, k_cache, v_cache, k_scales, v_scales, slots, tokens, per_tile, k_token_stride,
       k_head_stride, v_token_stride, v_head_stride, kv_heads, head_dim, cache_dtype, block_size},
      q_norm, k_norm, eps};
  run(kernels->heads, job, group_by_home(tokens, divide_up(tokens, per_tile)), tokens * cost);
}

// Of each row of scores [rows, size], as NumPy's argmax: the first of the largest, or the first that is
// not a number.
HG_API void hg_argmax(const float* scores, int64_t rows, int64_t size, int64_t* tokens) {
  run(kernels->argmax, ArgmaxJob{scores, tokens, size}, rows, rows * size / 8);
}

// Of ranks with a part of a vocabulary each, where `wanted` is not 0: what hg_argmax finds of this rank's
// scores, whose first token is `first`, as keys[rows, ranks], of which the largest has what it finds of
// all scores. Other ranks' keys are 0.
HG_API void hg_likeliest_keys(const float* scores, int64_t rows, int64_t size, int64_t first,
                              int32_t wanted, int64_t* keys, int32_t rank, int32_t ranks) {
  if (!wanted) return;
  thread_local std::vector<int64_t> found;
  found.resize(size_t(rows));
  hg_argmax(scores, rows, size, found.data());
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t other = 0; other < ranks; ++other) keys[row * ranks + other] = 0;
    keys[row * ranks + rank] = likeliest_key(scores[row * size + found[size_t(row)]],
                                             first + found[size_t(row)]);
  }
}

// The tokens of all ranks' keys, summed.
HG_API void hg_likeliest(const int64_t* keys, int64_t rows, int32_t ranks, int32_t wanted,
                         int64_t* tokens) {
  if (!wanted) return;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* of_row = keys + row * ranks;
    tokens[row] = token_of_key(*std::max_element(of_row, of_row + ranks));
  }
}

// The token with the largest (score - best) / temperature + noise, the first of equals; -1 where no
// score is a number.
HG_API int64_t hg_gumbel_argmax(const float* scores, int64_t size, float best, float temperature,
                                uint64_t seed, uint32_t position, uint32_t sample_index) {
  const int64_t tiles = divide_up(size, kGumbelTile);
  thread_local std::vector<GumbelBest> found;
  found.resize(size_t(tiles));
  const GumbelJob job = {scores, found.data(), size, seed, position, sample_index, best, temperature};
  run(kernels->gumbel, job, tiles, size * 2);
  GumbelBest most = {-INFINITY, -1};
  for (const GumbelBest& one : found)
    if (one.token >= 0 && (most.token < 0 || one.sum > most.sum)) most = one;
  return most.token;
}
