// Weights that a product will need, asked for while it multiplies with others.
//
// Several row tiles take a panel of weights one after the other, the first from memory. If it asked for
// them itself they would come too late: it is done with what memory sends in the time of a few rows only.
// So each asks for a share of the next panel.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

// How weights are asked for. Which is the fastest of the ways of a tile that is alone depends on the processor
// (docs/performance-history.md, "What is read once").
enum Fetch : int32_t {
  kShare,        // a tile's share of what several take, into the second-level cache
  kUnasked,      // not at all: the processor reads ahead by itself
  kPassingBy,    // into the first-level cache alone: what the larger ones hold of others stays there
  kSecondLevel,  // into the second-level cache
};

// How a tile that is alone asks for weights; `otherwise` on processors that are not Intel's, on which what passes
// by the larger caches comes half as fast.
HG_INLINE Fetch fetch_alone(Fetch otherwise) { return is_intel() ? kSecondLevel : otherwise; }

// The address of what is needed next, how far it moves on at each step, and how it is asked for. It
// travels in registers: on the stack it would be read in one piece right after it was written in two, which
// waits for all stores before.
struct Ahead {
  const char* address;
  int32_t stride;
  Fetch way;
  bool is_alone() const { return way != kShare; }
};
static_assert(sizeof(Ahead) == 16, "two registers");

template <int SIZE>
HG_INLINE void fetch_passing_by(const char* first) {
#pragma GCC unroll 8
  for (int byte = 0; byte < SIZE; byte += 64) __builtin_prefetch(first + byte, 0, 0);
}
template <int SIZE>
HG_INLINE void fetch_to_second_level(const char* first) {
#pragma GCC unroll 8
  for (int byte = 0; byte < SIZE; byte += 64) __builtin_prefetch(first + byte, 0, 2);
}

// Asks for what a step of SIZE bytes, the columns of all passes, needs. Each pass of several asks for its share.
template <int SIZE, int PASSES>
HG_INLINE void ask_for(Ahead& ahead) {
  if (ahead.way == kShare) fetch_to_second_level<(SIZE + PASSES - 1) / PASSES>(ahead.address);
  else if (ahead.way == kSecondLevel) fetch_to_second_level<SIZE>(ahead.address);
  else if (ahead.way == kPassingBy) fetch_passing_by<SIZE>(ahead.address);
  ahead.address += ahead.stride;
}

// Asks for what stands before the steps of a block, where a tile is alone. In the shares of several the steps
// have it.
template <int SIZE>
HG_INLINE void ask_for_header(Ahead& ahead) {
  if (ahead.way == kShare) return;
  if (ahead.way == kSecondLevel) fetch_to_second_level<SIZE>(ahead.address);
  else if (ahead.way == kPassingBy) fetch_passing_by<SIZE>(ahead.address);
  ahead.address += SIZE;
}

// What each of `count` row tiles asks for, which all take `size` bytes of weights: blocks of a header and so many
// steps.
struct Share {
  int64_t size;
  int32_t stride;
  bool is_all;
};
HG_INLINE Share share_of(int64_t size, int64_t header, int64_t step, int64_t steps, int64_t count) {
  if (count == 1) return {size, int32_t(step), true};
  const int64_t stride = step + (header + steps - 1) / steps;
  return {size / count, int32_t((stride + count - 1) / count), false};
}

// For row tile `tile`: its share of the weights at `soon`. A tile that is alone takes all from memory, and
// asks in the way `alone` for what is so many bytes `lead` from `weights`; with as many left it turns to `soon`.
HG_INLINE Ahead ahead_of(const char* weights, int64_t lead, const char* soon, Share share, int64_t tile,
                         Fetch alone) {
  if (share.is_all) return {lead < share.size ? weights + lead : soon, share.stride, alone};
  return {soon + tile * share.size, share.stride, kShare};
}

// What pass `pass` asks for in so many steps, where a tile takes its weights in several passes, each of some
// columns. A tile that is alone asks for all each time: the later ones find it.
HG_INLINE Ahead ahead_of_pass(Ahead whole, int pass, int passes, int64_t steps) {
  if (whole.is_alone()) return whole;
  return {whole.address + whole.stride * steps / passes * pass, (whole.stride + passes - 1) / passes, kShare};
}

// The panel after this one, where the thread's next tile probably begins with `later`.
HG_INLINE int64_t panel_after(int64_t panel, int64_t last, int64_t later, int64_t panels) {
  const int64_t next = panel + 1 < last ? panel + 1 : later;
  return next < panels ? next : panel;
}

}  // namespace
