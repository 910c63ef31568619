// Collectives between the processes of one host, through a piece of memory that all have mapped.
//
// The memory holds a line for each rank and two sets of slots, used in turn. A round of a call: a
// rank writes its part into its slot, raises the count of its line, waits for the counts of those
// whose parts it needs, and reads. A set is written again two rounds later, by a rank that has seen
// all others begin the round in between, hence done with the one before: no second meeting is due.
//
// Nobody waits without an end: a process that died, a rank that left, the time limit and the word
// that says that another rank gave up are looked for a few times a second.
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "export.h"
#include "processors.h"
#include "watch.h"

namespace headgate {
namespace {

// What ended a group, in the low byte of a call's result (0: nothing); then the rank concerned.
enum Failure : int32_t { kDied = 1, kLeft = 2, kLate = 3, kDiffers = 4 };

constexpr int kHeaderBytes = 4096;
constexpr int kLineBytes = 64;
constexpr int kMaxRanks = kHeaderBytes / kLineBytes - 1;
constexpr int64_t kLookNanoseconds = 100000000;  // between two looks at the others' processes
// From here on each of three or more ranks adds up only its share, and they read each other's sums.
constexpr int64_t kSharedOutBytes = 32768;
constexpr int64_t kElementsPerLine = 16;  // at most, so that no two ranks write into one line

struct alignas(kLineBytes) Line {
  std::atomic<uint32_t> count;    // meetings this rank has come to
  std::atomic<uint32_t> waiters;  // that may sleep on `count`
  std::atomic<uint32_t> left;
  Seat seat;
  int64_t call[2];  // what this rank means the round to be, by set of slots
};

struct Header {
  alignas(kLineBytes) std::atomic<int32_t> failure;  // the result of the first rank that gave up
  Line lines[kMaxRanks];
};
static_assert(sizeof(Line) == kLineBytes && sizeof(Header) == kHeaderBytes, "as mapped");

// One rank's view of the memory.
struct SharedGroup {
  Header* header;
  char* slots;
  int rank, ranks;
  int64_t slot_bytes;
  int64_t timeout_nanoseconds;
  bool watches;
  int32_t process_ids[kMaxRanks], process_fds[kMaxRanks];
  uint32_t count = 0;     // as in this rank's line
  uint32_t previous = 0;  // `count` at the first meeting of the round before
  int set = 0;
  int32_t failure = 0;

