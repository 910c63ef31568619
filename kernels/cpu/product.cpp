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
  const bool bytes = job.format == kInt8Inputs || job.format == kInt4Inputs;
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
  int64_t pieces;
  std::atomic<int64_t> laid_out;
};

// Tiles of the inputs come first, so whoever waits, waits for work that is being done.
void stage_tile(const void* data, int64_t tile) {
  Stages& stages = *static_cast<Stages*>(const_cast<void*>(data));
  if (tile < stages.pieces) {
    active_kernels().input_rows(&stages.inputs, tile);
    stages.laid_out.fetch_add(1, std::memory_order_release);
    return;
  }
  for (int tries = 0; stages.laid_out.load(std::memory_order_acquire) < stages.pieces; ++tries)
    if (tries >= kTries) sched_yield();
  stages.product(stages.job, tile - stages.pieces);
}

}  // namespace

bool is_ready(const RowSource& source, int64_t rows, int32_t format) {
  return rows == 1 && format == kFloats && !source.norm && source.activation < 0;
}

char* input_memory(int64_t bytes) {
  thread_local Scratch inputs;
  return inputs.take(bytes);
}

void run_product(const InputRowsJob* inputs, TileFunction product, const void* job, int64_t tiles,
                 int64_t cost) {
  if (!inputs) {
    if (cost < kWorthSharing) {
      for (int64_t tile = 0; tile < tiles; ++tile) product(job, tile);
    } else {
      run_tiles(product, job, tiles);
    }
    return;
  }
  const int64_t before = input_cost(*inputs);
  Stages stages = {*inputs, product, job, 0, {0}};
  stages.inputs.parts = share_inputs(*inputs, before);
  stages.pieces = stages.inputs.parts * inputs->row_tiles;
  run(stage_tile, stages, stages.pieces + tiles, before + cost);
}

}  // namespace headgate
