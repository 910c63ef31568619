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

// Rows of a home for each thread in the pool. Every home reads all weights: with fewer rows, or more
// threads, memory would have to give them faster. (Measured on Zen 3 and 4, and on an Emerald Rapids of Intel's,
// whose cores have one last-level cache in common.)
static inline int64_t home_rows() { return is_intel() ? 16 : 8; }

// Into how many parts, one below the other, the rows of a step are cut, so that a part is worked on by
// the same threads from one operation to the next. What a core has written it reads itself then: on
// chips whose cores have several last-level caches others wait five times as long for it.
static inline int32_t homes_of(int64_t rows) {
  const int64_t threads = num_threads();
  int64_t homes = rows / (home_rows() * threads);
  if (homes > threads) homes = threads;
  return int32_t(homes < 1 ? 1 : homes < kMaxGroups ? homes : kMaxGroups);
}

// Row tiles of at most `tallest` rows, as many in each home.
static inline int32_t row_tiles_of(int64_t rows, int64_t tallest) {
  const int64_t homes = homes_of(rows);
  return int32_t(homes * divide_up(rows, homes * tallest));
}

// Tiles of equal numbers of rows, by home.
static inline TileGroups group_by_home(int64_t rows, int64_t tiles) {
  TileGroups groups = {homes_of(rows), {}};
  for (int32_t home = 0; home < groups.count; ++home)
    groups.ends[home] = tiles * (home + 1) / groups.count;
  return groups;
}

// How a product is shared out: runs of panels for each group of row tiles. There are as many groups as
// homes, or more where there are few panels. In one home each thread has a part of the panels of its own:
// memory gives more to who reads on than to those who take turns (docs/performance-history.md, "Blocks side by side"),
// and what it asks memory for in advance it also comes to.
struct ProductTiles {
  int64_t panels_per_tile, panel_tiles;
  int32_t row_groups, column_groups;  // one of them is 1
  int32_t sharing;                    // threads that take a group's tiles, probably
};

static inline ProductTiles share_product(int64_t rows, int64_t columns, int64_t row_tiles) {
  if (columns == 0) return {1, 0, 1, 1, 1};
  const int64_t panels = divide_up(columns, kPanel), threads = num_threads();
  // A few tiles for each thread even out what the system takes away; more cost claims.
  const int64_t wanted = threads == 1 ? 1 : threads * 8, homes = homes_of(rows);
  const int64_t in_home = divide_up(wanted, homes);
  const int64_t panels_per_tile = panels > in_home ? panels / in_home : 1;
  const int64_t panel_tiles = divide_up(panels, panels_per_tile);
  int64_t groups = panel_tiles * homes < wanted / 2 ? divide_up(wanted / 2, panel_tiles) : homes;
  if (groups > row_tiles) groups = row_tiles;
  if (groups > kMaxGroups) groups = kMaxGroups;
  int64_t column_groups = groups > 1 ? 1 : threads < panel_tiles ? threads : panel_tiles;
  if (column_groups > kMaxGroups) column_groups = kMaxGroups;
  return {panels_per_tile, panel_tiles, int32_t(groups), int32_t(column_groups),
          int32_t(divide_up(threads, groups * column_groups))};
}

// The tiles by group of rows, or of columns where there is one of rows.
static inline TileGroups groups_of(const ProductTiles& tiles) {
  TileGroups groups = {tiles.row_groups * tiles.column_groups, {}};
  for (int32_t g = 0; g < groups.count; ++g)
    groups.ends[g] = tiles.panel_tiles * tiles.row_groups * (g + 1) / groups.count;
  return groups;
}

// Runs all tiles, on the calling thread alone where the whole (in nanoseconds, a rough guess) would be
// done before another thread has woken up.
template <class Job>
void run(TileFunction function, const Job& job, const TileGroups& groups, int64_t cost) {
  if (cost < kWorthSharing) {
    for (int64_t tile = 0; tile < groups.tiles(); ++tile) function(&job, tile);
  } else {
    run_tiles(function, &job, groups);
  }
}
template <class Job>
void run(TileFunction function, const Job& job, int64_t tiles, int64_t cost) {
  run(function, job, TileGroups{1, {tiles}}, cost);
}

}  // namespace headgate
