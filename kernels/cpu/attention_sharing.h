// Rows that decode and whose tables begin with the same blocks: a prompt that many share.
//
// Their queries attend to those keys in tiles of their own, in which the keys are read once for all of
// them. Only whole partitions are shared, so sums stay as they are: each row's results of them are put
// together with those of its other partitions, as they are where a long row is cut.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace headgate {

// Sharers [first, last) all have the keys of partitions [partition_first, partition_last).
struct SharedKeys {
  int32_t first, last;
  int32_t partition_first, partition_last;
};

namespace {

// How many whole partitions two rows have the same blocks for, never that of a row's last key.
int32_t partitions_alike(const AttentionJob& job, const Sharer& a, const Sharer& b) {
  const int64_t blocks = kPartition / job.block_size;
  const int32_t* from = job.block_tables + a.row * job.table_stride;
  const int32_t* other = job.block_tables + b.row * job.table_stride;
  const int64_t most = blocks * (std::min(a.partitions, b.partitions) - 1);
  return int32_t((std::mismatch(from, from + most, other).first - from) / blocks);
}

// Rows of one token with a whole partition before that of their last key, those side by side whose
// tables begin alike.
void order_by_table(const AttentionJob& job, std::vector<Sharer>& sharers) {
  sharers.clear();
  for (int row = 0; row < job.rows; ++row) {
    const int32_t last = job.context_lens[row] - 1;
    if (job.cu_query_lens[row + 1] - job.cu_query_lens[row] == 1 && last >= kPartition)
      sharers.push_back({row, last / kPartition + 1, 0, 0});
  }
  const int64_t blocks = kPartition / job.block_size;
  std::sort(sharers.begin(), sharers.end(), [&](const Sharer& a, const Sharer& b) {
    const int32_t* from = job.block_tables + a.row * job.table_stride;
    const int32_t* other = job.block_tables + b.row * job.table_stride;
    const int64_t most = blocks * (std::min(a.partitions, b.partitions) - 1);
    const auto differ = std::mismatch(from, from + most, other);
    if (differ.first != from + most) return *differ.first < *differ.second;
    return a.partitions != b.partitions ? a.partitions < b.partitions : a.row < b.row;
  });
}

// Of sharers [first, last), which have all partitions before `partition` in common: those that they have
// in common from there on, and what parts of them have beyond. `alike`: with the one before.
void share(const std::vector<int32_t>& alike, int32_t first, int32_t last, int32_t partition,
           std::vector<Sharer>& sharers, std::vector<SharedKeys>& shared) {
  if (last - first < 2) return;
  const int32_t depth = *std::min_element(alike.begin() + first + 1, alike.begin() + last);
  if (depth > partition) {
    shared.push_back({first, last, partition, depth});
    for (int32_t i = first; i < last; ++i) sharers[i].shared = depth;
  }
  int32_t part = first;
  for (int32_t i = first + 1; i <= last; ++i) {
    if (i < last && alike[i] > depth) continue;
    share(alike, part, i, depth, sharers, shared);
    part = i;
  }
}

}  // namespace

// Replaces what the two held; `sharers` has rows with nothing in common too.
static inline void find_shared_keys(const AttentionJob& job, std::vector<Sharer>& sharers,
                                    std::vector<SharedKeys>& shared) {
  thread_local std::vector<int32_t> alike;
  sharers.clear();
  shared.clear();
  const bool fits = job.heads / job.kv_heads <= kQueryTile && kPartition % job.block_size == 0;
  if (job.window || !fits) return;
  order_by_table(job, sharers);
  alike.assign(sharers.size(), 0);
  for (size_t i = 1; i < sharers.size(); ++i)
    alike[i] = partitions_alike(job, sharers[i - 1], sharers[i]);
  share(alike, 0, int32_t(sharers.size()), 0, sharers, shared);
}

}  // namespace headgate
