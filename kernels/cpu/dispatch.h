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
