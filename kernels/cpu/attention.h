// Causal attention over paged keys and values, for decode rows and prompt chunks alike.
//
// The order of every sum is fixed by absolute key positions, so that a token's result has the same
// bits in any batch and however its prompt was chunked:
//  - a score is the sum of kLanes chains of fused multiply-adds, of every kLanes-th dimension each,
//    folded by halves;
//  - within a partition of kPartition keys an online softmax goes block by block (kKeyBlock keys),
//    the sum of weights kept in kSums partial sums by (key position mod kSums), the weighted values
//    as one chain over ascending keys;
//  - partitions are merged in ascending order.
// Keys a token may not see weigh exactly zero, and blocks without any leave the state as it is.
//
// In pairs (kRounded, kRoundedPairs): where the cache is bfloat16 and the model's products round their
// inputs, queries are rounded to bfloat16 once they are scaled, and weights before they are added up and
// multiplied. Then two dimensions of a key, and two keys' values of a dimension, are multiplied together,
// as bf16_pairs.h says. Chains of a score are of every kLanes-th pair of dimensions; a pair of
// keys are positions 2j and 2j + 1, of which one that a token may not see weighs zero. All else is as above.
//
// Where keys and values are bytes with scales, sums are of the bytes: a score is multiplied by its
// key's scale, a weight by its value's, once it has been added to the sum of weights.
//
// In bytes (kBytes, kByteDots): where the cache has such and the model's products round their inputs, queries
// are made bytes too once they are scaled, by their largest as keys are, and weights, times their values' scales,
// whole 255ths of the largest that a query has in the block. Then sums are whole numbers, exact in any order: a
// score becomes a float once, a block's weighted values do before they are added to the state.
//
// Two ways lead to the same numbers, on every instruction set with fused multiply-adds. Few query
// rows (decode): vectors hold the chains of a score, and keys and values are widened as they are
// read. Many: vectors run over query rows, and keys, a block of which is widened first, are
// broadcast. Pairs and bytes are not widened: keys are read as they are, and two or four keys' values laid side by
// side.
// In both, all query heads of a group share one reading of its keys and values. Of few, an item may have
// several key/value heads, which are taken in turn for each block: memory is then read in the order in
// which a position's heads lie in it, and not once for each head with gaps.
#pragma once

#include "attention_scores.h"

namespace {

using namespace headgate;

// Whether values of 64 bytes are put in order once their sums are known.
template <int T, bool FEW, int V>
constexpr bool kOrderedLast = FEW && in_bytes(T) && VL == 16 && V == 4;

// V vectors of dimensions of the values of a step's keys, the last one of `tail` lanes where that is not 0. `quads`:
// many queries' values in bytes.
template <int T, bool FEW, int V>
HG_INLINE void load_values_of(const void* const* values, const float* quads, ptrdiff_t at, int tail, vf (&x)[V]) {
#if defined(__AVX512F__)
  if constexpr (kOrderedLast<T, FEW, V>) {
    vi columns[V];
    quad_rows64(values, at, columns);
    for (int v = 0; v < V; ++v) x[v] = as_float(columns[v]);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if constexpr (in_bytes(T) && !FEW) x[v] = load(quads + v * VL);
    else x[v] = v == V - 1 && tail ? load_values_n<T>(values, at + v * VL, tail) : load_values<T>(values, at + v * VL);
  }
}

// values[R][V vectors] = values * decay + sum over keys of weight * value, the last vector of `tail`
// lanes where that is not 0. Of the queries from `query`, and the dimensions from `dim_at`.
template <int T, bool FEW, int R, int V>
void weigh_tile(Tile& t, int query, int dim_at, int first, int last, int tail) {
  const float* decay = t.decay + query;
  const int padded_dim = t.padded_dim;
  const ptrdiff_t at = t.head * t.dim + dim_at;
  float* values = t.part.values + query * padded_dim + dim_at;
  const int whole = t.queries * (padded_dim / VL);  // what the weighing of one value takes
  Asked asked = t.asked_vals;
  Sum<T> sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf scale = set1(decay[r]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (in_bytes(T)) sums[r][v] = set1i(0);
      else sums[r][v] = load(values + r * padded_dim + v * VL) * scale;
    }
  }
  constexpr int kStep = kKeyStep<T>, query_step = FEW ? kKeyBlock : 1;
  first = first / kStep * kStep;
  const ptrdiff_t step = FEW ? 1 : t.padded_queries;
  const float* weights = t.weights + query * query_step + first / kStep * step;
  const float* quads = t.wide_vals + first / kStep * padded_dim + dim_at;
  for (int k = first; k < last; k += kStep, weights += step, quads += padded_dim) {
    fetch_evenly<fetch_value>(t, asked, R * V * kStep, whole);
    vf x[V];
    load_values_of<T, FEW, V>(t.vals + k, quads, at, tail, x);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf p = set1(weights[r * query_step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add<T>(p, x[v], sums[r][v]);
    }
  }
  t.asked_vals = asked;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#if defined(__AVX512F__)
    if constexpr (kOrderedLast<T, FEW, V>) in_order(sums[r]);
#endif
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = values + r * padded_dim + v * VL;
      if constexpr (in_bytes(T))
        store(to, fma(to_float(sums[r][v]), set1(t.weight_scales[query + r]), load(to) * set1(decay[r])));
      else store(to, sums[r][v]);
    }
  }
}

