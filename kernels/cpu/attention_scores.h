// Scores of a block of keys, and their softmax so far, in the two ways that attention.h tells of.
#pragma once

#include "attention_product.h"

namespace {

using namespace headgate;

HG_INLINE vf cap_scores(vf s, float cap) {
  return cap > 0 ? set1(cap) * tanh_v(s / set1(cap)) : s;
}

// Whole sums of products with biased bytes, as floats of what they would be without.
HG_INLINE vf unbiased(vi sums, vi offsets) { return to_float(add_int(sums, offsets)); }

// What a block's weights are multiplied with to be bytes, by the largest of them.
HG_INLINE vf to_bytes(vf largest) {
  return if_less(largest, set1(kSmallestInput), set1(0.0f), set1(255.0f) / largest);
}

// ---- few query rows: vectors over keys ----

// VL keys and Q of a head's `queries`, the item's from `first` on; asks for keys to come as one that does this
// part of a block's work.
template <int Q, int T>
HG_INLINE void score_group(Tile& t, const float* q, int queries, int first, int group, int whole,
                           Asked& asked) {
  constexpr int kTwos = Q <= (VL == 16 ? 6 : 3) ? 2 : 1;  // of vectors of keys, sums in registers
  const void* const* keys = t.keys + group * VL;
  const int lanes = t.lanes;
  const ptrdiff_t at = t.head * lanes;
  float* weights = t.weights + first * kKeyBlock;
  const auto add = [](vf a, vf b) { return add_sum<T>(a, b); };
  vf folded[4][Q];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j += kTwos) {
    Sum<T> s[2 * kTwos][Q];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kTwos; ++i)
#pragma GCC unroll 16
      for (int r = 0; r < Q; ++r) s[i][r] = no_sum<T>();
    for (ptrdiff_t d = 0; d < lanes; d += kLanes) {
      fetch_evenly<fetch_key>(t, asked, 2 * kTwos * VL * Q, whole);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kTwos; ++i) {
        const vf k = load_keys<T>(keys, 2 * j + i, at + d);
#pragma GCC unroll 16
        for (int r = 0; r < Q; ++r)
          s[i][r] = multiply_add<T>(k, repeat_lanes(q + d * queries + r * kLanes, i), s[i][r]);
      }
    }
#pragma GCC unroll 2
    for (int two = 0; two < kTwos; ++two)
#pragma GCC unroll 16
      for (int r = 0; r < Q; ++r)
        folded[j + two][r] = fold_halves(bits_of(s[2 * two][r]), bits_of(s[2 * two + 1][r]), add);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Q; ++r) {
    vf score = fold_last(fold_pairs(folded[0][r], folded[1][r], add),
                         fold_pairs(folded[2][r], folded[3][r], add), add);
    if constexpr (in_bytes(T)) score = unbiased(as_int(score), set1i(t.query_offsets[first + r]));
    if constexpr (T == kScaledBytes || in_bytes(T)) score = score * load(t.key_scales[t.head] + group * VL);
    if constexpr (in_bytes(T)) score = score * set1(t.query_scales[first + r]);
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
  const int first = t.head * Q, whole = t.lanes * t.queries;
  Asked asked = t.asked_keys;
  for (int g = group_first; g < group_last; ++g) {
    score_group<kFirst, T>(t, q, Q, first, g, whole, asked);
    if constexpr (kSecond > 0)
      score_group<kSecond, T>(t, q + kFirst * kLanes, Q, first + kFirst, g, whole, asked);
  }
  t.asked_keys = asked;
}

// Leaves weights, times the values' scales where there are any; rounded, in the lower half of where scores
// were, for pairs; as bytes in the lowest quarter, for bytes.
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
    const int head = i / t.item->query_count;
    const float* val_scales = t.val_scales[head];
    vf largest = set1(0.0f);
    for (int g = group_first; g < group_last; ++g) {
      const vf x = load(weights + g * VL) - maximum;
      vf p;
      if constexpr (in_pairs(T)) {
        uint16_t* rounded = (uint16_t*)weights + g * VL;
        store_rounded<T>(rounded, exp_to_round(x));
        p = load_bf16(rounded);
      } else if constexpr (in_bytes(T)) {
        p = exp_to_round(x);
        const vf weight = p * load(val_scales + g * VL);
        store(weights + g * VL, weight);
        largest = vmax(largest, weight);
      } else {
        p = exp_v(x);
        store(weights + g * VL, T == kScaledBytes ? p * load(val_scales + g * VL) : p);
      }
      vf& sum = sums[g % (kSums / VL)];
      sum = sum + p;
    }
    for (int n = 0; n < kSums / VL; ++n) store(t.part_sums + i * kSums + n * VL, sums[n]);
    if constexpr (in_bytes(T)) {
      const float most = max_lanes(largest);
      t.weight_scales[i] = most * (1.0f / 255.0f) + t.nothing[head];
      const vf inverse = to_bytes(set1(most));
      for (int g = group_first; g < group_last; ++g)
        store_i8((int8_t*)weights + g * VL, whole_bytes(load(weights + g * VL), inverse));
    }
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

