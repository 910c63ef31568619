// How attention over a step's rows is cut into items that threads take one after the other.
//
// An item is a tile of query rows on one key/value head, or on several that are read together where
// there is work enough to share out without cutting between them. The costliest come first, and none costs
// more than a small share of the whole where it can be cut along its keys: so threads end together,
// also with a long row among short ones. Cuts fall on partitions, whose results are merged in
// ascending order, which is what a whole item does too: they change no bits.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace headgate {

struct AttentionItems {
  std::vector<AttentionItem> attend;
  std::vector<MergeItem> merge;
  int64_t partials = 0;  // floats
  int64_t cost = 0;      // nanoseconds, roughly
};

constexpr int64_t kMergedPerNanosecond = 2;
// Items that there are at least for each thread, where rows are long enough.
constexpr int64_t kItemsPerThread = 4;
// Bytes of a position's keys, at most, that are read together: blocks of those, of their values and
// of what comes next stay in a core's cache.
constexpr int64_t kTogetherBytes = 1024;
// Heads of fewer bytes are no faster together: their arithmetic takes longer than memory does.
constexpr int64_t kLeastHeadBytes = 256;

namespace {

// A tile of a row's query rows, on any one head.
AttentionItem query_tile(const AttentionJob& job, int row, int64_t tile) {
  const int group = job.heads / job.kv_heads;
  const int32_t tokens = job.cu_query_lens[row + 1] - job.cu_query_lens[row];
  const int64_t left = int64_t(tokens) * group - tile * kQueryTile;
  const int first = int(tile * kQueryTile), count = int(left < kQueryTile ? left : kQueryTile);
  const int32_t position = job.context_lens[row] - tokens;
  const int32_t low = position + first / group, high = position + (first + count - 1) / group;
  const int32_t start = job.window && low >= job.window ? low - job.window + 1 : 0;
  // A key and value of 64 dimensions take 20 ns to read in float32, and 2 ns for each query.
  const int read = job.cache_dtype == kFloat32 ? 20 : 10;
  const int64_t cost = int64_t(high + 1 - start) * (read + 2 * count) * job.head_dim / 64;
  return {row, 0, 1, first, count, start / kPartition, high / kPartition + 1, -1, cost};
}

// How many heads an item of such a tile has, the last one fewer where they do not go up.
int heads_together(const AttentionJob& job, const AttentionItem& tile, int64_t largest) {
  const int64_t bytes = job.head_dim * item_size(job.cache_dtype);
  // A head's scales are not beside the next one's.
  if (bytes < kLeastHeadBytes || job.k_scales || !is_few(tile.query_count, job.head_dim)) return 1;
  const int64_t most = std::min({kTogetherBytes / bytes, largest / std::max<int64_t>(tile.cost, 1),
                                 int64_t(kQueryTile / tile.query_count)});
  const int64_t items = divide_up(job.kv_heads, std::max<int64_t>(most, 1));
  return int(divide_up(job.kv_heads, items));
}

// Items of one tile on its heads, none much above `largest`.
void cut_tile(const AttentionJob& job, AttentionItem tile, int64_t largest, AttentionItems& items) {
  const int64_t partitions = tile.partition_last - tile.partition_first;
  const int64_t parts = std::min(partitions, divide_up(tile.cost, largest));
  if (parts <= 1) {
    items.attend.push_back(tile);
    return;
  }
  const int64_t size = partial_size(tile.kv_count * tile.query_count, job.head_dim);
  items.merge.push_back({tile.row, tile.kv_head, tile.kv_count, tile.query_first, tile.query_count,
                         int32_t(partitions), items.partials});
  for (int64_t part = 0; part < parts; ++part) {
    AttentionItem item = tile;
    const int64_t first = partitions * part / parts, last = partitions * (part + 1) / parts;
    item.partition_first = int32_t(tile.partition_first + first);
    item.partition_last = int32_t(tile.partition_first + last);
    item.partial = items.partials + first * size;
    item.cost = tile.cost * (last - first) / partitions;
    items.attend.push_back(item);
  }
  items.partials += partitions * size;
}

// The costlier; of equals those that lie beside each other in memory.
bool comes_first(const AttentionItem& a, const AttentionItem& b) {
  if (a.cost != b.cost) return a.cost > b.cost;
  if (a.row != b.row) return a.row < b.row;
  if (a.query_first != b.query_first) return a.query_first < b.query_first;
  if (a.partition_first != b.partition_first) return a.partition_first < b.partition_first;
  return a.kv_head < b.kv_head;
}

}  // namespace

// Replaces what `items` held.
static inline void plan_attention(const AttentionJob& job, int threads, AttentionItems& items) {
  thread_local std::vector<AttentionItem> tiles;
  tiles.clear();
  items.attend.clear();
  items.merge.clear();
  items.partials = items.cost = 0;
  const int group = job.heads / job.kv_heads;
  for (int row = 0; row < job.rows; ++row) {
    const int64_t tokens = job.cu_query_lens[row + 1] - job.cu_query_lens[row];
    for (int64_t tile = 0; tile * kQueryTile < tokens * group; ++tile) {
      tiles.push_back(query_tile(job, row, tile));
      items.cost += tiles.back().cost * job.kv_heads;
    }
  }
  const int64_t even = items.cost / (threads * kItemsPerThread);
  const int64_t largest = threads == 1 ? INT64_MAX : even + 1;
  for (const AttentionItem& tile : tiles) {
    const int together = heads_together(job, tile, largest);
    for (int head = 0; head < job.kv_heads; head += together) {
      AttentionItem item = tile;
      item.kv_head = head;
      item.kv_count = std::min(together, job.kv_heads - head);
      item.cost = tile.cost * item.kv_count;
      cut_tile(job, item, largest, items);
    }
  }
  if (threads == 1) return;
  std::sort(items.attend.begin(), items.attend.end(), comes_first);
}

}  // namespace headgate
