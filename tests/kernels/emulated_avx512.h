// AVX-512 for a machine with AVX2: what SIMDe (https://github.com/simd-everywhere/simde) has of it, and
// here what its version 0.7.4 lacks or does with other bits. Included before all else of a kernel's source.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define SIMDE_X86_AVX512F_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512BW_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512DQ_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512VL_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(HG_EMULATE_VNNI)
#define __AVX512VNNI__ 1
#endif

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

template <class To, class From>
EMULATED To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <class T, int N>
struct Lanes {
  T at[N];
};

// ------------------------------------------------------------------ half by half

template <class Half>
struct Halves {
  Half low, high;
};

#define EMULATED_BY_HALVES(name, Result, ResultHalf, Argument, ArgumentHalf, half_op)  \
  EMULATED Result name(Argument x) {                                                   \
    const auto a = bits<Halves<ArgumentHalf>>(x);                                      \
    return bits<Result>(Halves<ResultHalf>{half_op(a.low), half_op(a.high)});          \
  }
EMULATED_BY_HALVES(cvtepi32_ps, __m512, __m256, __m512i, __m256i, _mm256_cvtepi32_ps)
EMULATED_BY_HALVES(cvtps_epi32, __m512i, __m256i, __m512, __m256, _mm256_cvtps_epi32)
EMULATED_BY_HALVES(cvtph_ps, __m512, __m256, __m256i, __m128i, _mm256_cvtph_ps)
EMULATED_BY_HALVES(cvtepu16_epi32, __m512i, __m256i, __m256i, __m128i, _mm256_cvtepu16_epi32)

EMULATED __m256 round_half(__m256 x) { return _mm256_round_ps(x, 8); }
EMULATED_BY_HALVES(roundscale_8, __m512, __m256, __m512, __m256, round_half)
EMULATED __m128i half_cvtps_ph(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
EMULATED_BY_HALVES(cvtps_ph_nearest, __m256i, __m128i, __m512, __m256, half_cvtps_ph)

#define EMULATED_BY_HALVES_OF_TWO(name, half_op)                                                    \
  EMULATED __m512 name(__m512 x, __m512 y) {                                                        \
    const auto a = bits<Halves<__m256>>(x), b = bits<Halves<__m256>>(y);                            \
    return bits<__m512>(Halves<__m256>{half_op(a.low, b.low), half_op(a.high, b.high)});            \
  }
EMULATED_BY_HALVES_OF_TWO(max_ps, _mm256_max_ps)
EMULATED_BY_HALVES_OF_TWO(min_ps, _mm256_min_ps)

EMULATED __m512i madd_epi16(__m512i x, __m512i y) {
  const auto a = bits<Halves<__m256i>>(x), b = bits<Halves<__m256i>>(y);
  return bits<__m512i>(
      Halves<__m256i>{_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)});
}
EMULATED __m512 fmadd_ps(__m512 x, __m512 y, __m512 z) {
  const auto a = bits<Halves<__m256>>(x), b = bits<Halves<__m256>>(y), c = bits<Halves<__m256>>(z);
  return bits<__m512>(
      Halves<__m256>{_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)});
}

// ------------------------------------------------------------------ lane by lane

EMULATED __m512 maskz_loadu_ps(uint16_t mask, const float* p) {
  Lanes<float, 16> x;
  for (int i = 0; i < 16; ++i) x.at[i] = mask >> i & 1 ? p[i] : 0;
  return bits<__m512>(x);
}
template <class Lanes>
EMULATED void store_some(float* p, unsigned mask, Lanes x) {
  for (unsigned i = 0; i < sizeof(x) / sizeof(float); ++i)
    if (mask >> i & 1) p[i] = x.at[i];
}
EMULATED void mask_storeu_ps(float* p, uint16_t mask, __m512 x) {
  store_some(p, mask, bits<Lanes<float, 16>>(x));
}
EMULATED void mask_storeu_ps_256(float* p, uint8_t mask, __m256 x) {
  store_some(p, mask, bits<Lanes<float, 8>>(x));
}

template <class To, class From, class ToLane, class FromLane, int N = 16>
EMULATED To each_lane(From x) {
  const auto from = bits<Lanes<FromLane, N>>(x);
  Lanes<ToLane, N> to;
  for (int i = 0; i < N; ++i) to.at[i] = (ToLane)from.at[i];
  return bits<To>(to);
}
EMULATED __m512i cvtepi8_epi32(__m128i x) { return each_lane<__m512i, __m128i, int32_t, int8_t>(x); }
EMULATED __m512i cvtepu8_epi16(__m256i x) { return each_lane<__m512i, __m256i, uint16_t, uint8_t, 32>(x); }
EMULATED __m256i cvtepi32_epi16(__m512i x) { return each_lane<__m256i, __m512i, uint16_t, int32_t>(x); }
EMULATED __m128i cvtepi32_epi8(__m512i x) { return each_lane<__m128i, __m512i, uint8_t, int32_t>(x); }

