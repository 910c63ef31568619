// See thread_pool.h. Workers sleep on a futex soon after the last job; no processor time is used while nothing
// runs.
//
// For each group of tiles one 64-bit word holds (job number, end, next tile), so that a claim says by
// itself whether it is valid: a worker that comes late, even by several jobs, either gets a tile of the
// job that runs now or finds nothing left. A job cannot end before every claimed tile is reported done,
// so whoever holds a valid claim may read the job's fields.
//
// Threads of different groups touch no common word until they have no more tiles: where two cores have
// no cache in common, to fetch such a word takes as long as hundreds of multiply-adds.
#include "thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <mutex>

#include "processors.h"
#include "watch.h"

namespace headgate {
namespace {

constexpr int kCountBits = 22;
constexpr uint64_t kCountMask = (1ull << kCountBits) - 1;
// Idle workers may step past the last tile, once each: room is left for them.
constexpr int64_t kMaxTiles = (1 << kCountBits) - 65536;
constexpr int kMaxThreads = 1024;
constexpr int64_t kTurnNanoseconds = 100000;
// A tile of attention keeps half a megabyte on the stack.
constexpr size_t kStackBytes = 4 << 20;

struct Pool {
  struct alignas(64) Group {
    std::atomic<uint64_t> claims{0};            // job number | end | next tile
  };
  Group groups[kMaxGroups];
  std::atomic<int32_t> group_count{1};
  alignas(64) std::atomic<int32_t> done{0};     // tiles finished, as far as they are reported
  std::atomic<int32_t> caller_sleeps{0};
  alignas(64) std::atomic<int32_t> signal{0};   // bumped for each job; sleeping workers wait on it
  std::atomic<int32_t> sleepers{0};
  std::atomic<int32_t> wanted_workers{0};       // workers with an index from here on end themselves
  TileFunction function = nullptr;
  const void* job = nullptr;
  int32_t tiles = 0;
  std::mutex turn;  // one job at a time
  int started = 0;  // workers that exist; guarded by `turn`
  pthread_t threads[kMaxThreads];
  uint64_t number = 0;
  alignas(64) Seat seats[kMaxThreads] = {};  // by index of the thread, 0 is who calls
};

// Never destroyed: workers may outlive the static destructors.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

void futex_wait(std::atomic<int32_t>& word, int32_t seen) {
  syscall(SYS_futex, reinterpret_cast<int32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<int32_t>& word, int count) {
  syscall(SYS_futex, reinterpret_cast<int32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

bool has_work(uint64_t claims) {
  return (claims & kCountMask) < ((claims >> kCountBits) & kCountMask);
}

// Of the threads in the pool; 0 is who calls.
thread_local int thread_index = 0;

void let_others_run() {
  Pool& p = pool();
  const int threads = p.wanted_workers.load(std::memory_order_relaxed) + 1;
  yield_apart(thread_index, threads, [&p](int index) -> Seat& { return p.seats[index]; });
}

// Whoever waits for this processor (gateway, router, gRPC's threads) gets it now and then between two
// tiles. If the system took it in the middle of one, the others would wait for that tile.
void end_turn() {
  thread_local int64_t turn_began = 0;
  if (now_ns() - turn_began < kTurnNanoseconds) return;
  let_others_run();
  turn_began = now_ns();
}

// Runs the tiles of a group that nobody has taken yet: how many.
int32_t take_tiles(Pool& p, Pool::Group& group) {
  int32_t taken = 0;
  for (uint64_t claim = group.claims.load(std::memory_order_acquire); has_work(claim); ++claim) {
    end_turn();
    claim = group.claims.fetch_add(1, std::memory_order_acq_rel);
    if (!has_work(claim)) break;
    p.function(p.job, int64_t(claim & kCountMask));
    ++taken;
  }
  return taken;
}

// Takes tiles until none is left, of its own group first. `p.tiles` may be read by those who took some.
void work(Pool& p) {
  const int threads = p.wanted_workers.load(std::memory_order_relaxed) + 1;
  const int count = p.group_count.load(std::memory_order_relaxed);
  const int own = int(int64_t(thread_index) * count / threads);
  int32_t taken = 0;
  for (int i = 0; i < count; ++i) taken += take_tiles(p, p.groups[(own + i) % count]);
  if (!taken) return;
  const int32_t tiles = p.tiles;
  if (p.done.fetch_add(taken, std::memory_order_seq_cst) + taken == tiles &&
      p.caller_sleeps.load(std::memory_order_seq_cst)) {
    futex_wake(p.done, 1);
  }
}

void* worker_main(void* argument) {
  Pool& p = pool();
  const int index = int(reinterpret_cast<intptr_t>(argument));
  thread_index = index + 1;
  for (;;) {
    const int32_t seen = p.signal.load(std::memory_order_seq_cst);
    if (index >= p.wanted_workers.load(std::memory_order_seq_cst)) return nullptr;
    work(p);
    auto awake = [&] { return p.signal.load(std::memory_order_acquire) != seen; };
    if (watch(awake, let_others_run)) continue;
    p.seats[thread_index].store(0, std::memory_order_relaxed);
    p.sleepers.fetch_add(1, std::memory_order_seq_cst);
    futex_wait(p.signal, seen);
    p.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void wake_workers(Pool& p) {
  p.signal.fetch_add(1, std::memory_order_seq_cst);
  if (p.sleepers.load(std::memory_order_seq_cst)) futex_wake(p.signal, INT_MAX);
}

void start_workers(Pool& p) {
  const int wanted = p.wanted_workers.load(std::memory_order_relaxed);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStackBytes);
  while (p.started < wanted) {
    void* index = reinterpret_cast<void*>(intptr_t(p.started));
    if (pthread_create(&p.threads[p.started], &attributes, worker_main, index) != 0) {
      // The system grants no more threads: the job is done by those there are.
      p.wanted_workers.store(p.started);
      break;
    }
    pthread_setname_np(p.threads[p.started], "headgate-cpu");
    ++p.started;
  }
  pthread_attr_destroy(&attributes);
}

// A forked child has no workers; it starts its own when it runs its first job.
void forget_workers() {
  Pool& p = pool();
  p.started = 0;
  p.sleepers.store(0);
  p.caller_sleeps.store(0);
  for (Pool::Group& group : p.groups) group.claims.store(0);
  for (Seat& seat : p.seats) seat.store(0);
  p.turn.unlock();
}

void register_fork_handlers() {
  static const int once = pthread_atfork([] { pool().turn.lock(); }, [] { pool().turn.unlock(); },
                                         forget_workers);
  (void)once;
}

void run_on_caller(TileFunction function, const void* job, int64_t first, int64_t tiles) {
  for (int64_t tile = first; tile < tiles; ++tile) function(job, tile);
}

void wait_until_done(Pool& p, int32_t tiles) {
  auto complete = [&] { return p.done.load(std::memory_order_acquire) == tiles; };
  while (!watch(complete, let_others_run)) {
    p.seats[thread_index].store(0, std::memory_order_relaxed);
    p.caller_sleeps.store(1, std::memory_order_seq_cst);
    const int32_t seen = p.done.load(std::memory_order_seq_cst);
    if (seen != tiles) futex_wait(p.done, seen);
    p.caller_sleeps.store(0, std::memory_order_seq_cst);
  }
}

}  // namespace

void set_num_threads(int count) {
  Pool& p = pool();
  register_fork_handlers();
  std::lock_guard<std::mutex> lock(p.turn);
  const int workers = (count < 1 ? 1 : count > kMaxThreads ? kMaxThreads : count) - 1;
  p.wanted_workers.store(workers);
  if (p.started > workers) wake_workers(p);
  for (; p.started > workers; --p.started) pthread_join(p.threads[p.started - 1], nullptr);
}

int num_threads() { return pool().wanted_workers.load() + 1; }

// From now on the groups' tiles may be taken.
void offer(Pool& p, const TileGroups& groups) {
  p.number = (p.number + 1) & ((1ull << (64 - 2 * kCountBits)) - 1);
  p.group_count.store(groups.count, std::memory_order_relaxed);
  uint64_t first = 0;
  for (int32_t g = 0; g < groups.count; ++g) {
    const uint64_t end = uint64_t(groups.ends[g]);
    p.groups[g].claims.store(p.number << (2 * kCountBits) | end << kCountBits | first,
                             std::memory_order_seq_cst);
    first = end;
  }
}

void run_tiles(TileFunction function, const void* job, int64_t tiles) {
  run_tiles(function, job, {1, {tiles}});
}

void run_tiles(TileFunction function, const void* job, const TileGroups& groups) {
  Pool& p = pool();
  const int64_t tiles = groups.tiles();
  if (tiles <= 1 || p.wanted_workers.load(std::memory_order_relaxed) == 0) {
    run_on_caller(function, job, 0, tiles);
    return;
  }
  std::lock_guard<std::mutex> lock(p.turn);
  start_workers(p);
  const int64_t shared = tiles < kMaxTiles ? tiles : kMaxTiles;
  p.function = function;
  p.job = job;
  p.tiles = int32_t(shared);
  p.done.store(0, std::memory_order_relaxed);
  offer(p, shared == tiles ? groups : TileGroups{1, {shared}});
  wake_workers(p);
  work(p);
  wait_until_done(p, int32_t(shared));
  run_on_caller(function, job, shared, tiles);
}

}  // namespace headgate
