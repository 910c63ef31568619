// Scores of a block of keys, and their softmax so far, in the two ways that attention.h tells of.
#pragma once

#include "attention_product.h"

namespace {

using namespace headgate;

HG_INLINE vf cap_scores(vf s, float cap) {
  return cap > 0 ? set1(cap) * tanh_v(s / set1(cap)) : s;
}

// ---- few query rows: vectors over keys ----

// VL keys and Q of a head's `queries`; asks for keys to come as one that does this part of a block's work.
template <int Q, int T>
HG_INLINE void score_group(const Tile& t, const float* q, int queries, int group, float* weights, int whole,
                           Asked& asked) {
  constexpr int kTwos = Q <= (VL == 16 ? 6 : 3) ? 2 : 1;  // of vectors of keys, sums in registers
  const void* const* keys = t.keys + group * VL;
  const int lanes = t.lanes;
  const ptrdiff_t at = t.head * lanes;
  vf folded[4][Q];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j += kTwos) {
    vf s[2 * kTwos][Q];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kTwos; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < Q; ++r) s[i][r] = set1(0.0f);
    for (ptrdiff_t d = 0; d < lanes; d += kLanes) {
      fetch_evenly<fetch_key>(t, asked, 2 * kTwos * VL * Q, whole);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kTwos; ++i) {
        const vf k = load_keys<T>(keys, 2 * j + i, at + d);
#pragma GCC unroll 16
        for (int r = 0; r < Q; ++r)
          s[i][r] = multiply_add<T>(repeat_lanes(q + d * queries + r * kLanes, i), k, s[i][r]);
      }
    }
#pragma GCC unroll 2
    for (int two = 0; two < kTwos; ++two)
#pragma GCC unroll 16
      for (int r = 0; r < Q; ++r)
        folded[j + two][r] = fold_halves(s[2 * two][r], s[2 * two + 1][r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Q; ++r) {
    vf score = fold_last(fold_pairs(folded[0][r], folded[1][r]),
                         fold_pairs(folded[2][r], folded[3][r]));
    if constexpr (T == kScaledBytes) score = score * load(t.key_scales + group * VL);
    store(weights + r * kKeyBlock + group * VL, score);
  }
  const float cap = t.job->soft_cap;
  if (cap > 0)
    for (int r = 0; r < Q; ++r) {
      float* scores = weights + r * kKeyBlock + group * VL;
      store(scores, cap_scores(load(scores), cap));
    }
}

template <int Q, int T>
void score_few(Tile& t, int group_first, int group_last) {
  // As many queries at once as there are registers for their sums.
  constexpr int kFirst = VL == 16 || Q <= 6 ? Q : (Q + 1) / 2, kSecond = Q - kFirst;
  const float* q = t.q + t.head * Q * t.lanes;
  float* weights = t.weights + t.head * Q * kKeyBlock;
  const int whole = t.lanes * t.queries;
  Asked asked = t.asked_keys;
  for (int g = group_first; g < group_last; ++g) {
    score_group<kFirst, T>(t, q, Q, g, weights, whole, asked);
    if constexpr (kSecond > 0)
      score_group<kSecond, T>(t, q + kFirst * kLanes, Q, g, weights + kFirst * kKeyBlock, whole, asked);
  }
  t.asked_keys = asked;
}

