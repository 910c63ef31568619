// Threads that compute together, on processors of their own.
//
// Linux may put two of them on one processor, beside an idle one, and leave them there for milliseconds. Each
// waits for the other then, tile by tile, for many a job (docs/performance-history.md has a trace of it). So threads
// tell each other where they are, and who finds another at its side goes away.
#pragma once

#include <sched.h>
#include <stdint.h>

#include <atomic>

#include "watch.h"

namespace headgate {

// Where a thread is: the number of its processor and one; 0 while it sleeps.
using Seat = std::atomic<int32_t>;

// Tells where the calling thread is: the seat's new value.
inline int32_t take_seat(Seat& seat) {
  const int32_t here = sched_getcpu() + 1;
  seat.store(here, std::memory_order_relaxed);
  return here;
}

// Which processors are taken: of a thread and those it computes with.
class Processors {
 public:
  Processors() { CPU_ZERO(&taken_); }

  void add(int32_t seat) {
    if (seat > 0 && seat <= CPU_SETSIZE) CPU_SET(seat - 1, &taken_);
  }

  // Puts the calling thread on one of those it may use that isn't taken, and leaves it free to be moved
  // again. Nothing happens where there is none.
  void leave() const {
    cpu_set_t allowed, others;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    CPU_AND(&others, &allowed, &taken_);
    CPU_XOR(&others, &allowed, &others);
    if (!CPU_COUNT(&others)) return;
    sched_setaffinity(0, sizeof others, &others);
    sched_setaffinity(0, sizeof allowed, &allowed);
  }

 private:
  cpu_set_t taken_;
};

// Between two moves of a thread: other programs may leave no processor that it could stay on.
constexpr int64_t kStayNanoseconds = 1000000;

// Lets whoever waits for the calling thread's processor have it, and takes `seat_of(own)`, of `count`. If
// another of these seats is on the same processor, the thread goes to one without.
template <class SeatOf>
void yield_apart(int own, int count, SeatOf seat_of) {
  sched_yield();
  const int32_t here = take_seat(seat_of(own));
  bool alone = true;
  for (int i = 0; i < count; ++i)
    alone &= i == own || seat_of(i).load(std::memory_order_relaxed) != here;
  if (alone) return;
  thread_local int64_t moved = 0;
  if (now_ns() - moved < kStayNanoseconds) return;
  Processors taken;
  for (int i = 0; i < count; ++i) taken.add(seat_of(i).load(std::memory_order_relaxed));
  // The other one gets the processor meanwhile, and is to see that it has it for itself.
  seat_of(own).store(0, std::memory_order_relaxed);
  taken.leave();
  moved = now_ns();
  take_seat(seat_of(own));
}

}  // namespace headgate
