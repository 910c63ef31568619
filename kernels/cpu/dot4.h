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
// `inputs` from where they are stored, as `add` takes them, which adds the products to each lane of a group's
// sum; and what the sum of a whole group is, in 32 bits.

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
  HG_INLINE vi whole(vi sum) { return sum; }
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
  HG_INLINE vi whole(vi sum) { return sum; }
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
  HG_INLINE vi whole(vi sum) { return sum; }
};

// Sums of a group's products with weights below 16 stay below 2^15.
static_assert(kInt4Group / 2 * 15 * 127 < 1 << 15, "sums of a half group in 16 bits");

template <>
struct Dot4<kInt4> {
  typedef vi Weights;
  typedef vi Inputs;
  HG_INLINE vi weights(vi bytes) { return bytes; }
  HG_INLINE vi inputs(const int8_t* x) { return broadcast4(x); }
  HG_INLINE vi add(vi sum, vi w, vi x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
  HG_INLINE vi whole(vi sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
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
  HG_INLINE vi whole(vi sum) { return sum; }
};

#endif

}  // namespace