// Leaves weights, times the values' scales where there are any; rounded, in the lower half of where scores
// were, for pairs.
template <int T>
void soften_few(Tile& t, int32_t base, int group_first, int group_last) {
  const vf hidden = set1(-__builtin_inff());
  for (int i = 0; i < t.queries; ++i) {
    float* weights = t.weights + i * kKeyBlock;
    const vi low = set1i(t.low[i]), high = set1i(t.high[i]);
    vf top = set1(t.part.maximum[i]);
    for (int g = group_first; g < group_last; ++g) {
      const vi at = add_int(set1i(base + g * VL), iota());
      const vf s = if_within(at, low, high, load(weights + g * VL), hidden);
      store(weights + g * VL, s);
      top = vmax(top, s);
    }
    const float maximum = max_lanes(top);
    t.decay[i] = t.part.maximum[i] - maximum;
    t.part.maximum[i] = maximum;
  }
  for (int i = 0; i < t.queries; i += VL) {
    if (i + VL <= kQueryTile) store(t.decay + i, exp_v(load(t.decay + i)));
  }
  for (int i = 0; i < t.queries; ++i) {
    float* weights = t.weights + i * kKeyBlock;
    const vf maximum = set1(t.part.maximum[i]), decay = set1(t.decay[i]);
    vf sums[kSums / VL];
    for (int n = 0; n < kSums / VL; ++n) sums[n] = load(t.part_sums + i * kSums + n * VL) * decay;
    for (int g = group_first; g < group_last; ++g) {
      const vf x = load(weights + g * VL) - maximum;
      vf p;
      if constexpr (in_pairs(T)) {
        uint16_t* rounded = (uint16_t*)weights + g * VL;
        store_rounded<T>(rounded, exp_to_round(x));
        p = load_bf16(rounded);
      } else {
        p = exp_v(x);
        store(weights + g * VL, T == kScaledBytes ? p * load(t.val_scales + g * VL) : p);
      }
      vf& sum = sums[g % (kSums / VL)];
      sum = sum + p;
    }
    for (int n = 0; n < kSums / VL; ++n) store(t.part_sums + i * kSums + n * VL, sums[n]);
  }
}

// ---- many query rows: vectors over query rows ----

// s += the products of K keys and V vectors of query rows in one lane.
template <int T, int K, int V>
HG_INLINE void add_lane(const float* const* keys, const float* q, int padded, int lane, vf (&s)[K][V]) {
  vf x[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) x[v] = load(q + lane * padded + v * VL);
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    const vf y = set1(keys[k][lane]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[k][v] = multiply_add<T>(y, x[v], s[k][v]);
  }
}

template <int K, int V>
HG_INLINE void add_sums(const vf (&first)[K][V], vf (&s)[K][V]) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[k][v] = first[k][v] + s[k][v];
}

// s = products of K keys and V vectors of query rows, over lanes `LANE`, `LANE` + `STEP`, ... of `lanes`:
// kLanes / STEP chains, which are folded by halves, as score_few does. The last two of a fold are
// in registers at the same time.
template <int T, int LANE, int STEP, int K, int V>
HG_INLINE void score_lanes(const float* const* keys, const float* q, int padded, int lanes,
                           vf (&s)[K][V]) {
  vf first[K][V];
  if constexpr (2 * STEP < kLanes) {
    score_lanes<T, LANE, 2 * STEP>(keys, q, padded, lanes, first);
    score_lanes<T, LANE + STEP, 2 * STEP>(keys, q, padded, lanes, s);
  } else {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) first[k][v] = s[k][v] = set1(0.0f);
    int lane = LANE;
    for (; lane + STEP < lanes; lane += kLanes) {
      add_lane<T>(keys, q, padded, lane, first);
      add_lane<T>(keys, q, padded, lane + STEP, s);
    }
    if (lane < lanes) add_lane<T>(keys, q, padded, lane, first);
  }
  add_sums(first, s);
}

// Scores of K keys, times their scales where there are any, for V vectors of query rows.
template <int T, int K, int V>
void score_many_tile(const void* const* keys, const float* scales, const float* q, int padded,
                     int lanes, float* out, float cap) {
  const float* row[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) row[k] = (const float*)keys[k];
  vf s[K][V];
  score_lanes<T, 0, 1>(row, q, padded, lanes, s);
  for (int k = 0; k < K; ++k)
    for (int v = 0; v < V; ++v) {
      const vf score = scales ? s[k][v] * set1(scales[k]) : s[k][v];
      store(out + k * padded + v * VL, cap_scores(score, cap));
    }
}

