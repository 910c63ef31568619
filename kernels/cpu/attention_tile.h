// The part of attention that one thread computes at a time: queries, state, and where its keys are.
#pragma once

#include "ahead.h"
#include "bf16_pairs.h"
#include "int8_rows.h"
#include "interleave.h"
#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

constexpr float kNoScore = -1e38f;  // below every score, yet far from overflow when subtracted
constexpr int kSums = 16;           // partial sums of weights, whatever VL
constexpr int kRows = 6;            // rows and vectors of the inner products: sums in registers
constexpr int kVectors = VL == 16 ? 4 : 2;
// Of few query rows: how many keys of one head are worked on before the next head's turn, and how far in advance
// of its use memory is asked for a key. Where both are small, what was asked for is still in the first-level
// cache when it is used, and takes none of the core's few slots for misses a second time. (Measured with AVX2
// alone.)
constexpr int kTurn = VL == 16 ? kKeyBlock : 16;
constexpr int kFewLead = VL == 16 ? kKeyBlock : 16;
constexpr int kManyLead = kKeyBlock;
// Keys in bytes lie so many lanes apart for many query rows.
constexpr int kByteKeyStride = kMaxHeadDim / 4;

HG_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The query rows of one item and the running state of their softmax.
struct State {
  alignas(64) float maximum[kQueryTile];
  alignas(64) float sum[kQueryTile];
  alignas(64) float values[kQueryTile * kMaxHeadDim];  // [query][dim padded to VL]
};

// How many keys, or values, of those to come memory was asked for, and the work done towards the next one.
struct Asked {
  int count, work;
};

// Positions [first, last) that some query row of an item sees.
struct Keys {
  int32_t first, last;
};

// Where the cache has the keys and values of a block, or those to be asked for beside it, in elements, and their
// scales if there are any.
struct Places {
  int64_t numbers[kKeyBlock + kManyLead];
  int64_t scales[kKeyBlock + kManyLead];
};

// The keys that a thread comes to, item by item, and how far it has asked memory for them. It asks for
// as many as it works on at the time, some in advance: also where rows end with a short block, on
// which there is too little work to hide the next one's way from memory.
struct Stream {
  int64_t job;                   // whose items these are: another's may not be looked at
  const AttentionItem* item;     // what is to be asked for next: of an item's keys those from `key` on
  int32_t key, last;
  const AttentionItem* awaited;  // the thread's next item, if it comes as expected
  int32_t lead;                  // keys asked for, from those of the block at hand on; -1: it is new
};
thread_local Stream stream;

struct Tile {
  const AttentionJob* job;
  const AttentionItem* item;
  int dim, padded_dim, queries, padded_queries;
  int lanes;  // of 32 bits that a query or key is multiplied in: a dimension's; of pairs, two of them; of bytes four
  int head;  // which of the item's is worked on
  bool few;  // of the two ways that attention.h tells of
  bool passes_by;  // whether what it asks memory for passes by the larger caches
  Keys seen;                            // of the item
  alignas(64) int32_t low[kQueryTile];  // keys each query sees: [low, high]
  alignas(64) int32_t high[kQueryTile];
  // Scaled. Few: of each head [lane / kLanes][query][kLanes]; many: [lane][query].
  alignas(64) float q[kQueryTile * kMaxHeadDim];
  State total, part;
  alignas(64) float part_sums[kQueryTile * kSums];    // few: [query][sum], many: [sum][query]
  alignas(64) float weights[kQueryTile * kKeyBlock];  // few: [query][key], many: [key][query]; pairs of keys
  alignas(64) float decay[kQueryTile];             // what the block's new maximum makes of old sums
  alignas(64) float merge[2][kQueryTile];
  const void* keys[kKeyBlock];  // few, and pairs, and bytes: as the cache has them; many: float32
  const void* vals[kKeyBlock];
  // Of this block and each of the item's heads, zero for positions outside of it.
  alignas(64) float key_scales[kQueryTile][kKeyBlock];
  alignas(64) float val_scales[kQueryTile][kKeyBlock];
  // Of bytes: of each query, and what its whole sums have too much because keys are biased; of its weights.
  alignas(64) float query_scales[kQueryTile];
  alignas(64) int32_t query_offsets[kQueryTile];
  alignas(64) float weight_scales[kQueryTile];
  float nothing[kQueryTile];  // 0, or NaN where one of a head's values is, which a maximum of weights may lose
  Places places;            // of this block
  Places ahead_places;      // of what memory is to be asked for meanwhile
  int ahead, ahead_bytes;   // number of those, and what their item reads at each
  Asked asked_keys, asked_vals;
  // Blocks of a narrower cache, widened.
  alignas(64) float wide_keys[kKeyBlock * kMaxHeadDim];
  alignas(64) float wide_vals[kKeyBlock * kMaxHeadDim];
};

