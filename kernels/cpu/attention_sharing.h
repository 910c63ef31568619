// Rows of few tokens (they decode) whose tables begin with the same blocks: a prompt that many share.
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

// Whole partitions before the row's tokens.
int32_t whole_partitions(const AttentionJob& job, const Sharer& sharer) {
  const int32_t tokens = sharer.queries / (job.heads / job.kv_heads);
  return (job.context_lens[sharer.row] - tokens) / kPartition;
}

// Blocks of the partitions that both could share.
int64_t comparable_blocks(const AttentionJob& job, const Sharer& a, const Sharer& b) {
  const int64_t blocks = kPartition / job.block_size;
  return blocks * std::min(whole_partitions(job, a), whole_partitions(job, b));
}

// How many whole partitions two rows have the same blocks for, before the tokens of both.
int32_t partitions_alike(const AttentionJob& job, const Sharer& a, const Sharer& b) {
  const int64_t blocks = kPartition / job.block_size;
  const int32_t* from = job.block_tables + a.row * job.table_stride;
  const int32_t* other = job.block_tables + b.row * job.table_stride;
  const int64_t most = comparable_blocks(job, a, b);
  return int32_t((std::mismatch(from, from + most, other).first - from) / blocks);
}

// Rows whose tokens fit into one tile and have a whole partition before them, those side by side whose
// tables begin alike.
void order_by_table(const AttentionJob& job, std::vector<Sharer>& sharers) {
  sharers.clear();
  const int group = job.heads / job.kv_heads;
  for (int row = 0; row < job.rows; ++row) {
    const int32_t tokens = job.cu_query_lens[row + 1] - job.cu_query_lens[row];
    const int32_t partitions = (job.context_lens[row] - 1) / kPartition + 1;
    if (tokens * group <= kQueryTile && job.context_lens[row] - tokens >= kPartition)
      sharers.push_back({row, tokens * group, partitions, 0, 1, 0});
  }
  std::sort(sharers.begin(), sharers.end(), [&](const Sharer& a, const Sharer& b) {
    const int32_t* from = job.block_tables + a.row * job.table_stride;
    const int32_t* other = job.block_tables + b.row * job.table_stride;
    const int64_t most = comparable_blocks(job, a, b);
    const auto differ = std::mismatch(from, from + most, other);
    if (differ.first != from + most) return *differ.first < *differ.second;
    const int32_t wholes[] = {whole_partitions(job, a), whole_partitions(job, b)};
    return wholes[0] != wholes[1] ? wholes[0] < wholes[1] : a.row < b.row;
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