template <int T, bool FEW, int V>
void weigh_columns(Tile& t, int dim_at, int first, int last, int tail) {
  const auto weigh = [&](auto tile, int r) { tile(t, r, dim_at, first, last, tail); };
  const int count = t.item->query_count, last_row = (t.head + 1) * count;
  int r = t.head * count;
  constexpr int kMost = kRowsOf<T>;
  for (; r + kMost <= last_row; r += kMost) weigh(weigh_tile<T, FEW, kMost, V>, r);
  switch (last_row - r) {
    case 1: weigh(weigh_tile<T, FEW, 1, V>, r); break;
    case 2: weigh(weigh_tile<T, FEW, 2, V>, r); break;
    case 3: weigh(weigh_tile<T, FEW, 3, V>, r); break;
    case 4: weigh(weigh_tile<T, FEW, 4, V>, r); break;
    case 5: weigh(weigh_tile<T, FEW, 5, V>, r); break;
  }
}

// The values of one head. T: of what `vals` points at.
template <int T, bool FEW>
void weigh(Tile& t, int first, int last) {
  const int tail = t.dim % VL;
  int d = 0;
  for (; d + kVectors * VL <= t.dim; d += kVectors * VL)
    weigh_columns<T, FEW, kVectors>(t, d, first, last, 0);
  switch ((t.dim - d + VL - 1) / VL) {
    case 1: weigh_columns<T, FEW, 1>(t, d, first, last, tail); break;
    case 2: weigh_columns<T, FEW, 2>(t, d, first, last, tail); break;
    case 3: weigh_columns<T, FEW, 3>(t, d, first, last, tail); break;
    case 4: weigh_columns<T, FEW, 4>(t, d, first, last, tail); break;
  }
}

void clear_state(Tile& t, State& state) {
  for (int i = 0; i < t.padded_queries; ++i) {
    state.maximum[i] = kNoScore;
    state.sum[i] = 0.0f;
  }
  memset(state.values, 0, sizeof(float) * t.queries * t.padded_dim);
}

// What is done with a block, by the number of a head's query rows and the product.
struct Way {
  void (*score)(Tile&, int first, int last);  // few: groups of VL keys; many: keys
  void (*soften_few)(Tile&, int32_t base, int group_first, int group_last);
  void (*soften_many)(Tile&, int32_t base, int first, int last, bool edge);
  void (*weigh)(Tile&, int first, int last);
};

template <int T>
Way few_of(int queries) {
  static void (*const score[])(Tile&, int, int) = {
      score_few<1, T>, score_few<2, T>,  score_few<3, T>,  score_few<4, T>,
      score_few<5, T>, score_few<6, T>,  score_few<7, T>,  score_few<8, T>,
      score_few<9, T>, score_few<10, T>, score_few<11, T>, score_few<12, T>};
  static_assert(sizeof score / sizeof *score == kFewQueries, "one function for each number");
  return {score[queries - 1], soften_few<T>, nullptr, weigh<T, true>};
}

