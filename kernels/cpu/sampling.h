// The likeliest token of a whole vocabulary, and the Gumbel-max rule: argmax of score + noise, with
// Philox4x32-10 noise (see philox.py), whose numbers these are.
//
// Noise is needed exactly only where it may decide: an approximation in float32 of all sums finds the
// few tokens that come within its error of the best, and those get the logarithms in double.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace {

using namespace headgate;

// Far more than the approximation's error (1e-5) and its rounding among sums of this size.
constexpr float kNoiseMargin = 1e-3f;

// The words of tokens [4 * first_group, 4 * (first_group + groups)).
void philox_words(const GumbelJob& job, uint32_t first_group, int groups, uint32_t* words) {
  for (int g = 0; g < groups; ++g) {
    uint32_t c0 = first_group + g, c1 = job.position, c2 = job.sample_index, c3 = 0;
    uint32_t k0 = (uint32_t)job.seed, k1 = (uint32_t)(job.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
      c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
      c1 = (uint32_t)b;
      c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
      c3 = (uint32_t)a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[4 * g] = c0;
    words[4 * g + 1] = c1;
    words[4 * g + 2] = c2;
    words[4 * g + 3] = c3;
  }
}

float exact_noise(uint32_t word) {
  return (float)-log(-log(((double)word + 0.5) * 0x1p-32));
}

// ln x of positive normal x, to about 1e-7 relative.
HG_INLINE vf log_v(vf x) {
  const vf one = set1(1.0f);
  // x = 2^e * m with m in [sqrt(1/2), sqrt(2)).
  const vi bits = as_int(x);
  const vi shifted = add_int(bits, set1i(0x3f800000 - 0x3f3504f3));
  const vf e = to_float(add_int(shift_right(shifted, 23), set1i(-127)));
  const vf m = as_float(add_int(and_int(shifted, set1i(0x007fffff)), set1i(0x3f3504f3)));
  const vf f = m - one, s = f * f;
  vf p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  vf y = fma(p * s, f, s * set1(-0.5f)) + f;
  return fma(e, set1(0.693147180559945f), y);
}

// Noise to about 1e-5, from the words as floats: `low` = (word + 0.5) / 2^32 and `high` = 1 - low,
// whichever is small being accurate.
HG_INLINE vf rough_noise(vf low, vf high) {
  // -ln(1 - high): by its series where high is small.
  vf series = fma(high, set1(0.25f), set1(0.33333333f));
  series = fma(series, high, set1(0.5f));
  series = fma(series * high, high, high);
  const vf far = set1(0.0f) - log_v(low);
  const vf x = if_less(high, set1(0.02f), series, far);
  return set1(0.0f) - log_v(x);
}

void gumbel_tile(const void* data, int64_t tile) {
  const GumbelJob& job = *(const GumbelJob*)data;
  const int64_t first = tile * kGumbelTile;
  const int count = (int)(job.size - first < kGumbelTile ? job.size - first : kGumbelTile);
  alignas(64) uint32_t words[kGumbelTile];
  alignas(64) float sums[kGumbelTile];
  alignas(64) float low[kGumbelTile], high[kGumbelTile];
  philox_words(job, (uint32_t)(first / 4), (count + 3) / 4, words);
  const float* scores = job.scores + first;
  for (int i = 0; i < count; ++i) {
    low[i] = ((float)words[i] + 0.5f) * 0x1p-32f;
    high[i] = ((float)(~words[i]) + 0.5f) * 0x1p-32f;
  }
  const vf best = set1(job.best), temperature = set1(job.temperature);
  vf top = set1(-__builtin_inff());
  for (int i = 0; i < count; i += VL) {
    const int left = count - i;
    const vf score = left < VL ? load_n(scores + i, left) : load(scores + i);
    vf sum = (score - best) / temperature + rough_noise(load(low + i), load(high + i));
    store(sums + i, sum);
    if (left < VL) break;
    top = vmax(sum, top);
  }
  float most = max_lanes(top);
  for (int i = count / VL * VL; i < count; ++i) most = sums[i] > most ? sums[i] : most;
  GumbelBest found = {-__builtin_inff(), -1};
  const bool any = most > -__builtin_inff();
  for (int i = 0; any && i < count; ++i) {
    if (!(sums[i] >= most - kNoiseMargin)) continue;
    const float sum = (scores[i] - job.best) / job.temperature + exact_noise(words[i]);
    if (sum > found.sum) found = {sum, first + i};
  }
  job.found[tile] = found;
}

// The first of the largest, where none is infinite or not a number; -1 where that cannot be told.
int64_t argmax_of_finite(const float* scores, int64_t size) {
  constexpr int kChains = 4;
  vf best[kChains], odd[kChains];
  for (int c = 0; c < kChains; ++c) best[c] = set1(-__builtin_inff()), odd[c] = set1(0.0f);
  int64_t i = 0;
  for (; i + kChains * VL <= size; i += kChains * VL) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const vf score = load(scores + i + c * VL);
      best[c] = vmax(best[c], score);
      odd[c] = odd[c] + (score - score);
    }
  }
  const vf all = vmax(vmax(best[0], best[1]), vmax(best[2], best[3]));
  float most = max_lanes(all), differences = 0.0f;
  alignas(64) float lanes[VL];
  store(lanes, (odd[0] + odd[1]) + (odd[2] + odd[3]));
  for (int lane = 0; lane < VL; ++lane) differences += lanes[lane];
  for (; i < size; ++i) {
    most = scores[i] > most ? scores[i] : most;
    differences += scores[i] - scores[i];
  }
  if (differences != 0.0f) return -1;  // a difference that is not a number is not zero either
  constexpr int kAtOnce = 64;
  int64_t first = 0;
  for (; first + kAtOnce <= size; first += kAtOnce) {
    int found = 0;
    for (int k = 0; k < kAtOnce; ++k) found |= scores[first + k] == most;
    if (found) break;
  }
  while (scores[first] != most) ++first;
  return first;
}

// Tile: a row. As NumPy's argmax: the first of the largest, or the first that is not a number.
void argmax_tile(const void* data, int64_t row) {
  const ArgmaxJob& job = *(const ArgmaxJob*)data;
  const float* scores = job.scores + row * job.size;
  int64_t best = argmax_of_finite(scores, job.size);
  if (best < 0) {
    best = 0;
    for (int64_t i = 1; i < job.size && scores[best] == scores[best]; ++i)
      if (!(scores[i] <= scores[best])) best = i;
  }
  job.tokens[row] = best;
}

}  // namespace
