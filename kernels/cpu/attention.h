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

#include "attention_scores.h"

namespace {

using namespace headgate;

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
