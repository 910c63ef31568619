// Causal attention over paged keys and values, for decode rows and prompt chunks alike.
//
// The order of every sum is fixed by absolute key positions, so that a token's result has the same
// bits in any batch and however its prompt was chunked:
//  - a score is one chain of fused multiply-adds over the head dimension;
//  - within a partition of kPartition keys an online softmax goes block by block (kKeyBlock keys),
//    the sum of weights kept in VL partial sums by (key position mod VL), the weighted values as one
//    chain over ascending keys;
//  - partitions are merged in ascending order.
// Keys a token may not see weigh exactly zero, and blocks without any leave the state as it is.
//
// Two ways lead to the same numbers. Few query rows (decode): vectors run over keys, which are
// transposed four dimensions at a time as they are read. Many: vectors run over query rows, and keys
// are broadcast. In both, all query heads of a group share one reading of its keys and values.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

constexpr float kNoScore = -1e38f;  // below every score, yet far from overflow when subtracted
constexpr int kFewQueries = 8;      // up to here vectors run over keys
constexpr int kRows = 6;            // rows and vectors of the inner products: sums in registers
constexpr int kVectors = VL == 16 ? 4 : 2;

HG_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The query rows of one item and the running state of their softmax.
struct State {
  alignas(64) float maximum[kQueryTile];
  alignas(64) float sum[kQueryTile];
  alignas(64) float values[kQueryTile * kMaxHeadDim];  // [query][dim padded to VL]
};

struct Tile {
  const AttentionJob* job;
  const AttentionItem* item;
  const int32_t* table;
  int dim, padded_dim, queries, padded_queries;
  int32_t first_key, last_key;          // keys any of its queries sees: [first, last)
  alignas(64) int32_t low[kQueryTile];  // keys each query sees: [low, high]
  alignas(64) int32_t high[kQueryTile];
  alignas(64) float q[kQueryTile * kMaxHeadDim];  // scaled; few: [query][dim], many: [dim][query]
  State total, part;
  alignas(64) float part_sums[kQueryTile * VL];    // few: [query][lane], many: [lane][query]
  alignas(64) float weights[kQueryTile * kKeyBlock];  // few: [query][key], many: [key][query]
  alignas(64) float decay[kQueryTile];             // what the block's new maximum makes of old sums
  alignas(64) float merge[2][kQueryTile];
  const float* keys[kKeyBlock];
  const float* vals[kKeyBlock];
  // Where the cache has this block's keys and values, and the next one's, in elements.
  int64_t places[2][kKeyBlock];
  int current;  // which of the two is this block's
  bool placed;  // whether this block's are known
  int ahead;    // number of the next block's
  // Blocks of a narrower cache, widened.
  alignas(64) float wide_keys[kKeyBlock * kMaxHeadDim];
  alignas(64) float wide_vals[kKeyBlock * kMaxHeadDim];
};

HG_INLINE bool is_few(int queries, int dim) { return queries <= kFewQueries && dim % 4 == 0; }

void load_queries(Tile& t) {
  const AttentionJob& job = *t.job;
  const AttentionItem& item = *t.item;
  const int group = job.heads / job.kv_heads;
  const int32_t start = job.cu_query_lens[item.row];
  const int32_t context = job.context_lens[item.row];
  const int32_t position = context - (job.cu_query_lens[item.row + 1] - start);
  const bool few = is_few(t.queries, t.dim);
  int32_t first = INT32_MAX, last = -1;
  for (int i = 0; i < t.padded_queries; ++i) {
    if (i >= t.queries) {  // lanes that pad a vector see nothing
      t.low[i] = 1;
      t.high[i] = 0;
      if (!few)
        for (int d = 0; d < t.dim; ++d) t.q[d * t.padded_queries + i] = 0.0f;
      continue;
    }
    const int row = item.query_first + i, token = row / group;
    const float* q = job.q + (start + token) * job.q_token_stride +
                     (item.kv_head * group + row % group) * job.q_head_stride;
    t.high[i] = position + token;
    t.low[i] = job.window && t.high[i] >= job.window ? t.high[i] - job.window + 1 : 0;
    first = t.low[i] < first ? t.low[i] : first;
    last = t.high[i] > last ? t.high[i] : last;
    for (int d = 0; d < t.dim; ++d)
      t.q[few ? i * t.dim + d : d * t.padded_queries + i] = q[d] * job.scale;
  }
  t.first_key = first;
  t.last_key = last + 1;
}

