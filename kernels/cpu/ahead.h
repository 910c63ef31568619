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

// The address of what is needed next, how far it moves on at each step, and whether it is used once:
// then it passes by the larger caches, and what they hold of others stays there.
struct Ahead {
  const char* address;
  int64_t stride;
  bool once;
};

// Asks for the line so many bytes `on`.
HG_INLINE void ask_for(const Ahead& ahead, int on) {
  if (ahead.once) __builtin_prefetch(ahead.address + on, 0, 0);
  else __builtin_prefetch(ahead.address + on, 0, 3);
}

// For row tile `tile` of `count`, which takes `size` bytes of weights in steps of `step` bytes: its share
// of those at `soon`. A tile that is alone takes all from memory, and asks for what is so many bytes `on`.
HG_INLINE Ahead ahead_of(const char* weights, int64_t on, const char* soon, int64_t size,
                         int64_t step, int64_t tile, int64_t count) {
  if (count == 1) return {weights + on, step, true};
  return {soon + tile * size / count, (step + count - 1) / count, false};
}

// The panel after this one, where the thread's next tile probably begins with `later`.
HG_INLINE int64_t panel_after(int64_t panel, int64_t last, int64_t later, int64_t panels) {
  const int64_t next = panel + 1 < last ? panel + 1 : later;
  return next < panels ? next : panel;
}

}  // namespace