  Line& line(int r) { return header->lines[r]; }
  char* slot(int r) { return slots + (int64_t(set) * ranks + r) * slot_bytes; }
};

// Not the private futexes: these are found by other processes.
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void sleep_on(std::atomic<uint32_t>& word, uint32_t seen, int64_t nanoseconds) {
  const timespec limit = {time_t(nanoseconds / 1000000000), long(nanoseconds % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

int32_t failure_of(Failure kind, int rank) { return kind | rank << 8; }

// Ends the group for everyone, for the reason that was given first.
int32_t give_up(SharedGroup& g, int32_t failure) {
  int32_t first = 0;
  if (!g.header->failure.compare_exchange_strong(first, failure)) failure = first;
  for (int r = 0; r < g.ranks; ++r) wake_all(g.line(r).count);
  return g.failure = failure;
}

bool has_died(const SharedGroup& g, int rank) {
  if (g.process_fds[rank] >= 0) {
    pollfd watched = {g.process_fds[rank], POLLIN, 0};
    return poll(&watched, 1, 0) > 0;
  }
  return kill(g.process_ids[rank], 0) != 0 && errno == ESRCH;
}

bool reached(SharedGroup& g, int rank, uint32_t count) {
  return int32_t(g.line(rank).count.load(std::memory_order_acquire) - count) >= 0;
}

// Why `rank`, which hasn't come, never will; 0 if it still may.
int32_t reason_to_give_up(SharedGroup& g, int rank, int64_t started, int64_t& looked) {
  const int32_t failure = g.header->failure.load(std::memory_order_acquire);
  if (failure) return failure;
  if (g.line(rank).left.load(std::memory_order_acquire)) return failure_of(kLeft, rank);
  const int64_t now = now_ns();
  if (now - looked >= kLookNanoseconds) {
    looked = now;
    for (int r = 0; r < g.ranks; ++r) {
      const bool left = g.line(r).left.load(std::memory_order_acquire);
      if (r != g.rank && !left && has_died(g, r)) return failure_of(kDied, r);
    }
  }
  return now - started >= g.timeout_nanoseconds ? failure_of(kLate, rank) : 0;
}

void let_others_run(SharedGroup& g) {
  yield_apart(g.rank, g.ranks, [&g](int r) -> Seat& { return g.line(r).seat; });
}

// Waits until `rank` has come to its meeting number `count`.
int32_t wait_for(SharedGroup& g, int rank, uint32_t count) {
  const auto here = [&] { return reached(g, rank, count); };
  if (here() || (g.watches && watch(here, [&g] { let_others_run(g); }))) return 0;
  g.line(g.rank).seat.store(0, std::memory_order_relaxed);
  Line& line = g.line(rank);
  const int64_t started = now_ns();
  int64_t looked = started;
  int32_t failure = 0;
  line.waiters.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = line.count.load(std::memory_order_seq_cst);
    if (reached(g, rank, count)) break;
    failure = reason_to_give_up(g, rank, started, looked);
    // It may have come, and gone, since.
    if (failure && reached(g, rank, count)) failure = 0;
    if (failure) break;
    sleep_on(line.count, seen, std::min(kLookNanoseconds, g.timeout_nanoseconds));
  }
  line.waiters.fetch_sub(1, std::memory_order_relaxed);
  return failure ? give_up(g, failure) : 0;
}

int32_t wait_for_all(SharedGroup& g, uint32_t count) {
  for (int r = 0; r < g.ranks; ++r) {
    const int32_t failure = r == g.rank ? 0 : wait_for(g, r, count);
    if (failure) return failure;
  }
  return 0;
}

// Comes to the next meeting.
void arrive(SharedGroup& g) {
  Line& line = g.line(g.rank);
  take_seat(line.seat);
  line.count.store(++g.count, std::memory_order_seq_cst);
  if (line.waiters.load(std::memory_order_seq_cst)) wake_all(line.count);
}

// Begins a round: afterwards this rank's slot may be written.
int32_t begin(SharedGroup& g, int64_t call) {
  if (g.failure) return g.failure;
  const int32_t failure = wait_for_all(g, g.previous);
  if (failure) return failure;
  g.set ^= 1;
  g.line(g.rank).call[g.set] = call;
  g.previous = g.count + 1;
  return 0;
}

// Whether `rank`, which has come, is in the same call.
int32_t check_call(SharedGroup& g, int rank) {
  const bool same = g.line(rank).call[g.set] == g.line(g.rank).call[g.set];
  return same ? 0 : give_up(g, failure_of(kDiffers, rank));
}

int32_t meet(SharedGroup& g) {
  arrive(g);
  int32_t failure = wait_for_all(g, g.count);
  for (int r = 0; r < g.ranks && !failure; ++r) failure = check_call(g, r);
  return failure;
}

int64_t call_of(int kind, int64_t size) { return size << 3 | kind; }

struct Add {
  template <class T>
  static T apply(T a, T b) {
    return a + b;
  }
};

struct Least {
  template <class T>
  static T apply(T a, T b) {
    return b < a ? b : a;
  }
};

// out[i] = the slots' elements i, reduced in the order of the ranks. `out` may be in a slot.
template <class T, class Operation>
void reduce_slots(SharedGroup& g, T* out, int64_t first, int64_t last) {
  constexpr int64_t kTile = 256;
  T total[kTile];
  for (int64_t start = first; start < last; start += kTile) {
    const int64_t count = std::min(kTile, last - start);
    memcpy(total, reinterpret_cast<const T*>(g.slot(0)) + start, count * sizeof(T));
    for (int r = 1; r < g.ranks; ++r) {
      const T* part = reinterpret_cast<const T*>(g.slot(r)) + start;
      for (int64_t i = 0; i < count; ++i) total[i] = Operation::apply(total[i], part[i]);
    }
    memcpy(out + start, total, count * sizeof(T));
  }
}

template <class T, class Operation>
int32_t reduce_round(SharedGroup& g, T* data, int64_t count, int64_t call) {
  int32_t failure = begin(g, call);
  if (failure) return failure;
  T* own = reinterpret_cast<T*>(g.slot(g.rank));
  memcpy(own, data, count * sizeof(T));
  if ((failure = meet(g))) return failure;
  if (g.ranks == 2 || count * int64_t(sizeof(T)) < kSharedOutBytes) {
    reduce_slots<T, Operation>(g, data, 0, count);
    return 0;
  }
  const int64_t lines = (count + kElementsPerLine - 1) / kElementsPerLine;
  const int64_t share = (lines + g.ranks - 1) / g.ranks * kElementsPerLine;
  const auto first = [&](int r) { return std::min(count, r * share); };
  // Nobody else reads a rank's own share of its slot: the sums can take its place.
  reduce_slots<T, Operation>(g, own, first(g.rank), first(g.rank + 1));
  arrive(g);
  if ((failure = wait_for_all(g, g.count))) return failure;
  for (int r = 0; r < g.ranks; ++r) {
    const T* sums = reinterpret_cast<const T*>(g.slot(r)) + first(r);
    memcpy(data + first(r), sums, (first(r + 1) - first(r)) * sizeof(T));
  }
  return 0;
}

template <class T, class Operation>
int32_t reduce(SharedGroup& g, T* data, int64_t count, int kind) {
  const int64_t most = g.slot_bytes / int64_t(sizeof(T));
  int32_t failure = 0;
  for (int64_t done = 0; done < count && !failure; done += most) {
    const int64_t part = std::min(most, count - done);
    failure = reduce_round<T, Operation>(g, data + done, part, call_of(kind, count));
  }
  return failure;
}

// Bytes `first` to `last` of a part with rows of `width`, to their places in rows of `stride`.
void place(const char* part, int64_t first, int64_t last, int64_t width, int64_t stride,
           char* whole) {
  while (first < last) {
    const int64_t row = first / width, column = first % width;
    const int64_t count = std::min(width - column, last - first);
    memcpy(whole + row * stride + column, part, count);
    part += count;
    first += count;
  }
}

int32_t gather(SharedGroup& g, const char* part, int64_t rows, const int64_t* widths, char* whole) {
  int64_t widest = 0, stride = 0;
  for (int r = 0; r < g.ranks; ++r) {
    widest = std::max(widest, widths[r]);
    stride += widths[r];
  }
  if (g.rank == 0) place(part, 0, rows * widths[0], widths[0], stride, whole);
  for (int64_t done = 0; done < rows * widest; done += g.slot_bytes) {
    int32_t failure = begin(g, call_of(3, rows * stride));
    if (failure) return failure;
    const int64_t end = done + g.slot_bytes;
    const int64_t mine = std::min(end, rows * widths[g.rank]) - done;
    if (g.rank != 0 && mine > 0) memcpy(g.slot(g.rank), part + done, mine);
    arrive(g);
    if (g.rank != 0) continue;
    int64_t offset = widths[0];
    for (int r = 1; r < g.ranks; offset += widths[r++]) {
      if ((failure = wait_for(g, r, g.count)) || (failure = check_call(g, r))) return failure;
      place(g.slot(r), done, std::min(end, rows * widths[r]), widths[r], stride, whole + offset);
    }
  }
  return 0;
}

// What a rank gets of another's part: `width` bytes of each row, from `offset` on; from nobody: `giver` is -1.
struct Gift {
  int32_t giver;
  int64_t offset, width;
};

// Rows of `width` bytes. A rank that `gives` puts them into its slot, where rows are `widest` bytes apart; one that
// gets something copies its own into `whole`, and what it gets to their right.
int32_t hand_over(SharedGroup& g, const char* part, int64_t rows, int64_t width, int64_t widest, bool gives,
                  const Gift& gift, char* whole) {
  const int64_t most = g.slot_bytes / widest, stride = width + gift.width;
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t last = std::min(rows, first + most);
    int32_t failure = begin(g, call_of(5, rows * widest));
    if (failure) return failure;
    if (gives)
      for (int64_t row = first; row < last; ++row)
        memcpy(g.slot(g.rank) + (row - first) * widest, part + row * width, width);
    arrive(g);
    if (gift.giver < 0) continue;
    for (int64_t row = first; row < last; ++row) memcpy(whole + row * stride, part + row * width, width);
    if ((failure = wait_for(g, gift.giver, g.count)) || (failure = check_call(g, gift.giver))) return failure;
    const char* given = g.slot(gift.giver) + gift.offset;
    for (int64_t row = first; row < last; ++row, given += widest)
      memcpy(whole + row * stride + width, given, gift.width);
  }
  return 0;
}

int32_t broadcast(SharedGroup& g, char* data, int64_t bytes) {
  for (int64_t done = 0; done < bytes; done += g.slot_bytes) {
    const int64_t count = std::min(g.slot_bytes, bytes - done);
    int32_t failure = begin(g, call_of(4, bytes));
    if (failure) return failure;
    if (g.rank == 0) memcpy(g.slot(0), data + done, count);
    arrive(g);
    if (g.rank == 0) continue;
    if ((failure = wait_for(g, 0, g.count)) || (failure = check_call(g, 0))) return failure;
    memcpy(data + done, g.slot(0), count);
  }
  return 0;
}

}  // namespace
}  // namespace headgate

using namespace headgate;

// Bytes to be mapped, all zero at first, for `ranks` with `slot_bytes` (a multiple of 64) for each
// rank's part of a call; what is larger goes through the slots in several rounds.
HG_API int64_t hg_shared_bytes(int32_t ranks, int64_t slot_bytes) {
  return kHeaderBytes + 2 * ranks * slot_bytes;
}

// `process_ids` and `process_fds` (-1: none; they stay the caller's) are by rank. A call that waits
// longer than `timeout` seconds for one rank fails; `watches`: before it sleeps it watches for a while.
// Null where there is no memory, or too many ranks.
HG_API void* hg_shared_open(void* memory, int32_t rank, int32_t ranks, int64_t slot_bytes,
                            const int32_t* process_ids, const int32_t* process_fds,
                            int32_t watches, double timeout) {
  SharedGroup* g = ranks > kMaxRanks ? nullptr : new (std::nothrow) SharedGroup;
  if (!g) return nullptr;
  g->header = static_cast<Header*>(memory);
  g->slots = static_cast<char*>(memory) + kHeaderBytes;
  g->rank = rank;
  g->ranks = ranks;
  g->slot_bytes = slot_bytes;
  g->watches = watches;
  g->timeout_nanoseconds = int64_t(timeout * 1e9);
  memcpy(g->process_ids, process_ids, ranks * sizeof(int32_t));
  memcpy(g->process_fds, process_fds, ranks * sizeof(int32_t));
  return g;
}

// Tells the others that this rank has left.
HG_API void hg_shared_close(void* group) {
  SharedGroup* g = static_cast<SharedGroup*>(group);
  g->line(g->rank).left.store(1, std::memory_order_seq_cst);
  wake_all(g->line(g->rank).count);
  delete g;
}

// Sums `data` over the ranks, in place, each element in the order of the ranks.
HG_API int32_t hg_shared_sum_float(void* group, float* data, int64_t count) {
  return reduce<float, Add>(*static_cast<SharedGroup*>(group), data, count, 0);
}

HG_API int32_t hg_shared_sum_int64(void* group, int64_t* data, int64_t count) {
  return reduce<int64_t, Add>(*static_cast<SharedGroup*>(group), data, count, 1);
}

HG_API int32_t hg_shared_min_int64(void* group, int64_t* data, int64_t count) {
  return reduce<int64_t, Least>(*static_cast<SharedGroup*>(group), data, count, 2);
}

// Rank r's `part` is rows x widths[r] bytes; rank 0's `whole` gets them side by side, unless `needless` is
// not 0, for all ranks.
HG_API int32_t hg_shared_gather(void* group, const char* part, int64_t rows, const int64_t* widths,
                                char* whole, int32_t needless) {
  return needless ? 0 : gather(*static_cast<SharedGroup*>(group), part, rows, widths, whole);
}

// Ranks that `gives` is not 0 for have multiplied something for others: `part`, rows x width bytes, at most `widest`
// of all ranks. A rank with a `giver` (-1: none) has its own columns in `part`, and gets them in `whole` beside
// `taken` bytes of each of the giver's rows, from `offset` on.
HG_API int32_t hg_shared_hand_over(void* group, const char* part, int64_t rows, int64_t width, int64_t widest,
                                   int32_t gives, int32_t giver, int64_t offset, int64_t taken, char* whole) {
  return hand_over(*static_cast<SharedGroup*>(group), part, rows, width, widest, gives, {giver, offset, taken}, whole);
}

// Rank 0's `data` for everyone.
HG_API int32_t hg_shared_broadcast(void* group, char* data, int64_t bytes) {
  return broadcast(*static_cast<SharedGroup*>(group), data, bytes);
}
