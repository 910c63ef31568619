// What the files of C functions share: how an operation's tiles reach the threads.
#pragma once

#include "kernels.h"
#include "thread_pool.h"

namespace headgate {

// The kernels of the instruction set in use.
const Kernels& active_kernels();

// Nanoseconds of work below which an operation is not shared among threads.
constexpr int64_t kWorthSharing = 5000;

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a product is shared out: runs of panels, and groups of row tiles where there are few panels.
struct ProductTiles {
  int64_t panels_per_tile, count;
  int32_t row_groups;
};

static inline ProductTiles share_product(int64_t columns, int64_t row_tiles) {
  if (columns == 0) return {1, 0, 1};
  const int64_t panels = divide_up(columns, kPanel), threads = num_threads();
  // A few tiles for each thread even out what the system takes away; more cost claims.
  const int64_t wanted = threads == 1 ? 1 : threads * 8;
  const int64_t panels_per_tile = panels > wanted ? panels / wanted : 1;
  const int64_t panel_tiles = divide_up(panels, panels_per_tile);
  int64_t groups = panel_tiles < wanted / 2 ? divide_up(wanted / 2, panel_tiles) : 1;
  if (groups > row_tiles) groups = row_tiles;
  return {panels_per_tile, panel_tiles * groups, int32_t(groups)};
}

// Runs all tiles, on the calling thread alone where the whole (in nanoseconds, a rough guess) would be
// done before another thread has woken up.
template <class Job>
void run(void (*function)(const void*, int64_t), const Job& job, int64_t tiles, int64_t cost) {
  if (cost < kWorthSharing) {
    for (int64_t tile = 0; tile < tiles; ++tile) function(&job, tile);
  } else {
    run_tiles(function, &job, tiles);
  }
}

}  // namespace headgate