EMULATED __m512i srai_epi32(__m512i x, int n) {
  auto a = bits<Lanes<int32_t, 16>>(x);
  for (int i = 0; i < 16; ++i) a.at[i] >>= n;
  return bits<__m512i>(a);
}
EMULATED uint16_t mask_cmp_epi32_mask(uint16_t mask, __m512i x, __m512i y, int how) {
  const auto a = bits<Lanes<int32_t, 16>>(x), b = bits<Lanes<int32_t, 16>>(y);
  unsigned found = 0;
  for (int i = 0; i < 16; ++i) {
    const bool low = how == _MM_CMPINT_NLT ? a.at[i] >= b.at[i] : a.at[i] <= b.at[i];
    found |= unsigned(low) << i;
  }
  return found & mask;
}
EMULATED float reduce_max_ps(__m512 x) {
  auto a = bits<Lanes<float, 16>>(x);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) a.at[i] = a.at[i] > a.at[i + n] ? a.at[i] : a.at[i + n];
  return a.at[0];
}
EMULATED __m512 shuffle_f32x4(__m512 x, __m512 y, int which) {
  const auto a = bits<Lanes<__m128, 4>>(x), b = bits<Lanes<__m128, 4>>(y);
  return bits<__m512>(Lanes<__m128, 4>{a.at[which & 3], a.at[which >> 2 & 3], b.at[which >> 4 & 3],
                                       b.at[which >> 6 & 3]});
}
EMULATED __m256 extractf32x8_ps(__m512 x, int which) {
  const auto a = bits<Halves<__m256>>(x);
  return which ? a.high : a.low;
}

// ------------------------------------------------------------------ what the kernels have in assembly

// vpdpbusd: products of four unsigned bytes with four signed ones.
EMULATED __m512i dpbusd(__m512i sum, __m512i x, __m512i y) {
  auto s = bits<Lanes<int32_t, 16>>(sum);
  const auto a = bits<Lanes<uint8_t, 64>>(x);
  const auto b = bits<Lanes<int8_t, 64>>(y);
  for (int i = 0; i < 64; ++i) s.at[i / 4] += a.at[i] * b.at[i];
  return bits<__m512i>(s);
}
// vpdpwssd: products of two signed numbers of 16 bits with two.
EMULATED __m512i dpwssd(__m512i sum, __m512i x, __m512i y) { return _mm512_add_epi32(sum, madd_epi16(x, y)); }
// vdpbf16ps: subnormal numbers, which it takes for zeros, apart (bf16_pairs.h).
EMULATED __m512 dpbf16(__m512 sum, __m512i x, __m512i y) {
  auto s = bits<Lanes<float, 16>>(sum);
  const auto a = bits<Lanes<uint32_t, 16>>(x), b = bits<Lanes<uint32_t, 16>>(y);
  for (int i = 0; i < 16; ++i) {
    for (const int shift : {0, 16}) {
      const float upper = bits<float>(a.at[i] << shift & 0xffff0000u);
      s.at[i] = __builtin_fmaf(upper, bits<float>(b.at[i] << shift & 0xffff0000u), s.at[i]);
    }
  }
  return bits<__m512>(s);
}
// vcvtneps2bf16: to the nearest, ties to even.
EMULATED __m256i cvtneps_bf16(__m512 x) {
  const auto a = bits<Lanes<uint32_t, 16>>(x);
  Lanes<uint16_t, 16> rounded;
  for (int i = 0; i < 16; ++i) {
    const uint32_t number = a.at[i];
    const bool is_nan = (number & 0x7fffffffu) > 0x7f800000u;
    rounded.at[i] = is_nan ? number >> 16 | 64 : (number + 0x7fff + (number >> 16 & 1)) >> 16;
  }
  return bits<__m256i>(rounded);
}

}  // namespace emulated

#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_cmp_epi32_mask
#undef _mm512_mask_cmp_epi32_mask
#undef _mm512_cvtps_ph
#undef _mm512_roundscale_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_extractf32x8_ps
#undef _mm512_srai_epi32
#undef _mm512_fmadd_ps
#undef _mm512_madd_epi16
#undef _mm512_max_ps
#undef _mm512_min_ps
#define _mm512_maskz_loadu_ps(mask, p) emulated::maskz_loadu_ps(mask, (const float*)(p))
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm256_mask_storeu_ps emulated::mask_storeu_ps_256
#define _mm512_mask_cmp_epi32_mask emulated::mask_cmp_epi32_mask
#define _mm512_cmp_epi32_mask(x, y, how) emulated::mask_cmp_epi32_mask(0xffff, x, y, how)
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(x, how) emulated::cvtps_ph_nearest(x)
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_roundscale_ps(x, how) emulated::roundscale_8(x)
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