// The item's query rows are those of its first head, then those of the next one, and so on.
HG_INLINE int query_row(const AttentionItem& item, int query) {
  return item.query_first + query % item.query_count;
}

// The token of a query row, and its position.
struct Token {
  int32_t index, position;
};

HG_INLINE Token token_of(const AttentionJob& job, const AttentionItem& item, int query) {
  int32_t row = item.row, token = query_row(item, query) / (job.heads / job.kv_heads);
  if (item.token_first >= 0) {
    const SharerToken& shared = job.sharer_tokens[item.token_first + token];
    row = job.sharers[shared.sharer].row;
    token = shared.token;
  }
  const int32_t start = job.cu_query_lens[row], end = job.cu_query_lens[row + 1];
  return {start + token, job.context_lens[row] - (end - start) + token};
}

HG_INLINE int32_t first_seen(const AttentionJob& job, int32_t position) {
  return job.window && position >= job.window ? position - job.window + 1 : 0;
}

// Those within the item's partitions.
Keys keys_of(const AttentionJob& job, const AttentionItem& item) {
  const int32_t seen = first_seen(job, token_of(job, item, 0).position);
  const int32_t end = token_of(job, item, item.query_count - 1).position + 1;
  const int32_t low = item.partition_first * kPartition, high = item.partition_last * kPartition;
  return {seen > low ? seen : low, end < high ? end : high};
}

// One query row, scaled and in lanes.
template <int T>
void round_query(const float* q, float scale, int dim, float* lanes) {
  for (int d = 0; d < dim; d += VL) store_rounded<T>((uint16_t*)lanes + d, load(q + d) * set1(scale));
}
void load_query(const Tile& t, const float* q, float* lanes) {
  const float scale = t.job->scale;
  if (t.job->product == kRoundedPairs) return round_query<kRoundedPairs>(q, scale, t.dim, lanes);
  if (t.job->product == kRounded) return round_query<kRounded>(q, scale, t.dim, lanes);
  for (int d = 0; d < t.dim; ++d) lanes[d] = q[d] * scale;
}

// Bytes are stored signed, and multiplied as unsigned ones with signed ones: keys have 128 too much then.
HG_INLINE vi biased(vi bytes) { return xor_int(bytes, set1i((int)0x80808080u)); }

void quantise_query(Tile& t, int query, const float* q, float* lanes) {
  float scaled[kMaxHeadDim];
  for (int d = 0; d < t.dim; ++d) scaled[d] = q[d] * t.job->scale;
  int8_t* bytes = (int8_t*)lanes;
  t.query_scales[query] = quantise_row(scaled, bytes, t.dim);
  int32_t sum = 0;
  for (int d = 0; d < t.dim; ++d) sum += bytes[d];
  t.query_offsets[query] = -128 * sum;
}

void load_queries(Tile& t) {
  const AttentionJob& job = *t.job;
  const AttentionItem& item = *t.item;
  const int group = job.heads / job.kv_heads, count = item.query_count;
  float* rows = t.wide_keys;  // [query][lane]; of no use before there are keys
  for (int i = 0; i < t.queries; ++i) {
    const Token token = token_of(job, item, i);
    const int head = (item.kv_head + i / count) * group + query_row(item, i) % group;
    t.high[i] = token.position;
    t.low[i] = first_seen(job, t.high[i]);
    float* row = rows + i * t.lanes;
    const float* q = job.q + token.index * job.q_token_stride + head * job.q_head_stride;
    if (in_bytes(job.product)) quantise_query(t, i, q, row);
    else load_query(t, q, row);
    if (!t.few) continue;
    float* to = t.q + i / count * count * t.lanes + i % count * kLanes;
    for (int n = 0; n < t.lanes; n += kLanes) memcpy(to + n * count, row + n, kLanes * sizeof(float));
  }
  for (int i = t.queries; i < t.padded_queries; ++i) {  // lanes that pad a vector see nothing
    t.low[i] = 1;
    t.high[i] = 0;
    t.query_scales[i] = 0.0f;
    t.query_offsets[i] = 0;
    memset(rows + i * t.lanes, 0, t.lanes * sizeof(float));
  }
  if (!t.few) interleave(rows, t.lanes, t.padded_queries, t.lanes, t.q);
}

