// The part of attention that one thread computes at a time: queries, state, and where its keys are.
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

}  // namespace
