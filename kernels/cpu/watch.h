// Watching for what another thread or process is about to do, before one sleeps until it is done.
//
// To wake up takes as long as many a job, and perhaps far longer where a host that runs virtual machines has
// given the processor to another one meanwhile. A step's jobs, and the ranks of a group, follow each other within
// microseconds, a next step within a millisecond.
#pragma once

#include <stdint.h>
#include <time.h>

namespace headgate {

// How long who watches keeps its processor, and for how long it watches, letting others have it in between.
constexpr int64_t kKeepNanoseconds = 20000, kWatchNanoseconds = 1000000;

static inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

static inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Calls `ready` until it holds or the time is over; says whether it held. `let_others_run` is called now and then.
template <class Ready, class LetOthersRun>
bool watch(Ready ready, LetOthersRun let_others_run) {
  const int64_t start = now_ns();
  for (int64_t watched = 0; watched < kWatchNanoseconds; watched = now_ns() - start) {
    if (watched > kKeepNanoseconds) let_others_run();
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause_briefly();
    }
  }
  return ready();
}

}  // namespace headgate