template <int T>
Way many_of() {
  return {score_many<T>, nullptr, soften_many<T>, weigh<T, false>};
}

Way choose_way(const Tile& t) {
  const int queries = t.item->query_count, product = t.job->product;
  const bool few = t.few;
#if defined(__AVX512F__)
  if (product == kRoundedPairs) return few ? few_of<kRoundedPairs>(queries) : many_of<kRoundedPairs>();
  if (product == kByteDots) return few ? few_of<kByteDots>(queries) : many_of<kByteDots>();
#endif
  if (product == kBytes) return few ? few_of<kBytes>(queries) : many_of<kBytes>();
  if (product == kRounded) return few ? few_of<kRounded>(queries) : many_of<kRounded>();
  if (!few) return many_of<kFloat32>();
  if (product == kBFloat16) return few_of<kBFloat16>(queries);
  if (product == kFloat16) return few_of<kFloat16>(queries);
  if (product == kScaledBytes) return few_of<kScaledBytes>(queries);
  return few_of<kFloat32>(queries);
}

// Of few query rows, keys [a, b) of a block: kTurn of one head, then those of the next.
void score_by_turns(Tile& t, int a, int b, const Way& way) {
  for (int k = a / VL * VL; k < b; k += kTurn) {
    const int end = k + kTurn < b ? k + kTurn : b;
    for (t.head = 0; t.head < t.item->kv_count; ++t.head) way.score(t, k / VL, (end + VL - 1) / VL);
  }
}

void weigh_by_turns(Tile& t, int a, int b, const Way& way) {
  // A block's whole sums become floats once.
  const int turn = in_bytes(t.job->product) ? kKeyBlock : kTurn;
  for (int k = a; k < b; k = k / turn * turn + turn) {
    const int end = k / turn * turn + turn;
    for (t.head = 0; t.head < t.item->kv_count; ++t.head) way.weigh(t, k, end < b ? end : b);
    if (end >= b) return;
    for (int i = 0; i < t.padded_queries; ++i) t.decay[i] = 1.0f;  // the values have decayed
  }
}

// Keys [first, last) of the block at `base`, whose places are known; asks for those to come.
void attend_block(Tile& t, int32_t base, int32_t first, int32_t last, const Way& way) {
  look_ahead(t, first, last);
  open_block(t, base, first, last, !t.few && !in_pairs(t.job->product) && !in_bytes(t.job->product));
  const int a = first - base, b = last - base;
  if (t.few) {
    score_by_turns(t, a, b, way);
    way.soften_few(t, base, a / VL, (b + VL - 1) / VL);
    weigh_by_turns(t, a, b, way);
    fetch_rest(t);
    return;
  }
  if (in_bytes(t.job->product)) lay_quads(t, a, b);
  bool edge = false;
  for (int i = 0; i < t.queries; ++i) edge |= t.low[i] > first || t.high[i] < last - 1;
  way.score(t, a, b);
  way.soften_many(t, base, a, b, edge);
  way.weigh(t, a, b);
  fetch_rest(t);
}

// The first vector of N at `from`, so many floats apart, once halves are folded onto each other.
template <int N>
HG_INLINE vf fold_vectors(const float* from, int step) {
  vf sums[N];
  for (int n = 0; n < N; ++n) sums[n] = load(from + n * step);
  for (int width = N / 2; width; width /= 2)
    for (int n = 0; n < width; ++n) sums[n] = sums[n] + sums[n + width];
  return sums[0];
}

// The sums of weights. Of few, a query's partial sums are side by side; of many, queries'.
void fold_sums(Tile& t) {
  if (t.few) {
    for (int i = 0; i < t.queries; ++i)
      t.part.sum[i] = sum_lanes(fold_vectors<kSums / VL>(t.part_sums + i * kSums, VL));
    return;
  }
  for (int c = 0; c < t.padded_queries; c += VL)
    store(t.part.sum + c, fold_vectors<kSums>(t.part_sums + c, t.padded_queries));
}