template <bool BF16>
void widen_row(const uint16_t* from, float* to, int dim) {
  int d = 0;
  for (; d + VL <= dim; d += VL) store(to + d, BF16 ? load_bf16(from + d) : load_f16(from + d));
  if (d < dim) {
    const int n = dim - d;
    store_n(to + d, BF16 ? load_bf16_n(from + d, n) : load_f16_n(from + d, n), n);
  }
}

// Finds the places of positions [first, last) of the block that starts at `base`.
void find_places(const Tile& t, int32_t base, int32_t first, int32_t last, int64_t* places) {
  const int64_t size = t.job->block_size, step = int64_t(t.job->kv_heads) * t.dim;
  int64_t block = first / size, offset = first % size;
  for (int32_t key = first; key < last; ++block, offset = 0) {
    const int64_t start = t.table[block] * size * step + t.item->kv_head * t.dim;
    for (; offset < size && key < last; ++offset, ++key) places[key - base] = start + offset * step;
  }
}

// Asks for one key or value of the next block. Calls are spread over the work on this block: a burst
// would fill the core's few slots for misses, and then stall it while memory has nothing to do.
HG_INLINE void fetch_ahead(const Tile& t, const void* cache, int i) {
  const int size = t.job->cache_dtype == kFloat32 ? 4 : 2;
  const char* p = (const char*)cache + t.places[!t.current][i] * size;
  for (int byte = 0; byte < t.dim * size; byte += 64) __builtin_prefetch(p + byte, 0, 2);
}

// Points `keys` and `vals` at positions [first, last) of the block at `base`; the block's other
// entries point at one of them, so that they can be read (their weights are zero).
void open_block(Tile& t, int32_t base, int32_t first, int32_t last) {
  const AttentionJob& job = *t.job;
  for (int i = first - base; i < last - base; ++i) {
    const int64_t at = t.places[t.current][i];
    if (job.cache_dtype == kFloat32) {
      t.keys[i] = (const float*)job.k_cache + at;
      t.vals[i] = (const float*)job.v_cache + at;
      continue;
    }
    float* k = t.wide_keys + i * t.dim;
    float* v = t.wide_vals + i * t.dim;
    const uint16_t* narrow_k = (const uint16_t*)job.k_cache + at;
    const uint16_t* narrow_v = (const uint16_t*)job.v_cache + at;
    if (job.cache_dtype == kBFloat16) {
      widen_row<true>(narrow_k, k, t.dim);
      widen_row<true>(narrow_v, v, t.dim);
    } else {
      widen_row<false>(narrow_k, k, t.dim);
      widen_row<false>(narrow_v, v, t.dim);
    }
    t.keys[i] = k;
    t.vals[i] = v;
  }
  for (int i = 0; i < first - base; ++i) t.keys[i] = t.keys[first - base];
  for (int i = last - base; i < kKeyBlock; ++i) t.keys[i] = t.keys[last - 1 - base];
}

HG_INLINE vf cap_scores(vf s, float cap) {
  return cap > 0 ? set1(cap) * tanh_v(s / set1(cap)) : s;
}

// ---- few query rows: vectors over keys ----

