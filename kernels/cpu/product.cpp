// See product.h. The threads meet once in a product, at its end: a tile of the product waits, where it
// must, until the inputs are laid out, by threads that claimed their part before it.
#include "product.h"

#include <sched.h>

#include <atomic>

#include "scratch.h"

namespace headgate {
namespace {

// Nanoseconds for 16 input values, roughly: laid out; more for a norm, an activation, bytes.
constexpr int64_t kLayOutCost = 3, kNormCost = 3, kGateCost = 5, kBytesCost = 2;
// A piece of the inputs smaller than this is not worth a claim.
constexpr int64_t kPieceCost = 1000;
// Looks at a counter before the processor is given to others.
constexpr int kTries = 10000;

int64_t input_cost(const InputRowsJob& job) {
  const bool bytes = job.format == kInt8Inputs || job.format == kInt8Words || job.format == kInt4Inputs;
  const int64_t of16 = kLayOutCost + (job.source.norm ? kNormCost : 0) +
                       (job.source.activation >= 0 ? kGateCost : 0) + (bytes ? kBytesCost : 0);
  return job.rows * job.inner * of16 / 16;
}

// How many parts the columns of each row tile are cut into.
int64_t share_inputs(const InputRowsJob& job, int64_t cost) {
  const int64_t wanted = num_threads() == 1 ? 1 : divide_up(num_threads() * 2, job.row_tiles);
  const int64_t worth = cost / kPieceCost / job.row_tiles;
  const int64_t parts = wanted < worth ? wanted : worth, most = divide_up(job.inner, kInputColumns);
  return parts < 1 ? 1 : parts < most ? parts : most;
}

struct Stages {
  InputRowsJob inputs;
  TileFunction product;
  const void* job;
  ProductTiles tiles;
  TileGroups groups;  // of each: pieces of the inputs, then tiles of the product. Few rows have pieces in the first.
  struct alignas(64) LaidOut {
    std::atomic<int64_t> pieces;
  } laid_out[kMaxGroups];
};

// Row tiles of a group come to so many pieces.
RowRange pieces_of(const Stages& stages, int32_t group) {
  const RowRange tiles = row_range(stages.inputs.row_tiles, stages.tiles.row_groups, group);
  return {tiles.first * stages.inputs.parts, tiles.last * stages.inputs.parts};
}

void set_groups(Stages& stages) {
  const int32_t count = stages.tiles.row_groups;
  stages.groups.count = count;
  for (int32_t g = 0; g < count; ++g) {
    stages.groups.ends[g] = pieces_of(stages, g).last + (g + 1) * stages.tiles.panel_tiles;
    stages.laid_out[g].pieces.store(0, std::memory_order_relaxed);
  }
  if (count == 1) stages.groups = group_by_column(stages.tiles, pieces_of(stages, 0).last);
}

// A group's pieces are taken before its tiles, and the first group's by the calling thread if by no other, so
// whoever waits, waits for work that is being done or about to be.
void stage_tile(const void* data, int64_t tile) {
  Stages& stages = *static_cast<Stages*>(const_cast<void*>(data));
  int32_t group = 0;
  while (group + 1 < stages.tiles.row_groups && tile >= stages.groups.ends[group]) ++group;
  const RowRange pieces = pieces_of(stages, group);
  const int64_t piece = tile - group * stages.tiles.panel_tiles;
  std::atomic<int64_t>& laid_out = stages.laid_out[group].pieces;
  if (piece < pieces.last) {
    active_kernels().input_rows(&stages.inputs, piece);
    laid_out.fetch_add(1, std::memory_order_release);
    return;
  }
  const int64_t awaited = pieces.last - pieces.first;
  for (int tries = 0; laid_out.load(std::memory_order_acquire) < awaited; ++tries)
    if (tries >= kTries) sched_yield();
  stages.product(stages.job, tile - pieces.last);
}

}  // namespace

bool is_ready(const RowSource& source, int64_t rows, int32_t format) {
  return rows == 1 && format == kFloats && !source.norm && source.activation < 0;
}

char* input_memory(int64_t bytes) {
  thread_local Scratch inputs;
  return inputs.take(bytes);
}

void run_product(const InputRowsJob* inputs, TileFunction product, const void* job,
                 const ProductTiles& tiles, int64_t cost) {
  if (!inputs) {  // of one row: there is one group
    if (cost < kWorthSharing) {
      for (int64_t tile = 0; tile < tiles.panel_tiles; ++tile) product(job, tile);
    } else {
      run_tiles(product, job, group_by_column(tiles, 0));
    }
    return;
  }
  const int64_t before = input_cost(*inputs);
  Stages stages;
  stages.inputs = *inputs;
  stages.product = product;
  stages.job = job;
  stages.tiles = tiles;
  stages.inputs.parts = share_inputs(*inputs, before);
  set_groups(stages);
  run(stage_tile, stages, stages.groups, before + cost);
}

}  // namespace headgate
