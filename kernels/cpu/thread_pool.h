// A pool of threads that share the tiles of one job at a time.
#pragma once

#include <stdint.h>

namespace headgate {

// Computes tile `tile` of the job described by `job`. Must not throw.
using TileFunction = void (*)(const void* job, int64_t tile);

// Threads that take part in a job, the caller's own included; at least 1.
void set_num_threads(int count);
int num_threads();

constexpr int kMaxGroups = 64;

// Tiles that lie side by side: group g has [ends[g - 1], ends[g]), the first one [0, ends[0]).
struct TileGroups {
  int32_t count;
  int64_t ends[kMaxGroups];

  int64_t tiles() const { return ends[count - 1]; }
};

// Runs all tiles and returns when they are done. Callable from any thread; calls take turns.
// Tiles are claimed one by one, so a thread that the system holds up delays only its own tile.
// A thread begins with the group that falls to it, the same one each time, and then helps with those
// that follow; of each group tiles are taken in order.
void run_tiles(TileFunction function, const void* job, const TileGroups& groups);
void run_tiles(TileFunction function, const void* job, int64_t tiles);

}  // namespace headgate