void attend_partition(Tile& t, int32_t partition, const Way& way) {
  clear_state(t, t.part);
  memset(t.part_sums, 0, sizeof(float) * t.padded_queries * kSums);
  const int32_t start = partition * kPartition;
  for (int32_t base = start; base < start + kPartition; base += kKeyBlock) {
    const int32_t first = base > t.seen.first ? base : t.seen.first;
    const int32_t last = block_end(base, t.seen);
    if (first >= last) continue;
    find_places(*t.job, *t.item, base, first, last, t.places);
    attend_block(t, base, first, last, way);
  }
  fold_sums(t);
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
  for (int i = 0; i < t.queries; ++i) {
    const int kv_head = t.item->kv_head + i / t.item->query_count;
    const int64_t head = kv_head * group + query_row(*t.item, i) % group;
    float* out = job.out + (token_of(job, *t.item, i).index * int64_t(job.heads) + head) * t.dim;
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
  t.dim = job.head_dim;
  t.padded_dim = round_up(t.dim, VL);
  t.lanes = in_bytes(job.product) ? t.dim / 4 : in_pairs(job.product) ? t.dim / 2 : t.dim;
  t.head = 0;
  t.few = is_few(item.query_count, t.dim);
  t.passes_by = t.few && VL != 16 && !is_intel();
  t.queries = item.kv_count * item.query_count;
  t.padded_queries = round_up(t.queries, VL);
}

// Where a query's result of a partition goes.
float* partial_of(const Tile& t, int32_t partition, int query) {
  const AttentionJob& job = *t.job;
  const AttentionItem& item = *t.item;
  int64_t place = (partition - item.partition_first) * t.queries + query, first = item.partial;
  if (item.token_first >= 0) {
    const int group = job.heads / job.kv_heads;
    const SharerToken& token = job.sharer_tokens[item.token_first + query / group];
    const Sharer& sharer = job.sharers[token.sharer];
    const int head = item.kv_head / sharer.together * sharer.together;  // the first of those together
    const int left = job.kv_heads - head, count = sharer.together < left ? sharer.together : left;
    const int64_t heads = int64_t(head) * sharer.partitions + partition * count + item.kv_head - head;
    place = heads * sharer.queries + token.token * group + query % group;
    first = sharer.partial;
  }
  return job.partials + first + partial_size(place, t.dim);
}

void save_partials(const Tile& t, int32_t partition) {
  for (int i = 0; i < t.queries; ++i) {
    float* to = partial_of(t, partition, i);
    to[0] = t.part.maximum[i];
    to[1] = t.part.sum[i];
    memcpy(to + 2, t.part.values + i * t.padded_dim, sizeof(float) * t.dim);
  }
}

void load_partials(Tile& t, const float* from) {
  for (int i = 0; i < t.queries; ++i, from += partial_size(1, t.dim)) {
    t.part.maximum[i] = from[0];
    t.part.sum[i] = from[1];
    memcpy(t.part.values + i * t.padded_dim, from + 2, sizeof(float) * t.dim);
  }
}

// Tile: one item.
void attention_tile(const void* data, int64_t index) {
  const AttentionJob& job = *(const AttentionJob*)data;
  Tile t;
  prepare_tile(t, job, job.items[index]);
  t.seen = keys_of(job, *t.item);
  load_queries(t);
  const Way way = choose_way(t);
  enter_stream(job, *t.item, t.seen);
  if (t.item->partial < 0) clear_state(t, t.total);
  for (int32_t p = t.item->partition_first; p < t.item->partition_last; ++p) {
    attend_partition(t, p, way);
    if (t.item->partial < 0) merge_partition(t);
    else save_partials(t, p);
  }
  if (t.item->partial < 0) write_out(t);
}

// Tile: an item whose partitions were computed apart.
void attention_merge_tile(const void* data, int64_t index) {
  const MergeJob& merge = *(const MergeJob*)data;
  const MergeItem& from = merge.items[index];
  const AttentionItem item = {from.row, from.kv_head, from.kv_count, from.query_first,
                              from.query_count, 0, 0, -1, -1, 0};
  Tile t;
  prepare_tile(t, *merge.attention, item);
  clear_state(t, t.total);
  clear_state(t, t.part);
  const int64_t size = partial_size(t.queries, t.dim);
  for (int p = 0; p < from.partitions; ++p) {
    load_partials(t, merge.attention->partials + from.partial + p * size);
    merge_partition(t);
  }
  write_out(t);
}

}  // namespace