template <int T, int K, int V>
HG_INLINE void add_sums(const vf (&first)[K][V], vf (&s)[K][V]) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[k][v] = add_sum<T>(first[k][v], s[k][v]);
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
  add_sums<T>(first, s);
}

// As score_lanes, of whole numbers, whose sums need no order.
template <int T, int K, int V>
HG_INLINE void score_bytes(const float* keys, const float* q, int padded, int lanes, vi (&s)[K][V]) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) s[k][v] = set1i(0);
  for (int lane = 0; lane < lanes; ++lane, q += padded) {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(q + v * VL);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const vf y = set1(keys[k * kByteKeyStride + lane]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) s[k][v] = multiply_add<T>(y, x[v], s[k][v]);
    }
  }
}

// Scores of K keys, times their scales where there are any, for V vectors of query rows.
template <int T, int K, int V>
void score_many_tile(Tile& t, int column, int key) {
  const int padded = t.padded_queries;
  const float cap = t.job->soft_cap;
  const bool scaled = t.job->k_scales;
  const float* q = t.q + column;
  Sum<T> s[K][V];
  if constexpr (in_bytes(T)) {
    score_bytes<T>(t.wide_keys + key * kByteKeyStride, q, padded, t.lanes, s);
  } else {
    const float* row[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) row[k] = (const float*)t.keys[key + k];
    score_lanes<T, 0, 1>(row, q, padded, t.lanes, s);
  }
  float* out = t.weights + key * padded + column;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vf score;
      if constexpr (in_bytes(T)) score = unbiased(s[k][v], load_int(t.query_offsets + column + v * VL));
      else score = s[k][v];
      if (scaled) score = score * set1(t.key_scales[0][key + k]);
      if constexpr (in_bytes(T)) score = score * load(t.query_scales + column + v * VL);
      store(out + k * padded + v * VL, cap_scores(score, cap));
    }
}

template <int T, int V>
void score_many_columns(Tile& t, int column, int first, int last) {
  const auto score = [&](auto tile, int k, int count) {
    fetch_evenly<fetch_key>(t, t.asked_keys, count * V, t.padded_queries / VL);
    tile(t, column * VL, k);
  };
  // As many keys as there are registers for both chains of each sum; sums of whole numbers have one.
  constexpr int kKeys = VL == 16 ? (V == 1 || in_bytes(T) ? 8 : 4) : 6 / V;
  int k = first;
  // Keys behind the last one can be read, and their scores are not.
  for (; k < last && k + kKeys <= kKeyBlock; k += kKeys) score(score_many_tile<T, kKeys, V>, k, kKeys);
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

// Weights of keys [first, last), whole numbers below 256 once they are multiplied: those of four keys in each lane
// of a row, in the first quarter of the rows. Keys that a quad has beyond these weigh nothing.
HG_INLINE void weights_to_bytes(float* weights, int padded, vf inverse, int first, int last) {
  for (int quad = first / 4; 4 * quad < last; ++quad) {
    const int key = 4 * quad;
    const float* from = weights + key * padded;
    vi bytes[4];
    for (int k = 0; k < 4; ++k)
      bytes[k] = key + k >= first && key + k < last ? whole_bytes(load(from + k * padded), inverse) : set1i(0);
    store(weights + quad * padded, as_float(side_by_side(bytes)));
  }
}

// Keys [first, last) of the block at `base`; `edge`: some query does not see all of them. Leaves what
// soften_few does, of pairs those of two keys in one row, of bytes those of four.
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
    } else if constexpr (in_bytes(T)) {
      vf largest = set1(0.0f);
      for (int k = first; k < last; ++k) {
        const vf p = exp_to_round(load(weights + k * padded) - top), weight = p * set1(t.val_scales[0][k]);
        store(weights + k * padded, weight);
        largest = vmax(largest, weight);
        add(k, p);
      }
      store(t.weight_scales + c, largest * set1(1.0f / 255.0f) + set1(t.nothing[0]));
      weights_to_bytes(weights, padded, to_bytes(largest), first, last);
    } else {
      for (int k = first; k < last; ++k) {
        const vf p = exp_v(load(weights + k * padded) - top);
        store(weights + k * padded, scaled ? p * set1(t.val_scales[0][k]) : p);
        add(k, p);
      }
    }
  }
}

}  // namespace