// Finds the places of positions [first, last) of the block that starts at `base`, for an item's
// first head; the others' are beside them.
void find_places(const AttentionJob& job, const AttentionItem& item, int32_t base, int32_t first,
                 int32_t last, Places& places) {
  const int64_t size = job.block_size, step = int64_t(job.kv_heads) * job.head_dim;
  const int32_t* table = job.block_tables + item.row * job.table_stride;
  int64_t block = first / size, offset = first % size;
  for (int32_t key = first; key < last; ++block, offset = 0) {
    const int count = size - offset < last - key ? int(size - offset) : last - key;
    const int64_t start = (table[block] * size + offset) * step + item.kv_head * job.head_dim;
    for (int i = 0; i < count; ++i) places.numbers[key - base + i] = start + i * step;
    if (job.k_scales) {
      const int64_t scales = (int64_t(table[block]) * job.kv_heads + item.kv_head) * size + offset;
      for (int i = 0; i < count; ++i) places.scales[key - base + i] = scales + i;
    }
    key += count;
  }
}

HG_INLINE int32_t block_end(int32_t base, const Keys& keys) {
  return base + kKeyBlock < keys.last ? base + kKeyBlock : keys.last;
}

// The stream is at an item that the thread begins; it starts anew if that is not the one awaited.
void enter_stream(const AttentionJob& job, const AttentionItem& item, const Keys& seen) {
  if (stream.job != job.number || stream.awaited != &item)
    stream = {job.number, &item, seen.first, seen.last, nullptr, -1};
  stream.awaited = &item + job.item_stride;
}

// Finds the places of what memory is to be asked for during the work on keys [first, last).
void look_ahead(Tile& t, int32_t first, int32_t last) {
  const AttentionJob& job = *t.job;
  t.ahead = 0;
  t.ahead_bytes = t.item->kv_count * t.dim * item_size(job.cache_dtype);
  const int count = last - first;
  const int lead = t.few ? kFewLead : kManyLead;
  t.asked_keys = t.asked_vals = {0, 0};
  if (stream.lead < 0) {  // a new one: it does not ask for what is worked on first
    stream.lead = 0;
    t.asked_keys.count = t.asked_vals.count = count < lead ? count : lead;
  }
  const int wanted = lead + count - stream.lead;
  const AttentionItem* end = job.items + job.item_count;
  while (t.ahead < wanted && stream.item < end) {
    if (stream.key >= stream.last) {
      stream.item += job.item_stride;
      if (stream.item >= end) break;
      const Keys keys = keys_of(job, *stream.item);
      stream.key = keys.first;
      stream.last = keys.last;
    }
    const int left = stream.last - stream.key;
    const int more = left < wanted - t.ahead ? left : wanted - t.ahead;
    find_places(job, *stream.item, stream.key - t.ahead, stream.key, stream.key + more, t.ahead_places);
    stream.key += more;
    t.ahead += more;
  }
  stream.lead += t.ahead - count;
}

// Asks for one key or value of those to come, of all heads of its item at once. Calls are spread over
// the work on this block: a burst would fill the core's few slots for misses, and then stall it while
// memory has nothing to do. What few queries read nobody else will: without AVX-512 it passes by the larger
// caches, but for Intel's processors.
HG_INLINE void fetch_ahead(const Tile& t, const void* cache, const float* scales, int i) {
  const Places& places = t.ahead_places;
  const char* p = (const char*)cache + places.numbers[i] * item_size(t.job->cache_dtype);
  for (int byte = 0; byte < t.ahead_bytes; byte += 64) {
    if (t.passes_by) fetch_passing_by<64>(p + byte);
    else fetch_to_second_level<64>(p + byte);
  }
  if (!scales || i % 16) return;
  for (int head = 0; head < t.item->kv_count; ++head)
    fetch_to_second_level<1>((const char*)(scales + places.scales[i] + head * t.job->block_size));
}
HG_INLINE void fetch_key(const Tile& t, int i) {
  fetch_ahead(t, t.job->k_cache, t.job->k_scales, i);
}
HG_INLINE void fetch_value(const Tile& t, int i) {
  fetch_ahead(t, t.job->v_cache, t.job->v_scales, i);
}