template <int Q>
void score_few(Tile& t, int group_first, int group_last) {
  const float cap = t.job->soft_cap;
  for (int g = group_first; g < group_last; ++g) {
    int fetch = g * VL, fetch_due = 0;
    vf s[Q];
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) s[i] = set1(0.0f);
    for (int d = 0; d < t.dim; d += 4) {
      vf k[4];
      load_columns4(t.keys + g * VL, d, k);
      for (fetch_due += 4 * VL; fetch_due >= t.dim; fetch_due -= t.dim, ++fetch)
        if (fetch < t.ahead) fetch_ahead(t, t.job->k_cache, fetch);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) s[i] = fma(set1(t.q[i * t.dim + d + j]), k[j], s[i]);
    }
    for (int i = 0; i < Q; ++i) store(t.weights + i * kKeyBlock + g * VL, cap_scores(s[i], cap));
  }
}

void soften_few(Tile& t, int32_t base, int group_first, int group_last) {
  const vf hidden = set1(-__builtin_inff());
  for (int i = 0; i < t.queries; ++i) {
    float* weights = t.weights + i * kKeyBlock;
    const vi low = set1i(t.low[i]), high = set1i(t.high[i]);
    vf top = set1(t.part.maximum[i]);
    for (int g = group_first; g < group_last; ++g) {
      const vi at = add_int(set1i(base + g * VL), iota());
      const vf s = if_within(at, low, high, load(weights + g * VL), hidden);
      store(weights + g * VL, s);
      top = vmax(top, s);
    }
    const float maximum = max_lanes(top);
    t.decay[i] = t.part.maximum[i] - maximum;
    t.part.maximum[i] = maximum;
  }
  for (int i = 0; i < t.queries; i += VL) {
    if (i + VL <= kQueryTile) store(t.decay + i, exp_v(load(t.decay + i)));
  }
  for (int i = 0; i < t.queries; ++i) {
    float* weights = t.weights + i * kKeyBlock;
    const vf maximum = set1(t.part.maximum[i]);
    vf sum = load(t.part_sums + i * VL) * set1(t.decay[i]);
    for (int g = group_first; g < group_last; ++g) {
      const vf p = exp_v(load(weights + g * VL) - maximum);
      store(weights + g * VL, p);
      sum = sum + p;
    }
    store(t.part_sums + i * VL, sum);
  }
}

// ---- many query rows: vectors over query rows ----

// Scores of K keys for V vectors of query rows.
template <int K, int V>
void score_many_tile(const float* const* keys, const float* q, int padded, int dim, float* out,
                     float cap) {
  vf s[K][V];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[k][v] = set1(0.0f);
  const float* row[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) row[k] = keys[k];
  for (int d = 0; d < dim; ++d) {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(q + d * padded + v * VL);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const vf y = set1(row[k][d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) s[k][v] = fma(y, x[v], s[k][v]);
    }
  }
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < V; ++v) store(out + k * padded + v * VL, cap_scores(s[k][v], cap));
}

template <int V>
void score_many_columns(Tile& t, int column, int first, int last) {
  const float cap = t.job->soft_cap;
  const float* q = t.q + column * VL;
  float* out = t.weights + column * VL;
  const int padded = t.padded_queries;
  int k = first;
  for (; k + kRows <= last; k += kRows)
    score_many_tile<kRows, V>(t.keys + k, q, padded, t.dim, out + k * padded, cap);
  for (; k + 4 <= last; k += 4)
    score_many_tile<4, V>(t.keys + k, q, padded, t.dim, out + k * padded, cap);
  for (; k < last; ++k)
    score_many_tile<1, V>(t.keys + k, q, padded, t.dim, out + k * padded, cap);
}

void score_many(Tile& t, int first, int last) {
  const int vectors = t.padded_queries / VL;
  int v = 0;
  for (; v + kVectors <= vectors; v += kVectors) score_many_columns<kVectors>(t, v, first, last);
  if constexpr (kVectors == 4) {
    if (vectors - v == 3) score_many_columns<3>(t, v, first, last);
    if (vectors - v == 2) score_many_columns<2>(t, v, first, last);
  }
  if (vectors - v == 1) score_many_columns<1>(t, v, first, last);
}

