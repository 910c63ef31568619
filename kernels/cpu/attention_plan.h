// How attention over a step's rows is cut into items that threads take one after the other.
//
// An item is a tile of query rows on one key/value head, or on several that are read together where
// there is work enough to share out without cutting between them. The costliest come first, and none costs
// more than a small share of the whole where it can be cut along its keys: so threads end together,
// also with a long row among short ones. Cuts fall on partitions, whose results are merged in
// ascending order, which is what a whole item does too: they change no bits. Keys that several rows
// share are an item for all of those (attention_sharing.h).
#pragma once

#include <algorithm>
#include <vector>

#include "attention_sharing.h"

namespace headgate {

struct AttentionItems {
  std::vector<AttentionItem> attend;
  TileGroups homes;      // of those
  std::vector<MergeItem> merge;
  std::vector<Sharer> sharers;
  std::vector<SharerToken> sharer_tokens;
  int64_t partials = 0;  // floats
  int64_t cost = 0;      // nanoseconds, roughly
};

constexpr int64_t kMergedPerNanosecond = 2;
// Items that there are at least for each thread, where rows are long enough.
constexpr int64_t kItemsPerThread = 4;
// Bytes of a position's keys, at most, that are read together: blocks of those, of their values and
// of what comes next stay in a core's cache.
constexpr int64_t kTogetherBytes = 1024;

namespace {

// Of so many query rows on the keys of `positions`.
int64_t cost_of(const AttentionJob& job, int64_t positions, int64_t queries) {
  // A key and value of 64 dimensions take 20 ns to read in float32, and 3 ns for each query.
  const int read = job.cache_dtype == kFloat32 ? 20 : 10;
  return 1 + positions * (read + 3 * queries) * job.head_dim / 64;
}

// A tile of a row's query rows, on any one head, and the keys of partitions from `partition` on.
AttentionItem query_tile(const AttentionJob& job, int row, int64_t tile, int32_t partition) {
  const int group = job.heads / job.kv_heads;
  const int32_t tokens = job.cu_query_lens[row + 1] - job.cu_query_lens[row];
  const int64_t left = int64_t(tokens) * group - tile * kQueryTile;
  const int first = int(tile * kQueryTile), count = int(left < kQueryTile ? left : kQueryTile);
  const int32_t position = job.context_lens[row] - tokens;
  const int32_t low = position + first / group, high = position + (first + count - 1) / group;
  const int32_t seen = job.window && low >= job.window ? low - job.window + 1 : 0;
  const int32_t start = std::max(seen, partition * kPartition);
  const int64_t cost = cost_of(job, high + 1 - start, count);
  return {row, 0, 1, first, count, start / kPartition, high / kPartition + 1, -1, -1, cost};
}

// How many heads an item of such a tile has, the last one fewer where they do not go up.
int heads_together(const AttentionJob& job, const AttentionItem& tile, int64_t largest) {
  const int64_t bytes = job.head_dim * item_size(job.cache_dtype);
  if (!is_few(tile.query_count, job.head_dim)) return 1;
  const int64_t most = std::min({kTogetherBytes / bytes, largest / std::max<int64_t>(tile.cost, 1),
                                 int64_t(kQueryTile / tile.query_count)});
  const int64_t items = divide_up(job.kv_heads, std::max<int64_t>(most, 1));
  return int(divide_up(job.kv_heads, items));
}

// An item as several, none of which costs much above `largest`; `size`: of each partition's results.
void cut_item(const AttentionItem& whole, int64_t largest, int64_t size, AttentionItems& items) {
  const int64_t partitions = whole.partition_last - whole.partition_first;
  const int64_t parts = std::min(partitions, divide_up(whole.cost, largest));
  for (int64_t part = 0; part < parts; ++part) {
    AttentionItem item = whole;
    const int64_t first = partitions * part / parts, last = partitions * (part + 1) / parts;
    item.partition_first = int32_t(whole.partition_first + first);
    item.partition_last = int32_t(whole.partition_first + last);
    item.partial = whole.partial + first * size;
    item.cost = whole.cost * (last - first) / partitions;
    items.attend.push_back(item);
  }
}

// A tile on all heads, on several at a time where that is better, each whole or in parts.
void add_tile(const AttentionJob& job, const AttentionItem& tile, int64_t largest,
              AttentionItems& items) {
  const int64_t partitions = tile.partition_last - tile.partition_first;
  const int together = heads_together(job, tile, largest);
  for (int head = 0; head < job.kv_heads; head += together) {
    AttentionItem item = tile;
    item.kv_head = head;
    item.kv_count = std::min(together, job.kv_heads - head);
    item.cost = tile.cost * item.kv_count;
    if (partitions == 1 || item.cost <= largest) {
      items.attend.push_back(item);
      continue;
    }
    const int64_t size = partial_size(item.kv_count * item.query_count, job.head_dim);
    items.merge.push_back({item.row, item.kv_head, item.kv_count, item.query_first,
                           item.query_count, int32_t(partitions), items.partials});
    item.partial = items.partials;
    items.partials += partitions * size;
    cut_item(item, largest, size, items);
  }
}

// A sharer's tile of the keys that it has for itself, and places for the results of all its keys.
void add_sharer(const AttentionJob& job, const AttentionItem& tile, int64_t largest, Sharer& sharer,
                AttentionItems& items) {
  sharer.partial = items.partials;
  sharer.together = heads_together(job, tile, largest);
  for (int head = 0; head < job.kv_heads; head += sharer.together) {
    AttentionItem item = tile;
    item.kv_head = head;
    item.kv_count = std::min(sharer.together, job.kv_heads - head);
    item.cost = tile.cost * item.kv_count;
    const int64_t size = partial_size(item.kv_count * item.query_count, job.head_dim);
    items.merge.push_back({item.row, head, item.kv_count, 0, item.query_count, sharer.partitions,
                           items.partials});
    item.partial = items.partials + sharer.shared * size;
    items.partials += sharer.partitions * size;
    cut_item(item, largest, size, items);
  }
}

// How many of `tokens` that share keys a tile takes: as many as fit in, or an even share, by which of
// them fewer lanes of vectors are left empty.
int32_t tokens_per_tile(int32_t tokens, int32_t group) {
  const int32_t most = kQueryTile / group, even = int32_t(divide_up(tokens, divide_up(tokens, most)));
  const auto lanes = [&](int32_t each) {
    constexpr int32_t kVector = 16;
    const int64_t full = divide_up(each * group, kVector), rest = divide_up(tokens % each * group, kVector);
    return tokens / each * full + rest;
  };
  return lanes(most) < lanes(even) ? most : even;
}

// Tiles of the tokens that share some keys.
void tile_sharers(const AttentionJob& job, const SharedKeys& keys, AttentionItems& items,
                  std::vector<AttentionItem>& tiles) {
  const int group = job.heads / job.kv_heads;
  const int64_t positions = int64_t(keys.partition_last - keys.partition_first) * kPartition;
  int32_t first = int32_t(items.sharer_tokens.size());
  for (int32_t sharer = keys.first; sharer < keys.last; ++sharer)
    for (int32_t token = 0; token * group < items.sharers[sharer].queries; ++token)
      items.sharer_tokens.push_back({sharer, token});
  const int32_t last = int32_t(items.sharer_tokens.size()), each = tokens_per_tile(last - first, group);
  for (; first < last; first += each) {
    const int32_t queries = std::min(each, last - first) * group;
    const int32_t row = items.sharers[items.sharer_tokens[first].sharer].row;
    tiles.push_back({row, 0, 1, 0, queries, keys.partition_first, keys.partition_last, first, 0,
                     cost_of(job, positions, queries)});
  }
}

// The costlier; of equals those that lie beside each other in memory.
bool comes_first(const AttentionItem& a, const AttentionItem& b) {
  if (a.cost != b.cost) return a.cost > b.cost;
  if (a.row != b.row) return a.row < b.row;
  if (a.query_first != b.query_first) return a.query_first < b.query_first;
  if (a.partition_first != b.partition_first) return a.partition_first < b.partition_first;
  return a.kv_head < b.kv_head;
}

// Cuts the items, which follow their rows, into homes that take equally long, one for each thread, and
// orders each: so a thread knows which comes next, and what its core has of a row's keys it reads itself.
void order_items(int threads, AttentionItems& items) {
  const int32_t homes = std::min(threads, kMaxGroups);
  items.homes.count = homes;
  auto first = items.attend.begin(), last = first;
  int64_t cost = 0;
  for (int32_t home = 0; home < homes; ++home) {
    while (last != items.attend.end() && cost < items.cost * (home + 1) / homes)
      cost += (last++)->cost;
    if (home + 1 == homes) last = items.attend.end();
    std::sort(first, last, comes_first);
    items.homes.ends[home] = last - items.attend.begin();
    first = last;
  }
}

}  // namespace

// Replaces what `items` held.
static inline void plan_attention(const AttentionJob& job, int threads, AttentionItems& items) {
  thread_local std::vector<AttentionItem> tiles;
  thread_local std::vector<SharedKeys> shared;
  thread_local std::vector<Sharer*> sharer_of;  // by row; null: it shares nothing
  tiles.clear();
  items.attend.clear();
  items.merge.clear();
  items.sharer_tokens.clear();
  items.partials = items.cost = 0;
  find_shared_keys(job, items.sharers, shared);
  sharer_of.assign(job.rows, nullptr);
  for (Sharer& sharer : items.sharers)
    if (sharer.shared) sharer_of[sharer.row] = &sharer;
  for (const SharedKeys& keys : shared) tile_sharers(job, keys, items, tiles);
  const int group = job.heads / job.kv_heads;
  for (int row = 0; row < job.rows; ++row) {
    const int64_t tokens = job.cu_query_lens[row + 1] - job.cu_query_lens[row];
    const int32_t first = sharer_of[row] ? sharer_of[row]->shared : 0;
    for (int64_t tile = 0; tile * kQueryTile < tokens * group; ++tile)
      tiles.push_back(query_tile(job, row, tile, first));
  }
  for (const AttentionItem& tile : tiles) items.cost += tile.cost * job.kv_heads;
  const int64_t even = items.cost / (threads * kItemsPerThread);
  const int64_t largest = threads == 1 ? INT64_MAX / 2 : even + 1;
  for (AttentionItem& tile : tiles) {
    if (tile.token_first >= 0) {
      for (; tile.kv_head < job.kv_heads; ++tile.kv_head) cut_item(tile, largest, 0, items);
    } else if (Sharer* sharer = sharer_of[tile.row]) {
      add_sharer(job, tile, largest, *sharer, items);
    } else {
      add_tile(job, tile, largest, items);
    }
  }
  order_items(threads, items);
}

}  // namespace headgate