template <int T, int V>
void score_many_columns(Tile& t, int column, int first, int last) {
  const float cap = t.job->soft_cap;
  const float* q = t.q + column * VL;
  float* out = t.weights + column * VL;
  const int padded = t.padded_queries;
  const auto score = [&](auto tile, int k, int count) {
    fetch_evenly<fetch_key>(t, t.asked_keys, count * V, padded / VL);
    const float* scales = t.job->k_scales ? t.key_scales + k : nullptr;
    tile(t.keys + k, scales, q, padded, t.lanes, out + k * padded, cap);
  };
  // As many keys as there are registers for both chains of each sum.
  constexpr int kKeys = VL == 16 ? (V == 1 ? 8 : 4) : 6 / V;
  int k = first;
  for (; k + kKeys <= last; k += kKeys) score(score_many_tile<T, kKeys, V>, k, kKeys);
  for (; k < last; ++k) score(score_many_tile<T, 1, V>, k, 1);
}

// Two vectors of query rows at a time, which stay in the first-level cache beside the keys; three are
// taken together where registers allow.
template <int T>
void score_many(Tile& t, int first, int last) {
  const int vectors = t.padded_queries / VL, rest = VL == 16 && vectors >= 3 ? vectors % 2 * 3 : vectors % 2;
  int v = 0;
  for (; v + rest < vectors; v += 2) score_many_columns<T, 2>(t, v, first, last);
  if constexpr (VL == 16)
    if (rest == 3) score_many_columns<T, 3>(t, v, first, last);
  if (rest == 1) score_many_columns<T, 1>(t, v, first, last);
}

// Keys [first, last) of the block at `base`; `edge`: some query does not see all of them. Leaves what
// soften_few does, of pairs those of two keys in one row.
template <int T>
void soften_many(Tile& t, int32_t base, int first, int last, bool edge) {
  const vf hidden = set1(-__builtin_inff());
  const bool scaled = t.job->v_scales;
  const int padded = t.padded_queries;
  for (int c = 0; c < padded; c += VL) {
    float* weights = t.weights + c;
    const vi low = load_int(t.low + c), high = load_int(t.high + c);
    const vf before = load(t.part.maximum + c);
    const auto score = [&](int k) {
      vf s = load(weights + k * padded);
      if (!edge) return s;
      s = if_within(set1i(base + k), low, high, s, hidden);
      store(weights + k * padded, s);
      return s;
    };
    constexpr int kChains = 4;  // a maximum does not depend on the order
    vf tops[kChains] = {before, before, before, before};
    int at = first;
    for (; at + kChains <= last; at += kChains)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) tops[i] = vmax(tops[i], score(at + i));
    for (; at < last; ++at) tops[0] = vmax(tops[0], score(at));
    const vf top = vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3]));
    const vf decay = exp_v(before - top);
    store(t.part.maximum + c, top);
    store(t.decay + c, decay);
    for (int n = 0; n < kSums; ++n) {
      float* sum = t.part_sums + n * padded + c;
      store(sum, load(sum) * decay);
    }
    float* sums = t.part_sums + c;
    const auto add = [&](unsigned k, vf p) {
      float* sum = sums + k % kSums * padded;
      store(sum, load(sum) + p);
    };
    if constexpr (in_pairs(T)) {
      // The other key of a pair.
      if (first % 2) store(weights + (first - 1) * padded, hidden);
      if (last % 2) store(weights + last * padded, hidden);
      const float* scores = weights + first / 2 * 2 * padded;
      for (int k = first / 2 * 2; k < last; k += 2, scores += 2 * padded) {
        const vf low = exp_to_round(load(scores) - top), high = exp_to_round(load(scores + padded) - top);
        const vi pair = pair_rounded<T>(low, high);
        store(weights + k / 2 * padded, as_float(pair));
        add(k, widen_low(pair));
        add(k + 1, widen_high(pair));
      }
    } else {
      for (int k = first; k < last; ++k) {
        const vf p = exp_v(load(weights + k * padded) - top);
        store(weights + k * padded, scaled ? p * set1(t.val_scales[k]) : p);
        add(k, p);
      }
    }
  }
}

}  // namespace