// Keys [first, last) of the block at `base`; `edge`: some query does not see all of them.
void soften_many(Tile& t, int32_t base, int first, int last, bool edge) {
  const vf hidden = set1(-__builtin_inff());
  const int padded = t.padded_queries;
  for (int c = 0; c < padded; c += VL) {
    float* weights = t.weights + c;
    const vi low = load_int(t.low + c), high = load_int(t.high + c);
    const vf before = load(t.part.maximum + c);
    vf top = before;
    for (int k = first; k < last; ++k) {
      vf s = load(weights + k * padded);
      if (edge) {
        s = if_within(set1i(base + k), low, high, s, hidden);
        store(weights + k * padded, s);
      }
      top = vmax(top, s);
    }
    const vf decay = exp_v(before - top);
    store(t.part.maximum + c, top);
    store(t.decay + c, decay);
    for (int lane = 0; lane < VL; ++lane) {
      float* sum = t.part_sums + lane * padded + c;
      store(sum, load(sum) * decay);
    }
    for (int k = first; k < last; ++k) {
      const vf p = exp_v(load(weights + k * padded) - top);
      store(weights + k * padded, p);
      float* sum = t.part_sums + k % VL * padded + c;
      store(sum, load(sum) + p);
    }
  }
}

// ---- both: weighted values ----

