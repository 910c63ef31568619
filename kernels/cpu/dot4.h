// Bytes: products of four with four, summed into each 32-bit lane, and how they become floats.
//
// A sum of products is exact on every path. It is one instruction where there is VNNI or NEON's dot
// product; elsewhere bytes are widened to 16 bits first, because AVX2's product of bytes would saturate,
// but for int4's. Weights are bytes below 256, of int4 below 16, inputs from -127 to 127.
#pragma once

#include "quantised.h"
#include "simd.h"

namespace {

using namespace headgate;

// ------------------------------------------------------------------ bytes

#if defined(__AVX512F__)

HG_INLINE vi low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
HG_INLINE vi high_nibbles(vi a) {
  return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15));
}

#else

#if defined(__AVX2__)

HG_INLINE vi low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
HG_INLINE vi high_nibbles(vi a) {
  return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15));
}
// As numbers of 16 bits.
HG_INLINE vi even_bytes(vi a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
HG_INLINE vi odd_bytes(vi a) { return _mm256_srli_epi16(a, 8); }

#else

HG_INLINE vi low_nibbles(vi a) { return a & 0x0f0f0f0f; }
HG_INLINE vi high_nibbles(vi a) { return (a >> 4) & 0x0f0f0f0f; }

#endif

#endif

// ------------------------------------------------------------------ products

// NEON multiplies signed bytes with signed ones: there int8 weights lose the 128 they are stored with.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool kSignedWeights = true;
#else
constexpr bool kSignedWeights = false;
#endif

// What inputs of int8 weights are stored as: words where bytes would have to be widened in each product.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int32_t kInt8Format = kInt8Words;
#else
constexpr int32_t kInt8Format = kInt8Inputs;
#endif

HG_INLINE vi broadcast4(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return set1i(four);
}

// Products with weights of kind Q, four for each lane's column, or two where inputs are words: `weights`, and
// `inputs` from where they are stored, as `add` takes them, which adds the products to each lane's sum.

#if defined(__AVX512VNNI__)

template <int Q>
struct Dot4 {
  typedef vi Weights;
  typedef vi Inputs;
  HG_INLINE vi weights(vi bytes) { return bytes; }
  HG_INLINE vi inputs(const int8_t* x) { return broadcast4(x); }
  // In assembly, because compilers (GCC 12) copy the sums around the intrinsic and store them at each
  // step, which takes twice the time.
  HG_INLINE vi add(vi sum, vi w, vi x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

#elif defined(__ARM_FEATURE_DOTPROD)

template <int Q>
struct Dot4 {
  typedef vi Weights;
  typedef vi Inputs;
  HG_INLINE vi weights(vi bytes) { return bytes; }
  HG_INLINE vi inputs(const int8_t* x) { return broadcast4(x); }
  HG_INLINE vi add(vi sum, vi w, vi x) {
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
  }
};

#elif defined(__AVX2__)

template <int Q>
struct Dot4 {
  typedef vi Weights;
  typedef vi Inputs;
  HG_INLINE vi weights(vi words) { return words; }
  HG_INLINE vi inputs(const int8_t* x) { return broadcast4(x); }
  // In assembly for the reasons given at add_product.
  HG_INLINE vi add(vi sum, vi w, vi x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(w, x)));
    return sum;
  }
};

// Sums of a group's products with weights below 16 stay below 2^15 in each half of a lane.
static_assert(kInt4Group / 2 * 15 * 127 < 1 << 15, "sums of a half group in 16 bits");

template <>
struct Dot4<kInt4> {
  typedef vi Weights;
  typedef vi Inputs;
  HG_INLINE vi weights(vi bytes) { return bytes; }
  HG_INLINE vi inputs(const int8_t* x) { return broadcast4(x); }
  HG_INLINE vi add(vi sum, vi w, vi x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
};

#else

typedef int16_t vs __attribute__((vector_size(16)));
typedef uint16_t vu __attribute__((vector_size(16)));

// The bytes 0 and 2, and the bytes 1 and 3, of each lane as 16-bit numbers.
struct Words {
  vs even, odd;
};

template <int Q>
struct Dot4 {
  typedef Words Weights;
  typedef Words Inputs;
  HG_INLINE Words weights(vi bytes) { return {(vs)((vu)bytes & 255), (vs)((vu)bytes >> 8)}; }
  HG_INLINE Words inputs(const int8_t* x) {
    const vi all = broadcast4(x);
    return {(vs)((vu)all << 8) >> 8, (vs)all >> 8};
  }
  // Each product fits 16 bits: 255 * 127 < 2^15.
  HG_INLINE vi add(vi sum, Words w, Words x) {
    const vi even = (vi)(w.even * x.even), odd = (vi)(w.odd * x.odd);
    return sum + ((even << 16 >> 16) + (even >> 16)) + ((odd << 16 >> 16) + (odd >> 16));
  }
};

#endif

// ------------------------------------------------------------------ int4's groups

// The two groups of a block of int4 meet inputs of one scale, so they become one whole number of the column's
// unit: a group's sum of products times its scale, less eight times its minimum times the sum of its inputs.
// All that stays below 2^26, and is rounded once, when it becomes a float.
static_assert(kInputGroup == 2 * kInt4Group, "two groups in a block");
constexpr int kMostInt4Sum = kInt4Group * 15 * 127, kMostNumber = kUnitsOfMinimum * kInt4Group * 127;
static_assert(2 * kMostUnits * (kMostInt4Sum + kMostNumber) < 1 << 26, "32 bits hold it");
static_assert(kMostNumber < 1 << 15, "16 bits hold a number of the inputs");

// Scales and minima of one vector of columns are loaded from where they are stored. `scale_first` takes the sum of
// the first group's products, and the inputs' numbers (quantised.h) side by side; `scale_second` adds the other's sum.
// kCentred: a sum begins at its group's own number, and so is that of weights less 8, which 16 bits hold.

#if defined(__AVX512VNNI__)

constexpr bool kCentred = true;
static_assert(kUnitsOfMinimum == 8 && kInt4Group * 8 * 127 < 1 << 15, "a sum in 16 bits");

struct Int4Scales {
  vi first, second;  // in the lower halves of the lanes; in the upper ones zeros
  vi minima;         // of both, less their scales for the 8 that weights lack
};

HG_INLINE vi load_pairs(const char* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
}
HG_INLINE Int4Scales load_int4_scales(const char* scales, const char* minima) {
  const vi both = load_pairs(scales);
  return {and_int(both, set1i(0xffff)), _mm512_srli_epi32(both, 16), _mm512_sub_epi16(load_pairs(minima), both)};
}
// In assembly, with which products of eight rows take 1 % less than with the intrinsic.
HG_INLINE vi add_pairs(vi sum, vi x, vi y) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
}
HG_INLINE vi scale_first(const Int4Scales& by, vi sum, vi numbers) {
  return add_pairs(_mm512_madd_epi16(by.minima, numbers), sum, by.first);
}
HG_INLINE vi scale_second(const Int4Scales& by, vi sum, vi before) { return add_pairs(before, sum, by.second); }

#elif defined(__AVX2__)

constexpr bool kCentred = false;

struct Int4Scales {
  vi first, second;  // twice: for both halves of a sum
  vi minima;         // of both
};

HG_INLINE Int4Scales load_int4_scales(const char* scales, const char* minima) {
  const vi stored = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)scales));
  const vi first = _mm256_setr_epi8(0, -1, 0, -1, 2, -1, 2, -1, 4, -1, 4, -1, 6, -1, 6, -1,
                                    8, -1, 8, -1, 10, -1, 10, -1, 12, -1, 12, -1, 14, -1, 14, -1);
  const vi second = _mm256_setr_epi8(1, -1, 1, -1, 3, -1, 3, -1, 5, -1, 5, -1, 7, -1, 7, -1,
                                     9, -1, 9, -1, 11, -1, 11, -1, 13, -1, 13, -1, 15, -1, 15, -1);
  return {_mm256_shuffle_epi8(stored, first), _mm256_shuffle_epi8(stored, second),
          _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)minima))};
}
HG_INLINE vi scale_first(const Int4Scales& by, vi sum, vi numbers) {
  return add_int(_mm256_madd_epi16(sum, by.first), _mm256_madd_epi16(by.minima, numbers));
}
HG_INLINE vi scale_second(const Int4Scales& by, vi sum, vi before) {
  return add_int(before, _mm256_madd_epi16(sum, by.second));
}

#else

constexpr bool kCentred = false;

struct Int4Scales {
  vi first, second;
  vi first_minima, second_minima;
};

HG_INLINE vi load_pairs(const char* p) {
  uint16_t pairs[VL];
  memcpy(pairs, p, sizeof pairs);
  return load_u16(pairs);
}
HG_INLINE Int4Scales load_int4_scales(const char* scales, const char* minima) {
  const vi both = load_pairs(scales), both_minima = load_pairs(minima);
  return {both & 255, both >> 8, both_minima & 255, both_minima >> 8};
}
HG_INLINE vi scale_first(const Int4Scales& by, vi sum, vi numbers) {
  return sum * by.first + (numbers << 16 >> 16) * by.first_minima + (numbers >> 16) * by.second_minima;
}
HG_INLINE vi scale_second(const Int4Scales& by, vi sum, vi before) { return before + sum * by.second; }

#endif

}  // namespace
