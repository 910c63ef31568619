// See product.h. The threads meet once in a product, at its end: who comes to a tile of it lays out what inputs
// nobody has claimed yet, and waits, where it must, for those that others have.
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
  struct alignas(64) LaidOut {
    std::atomic<int64_t> claimed, done;  // pieces of a group's inputs
  } laid_out[kMaxGroups];
};

// Lays out pieces of a group's inputs as long as there are any, then waits for those of other threads, which have
// claimed theirs and so are at work.
void lay_out(const Stages& stages, Stages::LaidOut& laid_out, int32_t group) {
  const InputRowsJob& inputs = stages.inputs;
  const RowRange tiles = row_range(inputs.row_tiles, stages.tiles.row_groups, group);
  const int64_t count = (tiles.last - tiles.first) * inputs.parts;
  if (laid_out.done.load(std::memory_order_acquire) == count) return;
  for (int64_t piece; (piece = laid_out.claimed.fetch_add(1, std::memory_order_relaxed)) < count;) {
    active_kernels().input_rows(&inputs, tiles.first * inputs.parts + piece);
    laid_out.done.fetch_add(1, std::memory_order_release);
  }
  for (int tries = 0; laid_out.done.load(std::memory_order_acquire) < count; ++tries)
    if (tries >= kTries) sched_yield();
}

void stage_tile(const void* data, int64_t tile) {
  Stages& stages = *static_cast<Stages*>(const_cast<void*>(data));
  const int32_t group = int32_t(tile / stages.tiles.panel_tiles);
  lay_out(stages, stages.laid_out[group], group);
  stages.product(stages.job, tile);
}

// Runs the tiles, on the calling thread alone where that is done before another has woken up.
void run(TileFunction function, const void* job, const ProductTiles& tiles, int64_t cost) {
  const TileGroups groups = groups_of(tiles);
  if (cost >= kWorthSharing) return run_tiles(function, job, groups);
  for (int64_t tile = 0; tile < groups.tiles(); ++tile) function(job, tile);
}

}  // namespace

bool is_ready(const RowSource& source, int64_t rows, int32_t format) {
  return rows == 1 && format == kFloats && !source.norm && source.activation < 0;
}

char* input_memory(int64_t bytes) {
  thread_local Scratch inputs;
  return inputs.take(bytes);
}

char* gated_memory(int64_t bytes) {
  thread_local Scratch inputs;
  return inputs.take(bytes);
}

void run_product(const InputRowsJob* inputs, TileFunction product, const void* job,
                 const ProductTiles& tiles, int64_t cost) {
  if (!inputs) return run(product, job, tiles, cost);
  const int64_t before = input_cost(*inputs);
  Stages stages;
  stages.inputs = *inputs;
  stages.product = product;
  stages.job = job;
  stages.tiles = tiles;
  stages.inputs.parts = share_inputs(*inputs, before);
  for (int32_t group = 0; group < tiles.row_groups; ++group) {
    stages.laid_out[group].claimed.store(0, std::memory_order_relaxed);
    stages.laid_out[group].done.store(0, std::memory_order_relaxed);
  }
  if (tiles.panel_tiles == 0) lay_out(stages, stages.laid_out[0], 0);  // for what a norm leaves beside them
  run(stage_tile, &stages, tiles, before + cost);
}

}  // namespace headgate