// values[R][V vectors] = values * decay + sum over keys of weight * value, the last vector of `tail`
// lanes where that is not 0. Of the queries from `query`, and the dimensions from `dim_at`.
template <int R, int V>
void weigh_tile(Tile& t, int query, int dim_at, int first, int last, int query_step, int key_step,
                int tail) {
  const float* weights = t.weights + query * query_step;
  const float* decay = t.decay + query;
  const int padded_dim = t.padded_dim;
  float* values = t.part.values + query * padded_dim + dim_at;
  const int ahead = query == 0 && dim_at == 0 ? t.ahead : 0;
  vf sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf scale = set1(decay[r]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = load(values + r * padded_dim + v * VL) * scale;
  }
  for (int k = first; k < last; ++k) {
    const float* value = t.vals[k] + dim_at;
    if (k < ahead) fetch_ahead(t, t.job->v_cache, k);
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      x[v] = v == V - 1 && tail ? load_n(value + v * VL, tail) : load(value + v * VL);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf p = set1(weights[r * query_step + k * key_step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(p, x[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(values + r * padded_dim + v * VL, sums[r][v]);
}

template <int V>
void weigh_columns(Tile& t, int dim_at, int first, int last, int query_step, int key_step, int tail) {
  int r = 0;
  for (; r + kRows <= t.queries; r += kRows)
    weigh_tile<kRows, V>(t, r, dim_at, first, last, query_step, key_step, tail);
  switch (t.queries - r) {
    case 1: weigh_tile<1, V>(t, r, dim_at, first, last, query_step, key_step, tail); break;
    case 2: weigh_tile<2, V>(t, r, dim_at, first, last, query_step, key_step, tail); break;
    case 3: weigh_tile<3, V>(t, r, dim_at, first, last, query_step, key_step, tail); break;
    case 4: weigh_tile<4, V>(t, r, dim_at, first, last, query_step, key_step, tail); break;
    case 5: weigh_tile<5, V>(t, r, dim_at, first, last, query_step, key_step, tail); break;
  }
}

void weigh(Tile& t, int first, int last, int query_step, int key_step) {
  const int tail = t.dim % VL;
  int d = 0;
  for (; d + kVectors * VL <= t.dim; d += kVectors * VL)
    weigh_columns<kVectors>(t, d, first, last, query_step, key_step, 0);
  switch ((t.dim - d + VL - 1) / VL) {
    case 1: weigh_columns<1>(t, d, first, last, query_step, key_step, tail); break;
    case 2: weigh_columns<2>(t, d, first, last, query_step, key_step, tail); break;
    case 3: weigh_columns<3>(t, d, first, last, query_step, key_step, tail); break;
    case 4: weigh_columns<4>(t, d, first, last, query_step, key_step, tail); break;
  }
}

// ---- partitions ----

void clear_state(Tile& t, State& state) {
  for (int i = 0; i < t.padded_queries; ++i) {
    state.maximum[i] = kNoScore;
    state.sum[i] = 0.0f;
  }
  memset(state.values, 0, sizeof(float) * t.queries * t.padded_dim);
}

using ScoreFew = void (*)(Tile&, int, int);

// Keys [first, last) of the block at `base`, whose places are known; finds the next block's.
void attend_block(Tile& t, int32_t base, int32_t first, int32_t last, ScoreFew score) {
  const int32_t next = base + kKeyBlock;
  const int32_t next_last = next + kKeyBlock < t.last_key ? next + kKeyBlock : t.last_key;
  t.ahead = next_last > next ? next_last - next : 0;
  find_places(t, next, next, next_last, t.places[!t.current]);
  open_block(t, base, first, last);
  const int a = first - base, b = last - base;
  if (score) {
    const int group_first = a / VL, group_last = (b + VL - 1) / VL;
    score(t, group_first, group_last);
    soften_few(t, base, group_first, group_last);
    weigh(t, a, b, kKeyBlock, 1);
    return;
  }
  for (int i = 0; i < t.ahead; ++i) fetch_ahead(t, t.job->k_cache, i);
  bool edge = false;
  for (int i = 0; i < t.padded_queries; ++i) edge |= t.low[i] > first || t.high[i] < last - 1;
  score_many(t, a, b);
  soften_many(t, base, a, b, edge);
  weigh(t, a, b, 1, t.padded_queries);
}

ScoreFew score_function(const Tile& t) {
  static const ScoreFew table[kFewQueries] = {score_few<1>, score_few<2>, score_few<3>,
                                              score_few<4>, score_few<5>, score_few<6>,
                                              score_few<7>, score_few<8>};
  return is_few(t.queries, t.dim) ? table[t.queries - 1] : nullptr;
}

void attend_partition(Tile& t, int32_t partition, ScoreFew score) {
  clear_state(t, t.part);
  memset(t.part_sums, 0, sizeof(float) * t.padded_queries * VL);
  const int32_t start = partition * kPartition;
  for (int32_t base = start; base < start + kPartition; base += kKeyBlock) {
    const int32_t first = base > t.first_key ? base : t.first_key;
    const int32_t last = base + kKeyBlock < t.last_key ? base + kKeyBlock : t.last_key;
    if (first >= last) continue;
    if (!t.placed) find_places(t, base, first, last, t.places[t.current]);
    attend_block(t, base, first, last, score);
    t.placed = true;
    t.current = !t.current;
  }
  if (score) {
    for (int i = 0; i < t.queries; ++i) t.part.sum[i] = sum_lanes(load(t.part_sums + i * VL));
    return;
  }
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width * t.padded_queries; i += VL) {
      float* sum = t.part_sums + i;
      store(sum, load(sum) + load(sum + width * t.padded_queries));
    }
  memcpy(t.part.sum, t.part_sums, sizeof(float) * t.padded_queries);
}

// total += part
void merge_partition(Tile& t) {
  for (int c = 0; c < t.padded_queries; c += VL) {
    const vf old_top = load(t.total.maximum + c), new_top = load(t.part.maximum + c);
    const vf top = vmax(old_top, new_top);
    const vf a = exp_v(old_top - top), b = exp_v(new_top - top);
    store(t.total.maximum + c, top);
    store(t.total.sum + c, fma(load(t.total.sum + c), a, load(t.part.sum + c) * b));
    store(t.merge[0] + c, a);
    store(t.merge[1] + c, b);
  }
  for (int i = 0; i < t.queries; ++i) {
    float* total = t.total.values + i * t.padded_dim;
    const float* part = t.part.values + i * t.padded_dim;
    const vf a = set1(t.merge[0][i]), b = set1(t.merge[1][i]);
    for (int d = 0; d < t.padded_dim; d += VL)
      store(total + d, fma(load(total + d), a, load(part + d) * b));
  }
}

void write_out(Tile& t) {
  const AttentionJob& job = *t.job;
  const int group = job.heads / job.kv_heads;
  const int64_t start = job.cu_query_lens[t.item->row];
  for (int i = 0; i < t.queries; ++i) {
    const int row = t.item->query_first + i;
    float* out = job.out +
        ((start + row / group) * job.heads + t.item->kv_head * group + row % group) * t.dim;
    const float* values = t.total.values + i * t.padded_dim;
    const vf scale = set1(1.0f / t.total.sum[i]);
    for (int d = 0; d < t.dim; d += VL) {
      const vf x = load(values + d) * scale;
      if (d + VL <= t.dim) store(out + d, x);
      else store_n(out + d, x, t.dim - d);
    }
  }
}

void prepare_tile(Tile& t, const AttentionJob& job, const AttentionItem& item) {
  t.job = &job;
  t.item = &item;
  t.table = job.block_tables + item.row * job.table_stride;
  t.dim = job.head_dim;
  t.padded_dim = round_up(t.dim, VL);
  t.queries = item.query_count;
  t.padded_queries = round_up(t.queries, VL);
}

// A partial: maxima, sums, values, each without padding.
void save_partial(const Tile& t, float* to) {
  memcpy(to, t.part.maximum, sizeof(float) * t.queries);
  memcpy(to + t.queries, t.part.sum, sizeof(float) * t.queries);
  to += 2 * t.queries;
  for (int i = 0; i < t.queries; ++i)
    memcpy(to + i * t.dim, t.part.values + i * t.padded_dim, sizeof(float) * t.dim);
}

void load_partial(Tile& t, const float* from) {
  memcpy(t.part.maximum, from, sizeof(float) * t.queries);
  memcpy(t.part.sum, from + t.queries, sizeof(float) * t.queries);
  from += 2 * t.queries;
  for (int i = 0; i < t.queries; ++i)
    memcpy(t.part.values + i * t.padded_dim, from + i * t.dim, sizeof(float) * t.dim);
}

// Tile: one item.
void attention_tile(const void* data, int64_t index) {
  const AttentionJob& job = *(const AttentionJob*)data;
  Tile t;
  prepare_tile(t, job, job.items[index]);
  load_queries(t);
  const ScoreFew score = score_function(t);
  t.current = 0;
  t.placed = false;
  if (t.item->partial < 0) clear_state(t, t.total);
  for (int32_t p = t.item->partition_first; p < t.item->partition_last; ++p) {
    attend_partition(t, p, score);
    if (t.item->partial < 0) merge_partition(t);
    else save_partial(t, job.partials + t.item->partial);
  }
  if (t.item->partial < 0) write_out(t);
}

// Tile: one row and head whose partitions were computed apart.
void attention_merge_tile(const void* data, int64_t index) {
  const MergeJob& merge = *(const MergeJob*)data;
  const MergeItem& from = merge.items[index];
  const AttentionItem item = {from.row, from.kv_head, from.query_first, from.query_count, 0, 0, -1};
  Tile t;
  prepare_tile(t, *merge.attention, item);
  clear_state(t, t.total);
  clear_state(t, t.part);
  const int64_t size = partial_size(t.queries, t.dim);
  for (int p = 0; p < from.partitions; ++p) {
    load_partial(t, merge.attention->partials + from.partial + p * size);
    merge_partition(t);
  }
  write_out(t);
}

}  // namespace
