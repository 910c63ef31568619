// Runs the recorded calls of a step (see program.py) one after another, without the interpreter.
//
// A recording knows functions by address and arguments by class, so one call expression has to serve
// them all. That is sound where the calling convention keeps integers and floats apart (each class
// fills its own registers in order, only what is left over goes to the stack, in slots of 8 bytes,
// and the caller takes it off again): a function then finds its arguments however many more there
// are behind them. System V on x86-64 and AAPCS64 on Linux do; elsewhere nothing is recorded.
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "watch.h"

namespace {

// As program.py lays it out. Arguments are `integers` integers and pointers, then `floats` floats.
struct Call {
  int64_t function;
  int64_t first;  // place of its first argument
  int64_t integers, floats;
  int64_t has_status;  // its int32 result is 0 unless it failed
};

#if defined(__x86_64__) && defined(__linux__)
#define HG_CAN_REPLAY 1
constexpr int kRegisters = 6;
#elif defined(__aarch64__) && defined(__linux__)
#define HG_CAN_REPLAY 1
constexpr int kRegisters = 8;
#else
#define HG_CAN_REPLAY 0
constexpr int kRegisters = 6;
#endif
constexpr int kStack = 20;
constexpr int kFloats = 8;

using I = int64_t;
using F = double;

int64_t invoke(int64_t function, const I* i, const F* f) {
  const I* s = i + kRegisters;
#if defined(__aarch64__)
  using Function = I (*)(I, I, I, I, I, I, I, I, F, F, F, F, F, F, F, F,  //
                         I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I);
  return reinterpret_cast<Function>(function)(
      i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], f[0], f[1], f[2], f[3], f[4], f[5], f[6],
      f[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13],
      s[14], s[15], s[16], s[17], s[18], s[19]);
#else
  using Function = I (*)(I, I, I, I, I, I, F, F, F, F, F, F, F, F,  //
                         I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I);
  return reinterpret_cast<Function>(function)(
      i[0], i[1], i[2], i[3], i[4], i[5], f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], s[0],
      s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14],
      s[15], s[16], s[17], s[18], s[19]);
#endif
}

}  // namespace

// Integer arguments that a recorded call may have; 0 where calls can't be replayed at all.
HG_API int32_t hg_replay_most_integers() { return HG_CAN_REPLAY ? kRegisters + kStack : 0; }
HG_API int32_t hg_replay_most_floats() { return kFloats; }

// Of the arguments that follow the `num_sizes` sizes: each has a constant and what it grows by with each size,
// 1 + num_sizes words. Its value goes to its place among the `values`.
HG_API void hg_replay_arguments(const int64_t* arguments, const int64_t* places, int64_t count,
                                const int64_t* sizes, int32_t num_sizes, int64_t* values) {
  for (int64_t i = 0; i < count; ++i) {
    I value = *arguments++;
    for (int32_t s = 0; s < num_sizes; ++s) value += *arguments++ * sizes[s];
    values[places[i]] = value;
  }
}

// Makes the calls with `values` of their arguments; a float's is its bits. `beats` is raised by one
// after each call. Stops at the first call that fails and returns its status, with its number in
// `failed`. Each call's time is added to its place in `nanoseconds`, unless that is null.
HG_API int32_t hg_replay(const void* calls, int64_t count, const int64_t* values, int64_t* beats,
                         int64_t* failed, int64_t* nanoseconds) {
  const Call* all = static_cast<const Call*>(calls);
  for (int64_t c = 0; c < count; ++c) {
    const Call& call = all[c];
    I integers[kRegisters + kStack] = {};
    F floats[kFloats] = {};
    memcpy(integers, values + call.first, call.integers * sizeof *values);
    memcpy(floats, values + call.first + call.integers, call.floats * sizeof *values);
    const int64_t began = nanoseconds ? headgate::now_ns() : 0;
    const int64_t result = invoke(call.function, integers, floats);
    if (nanoseconds) nanoseconds[c] += headgate::now_ns() - began;
    __atomic_fetch_add(beats, 1, __ATOMIC_RELAXED);
    if (call.has_status && int32_t(result) != 0) {
      *failed = c;
      return int32_t(result);
    }
  }
  return 0;
}