// After so much work on a block: FETCHes the next one each time that `whole` has been done.
template <void (*FETCH)(const Tile&, int)>
HG_INLINE void fetch_evenly(const Tile& t, Asked& asked, int work, int whole) {
  for (asked.work += work; asked.work >= whole; asked.work -= whole)
    if (asked.count < t.ahead) FETCH(t, asked.count++);
}

// What a short block left over.
void fetch_rest(Tile& t) {
  while (t.asked_keys.count < t.ahead) fetch_key(t, t.asked_keys.count++);
  while (t.asked_vals.count < t.ahead) fetch_value(t, t.asked_vals.count++);
}

const float* widen_to(float* to, const void* from, int dtype, int dim) {
  if (dtype == kScaledBytes) widen_bytes((const int8_t*)from, to, dim);
  else if (dtype == kBFloat16) widen_row<true>((const uint16_t*)from, to, dim);
  else widen_row<false>((const uint16_t*)from, to, dim);
  return to;
}

float nothing_of(const float* scales) {
  vf sum = set1(0.0f);
  for (int i = 0; i < kKeyBlock; i += VL) sum = sum + (load(scales + i) - load(scales + i));
  return sum_lanes(sum);
}

void bias_to(float* to, const float* from, int lanes) {
  int i = 0;
  for (; i + VL <= lanes; i += VL) store(to + i, as_float(biased(load_int(from + i))));
  if (i < lanes) store_n(to + i, as_float(biased(as_int(load_n(from + i, lanes - i)))), lanes - i);
}

// The scales of positions [first, last) of the block at `base`, and zeros for its others.
void load_scales(const AttentionJob& job, const float* scales, const Places& places, int32_t base, int32_t first,
                 int32_t last, float* to) {
  memset(to, 0, kKeyBlock * sizeof(float));
  for (int32_t key = first; key < last;) {
    const int32_t left = job.block_size - key % job.block_size, count = left < last - key ? left : last - key;
    memcpy(to + key - base, scales + places.scales[key - base], count * sizeof(float));
    key += count;
  }
}

// Points `keys` and `vals` at positions [first, last) of the block at `base`, `widen`ed to float32
// where the cache is narrower, but not scaled; the block's other entries point at one of them, so that
// they can be read (their weights are zero).
void open_block(Tile& t, int32_t base, int32_t first, int32_t last, bool widen) {
  const AttentionJob& job = *t.job;
  const int size = item_size(job.cache_dtype);
  const Places& places = t.places;
  if (job.k_scales) {
    for (int head = 0; head < t.item->kv_count; ++head) {
      load_scales(job, job.k_scales + head * job.block_size, places, base, first, last, t.key_scales[head]);
      load_scales(job, job.v_scales + head * job.block_size, places, base, first, last, t.val_scales[head]);
      t.nothing[head] = nothing_of(t.val_scales[head]);
    }
  }
  const char* keys = (const char*)job.k_cache;
  const char* values = (const char*)job.v_cache;
  for (int i = first - base; i < last - base; ++i) {
    t.keys[i] = keys + places.numbers[i] * size;
    t.vals[i] = values + places.numbers[i] * size;
  }
  for (int i = first - base; i < last - base && widen && job.cache_dtype != kFloat32; ++i) {
    t.keys[i] = widen_to(t.wide_keys + i * t.dim, t.keys[i], job.cache_dtype, t.dim);
    t.vals[i] = widen_to(t.wide_vals + i * t.dim, t.vals[i], job.cache_dtype, t.dim);
  }
  for (int i = 0; i < first - base; ++i) t.keys[i] = t.keys[first - base];
  for (int i = last - base; i < kKeyBlock; ++i) t.keys[i] = t.keys[last - 1 - base];
  if (in_bytes(job.product) && !t.few)
    for (int i = first - base; i < last - base; ++i)
      bias_to(t.wide_keys + i * kByteKeyStride, (const float*)t.keys[i], t.lanes);
  // The other keys of a pair, or of four.
  for (int i = (first - base) / 4 * 4; i < first - base; ++i) t.vals[i] = t.vals[first - base];
  for (int i = last - base; i % 4; ++i) t.vals[i] = t.vals[last - 1 - base];
}

}  // namespace
