// Vectors of floats for one instruction set, chosen by the flags this translation unit is built with.
//
// Every kernel is written once against these names and built once per instruction set. All is
// static or in an anonymous namespace, and nothing inline of the standard library is used: a merged
// symbol built with AVX-512 could otherwise end up in code that runs on a machine without it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define HG_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)

constexpr int VL = 16;  // floats in a vector
typedef __m512 vf;
typedef __m512i vi;

HG_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
HG_INLINE void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
HG_INLINE vf load_n(const float* p, int n) {
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
HG_INLINE void store_n(float* p, vf x, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
}
HG_INLINE vf set1(float x) { return _mm512_set1_ps(x); }
HG_INLINE vi set1i(int x) { return _mm512_set1_epi32(x); }
HG_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
HG_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
HG_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
HG_INLINE vf vabs(vf a) { return _mm512_abs_ps(a); }
HG_INLINE vf round_even(vf a) { return _mm512_roundscale_ps(a, 8); }
HG_INLINE vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
HG_INLINE vf as_float(vi a) { return _mm512_castsi512_ps(a); }
HG_INLINE vi as_int(vf a) { return _mm512_castps_si512(a); }
HG_INLINE vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
HG_INLINE vi shift_left(vi a, int n) { return _mm512_slli_epi32(a, n); }
HG_INLINE vi shift_right(vi a, int n) { return _mm512_srai_epi32(a, n); }
HG_INLINE vi add_int(vi a, vi b) { return _mm512_add_epi32(a, b); }
HG_INLINE vi and_int(vi a, vi b) { return _mm512_and_si512(a, b); }
HG_INLINE vi xor_int(vi a, vi b) { return _mm512_xor_si512(a, b); }
HG_INLINE vi load_int(const void* p) { return _mm512_loadu_si512(p); }
// Whether all lanes have a < b; what is not a number is not less.
HG_INLINE bool all_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) == 0; }
// a < b ? x : y, lane by lane.
HG_INLINE vf if_less(vf a, vf b, vf x, vf y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
// low <= at <= high ? x : y, lane by lane.
HG_INLINE vf if_within(vi at, vi low, vi high, vf x, vf y) {
  __mmask16 m = _mm512_cmp_epi32_mask(at, low, _MM_CMPINT_NLT);
  return _mm512_mask_blend_ps(_mm512_mask_cmp_epi32_mask(m, at, high, _MM_CMPINT_LE), y, x);
}
HG_INLINE vi iota() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
HG_INLINE vf load_bf16(const uint16_t* p) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
HG_INLINE vf load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
HG_INLINE void store_f16_unlimited(uint16_t* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// The lower half of each lane.
HG_INLINE void store_low_halves(uint16_t* p, vi x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x));
}
// Eight lanes of each of VL rows, in eight vectors, which the folds below take: vector 2j + h holds
// rows j + 8h and j + 8h + 4.
HG_INLINE vf load_lanes(const float* const* rows, int i, ptrdiff_t at) {
  const float* const* row = rows + i / 2 + i % 2 * 8;
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(row[0] + at)),
                            _mm256_loadu_ps(row[4] + at), 1);
}
HG_INLINE __m256i load_half_lanes(const uint16_t* const* rows, int i, ptrdiff_t at) {
  const uint16_t* const* row = rows + i / 2 + i % 2 * 8;
  const __m128i low = _mm_loadu_si128((const __m128i*)(row[0] + at));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                 _mm_loadu_si128((const __m128i*)(row[4] + at)), 1);
}
HG_INLINE vf load_lanes_bf16(const uint16_t* const* rows, int i, ptrdiff_t at) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half_lanes(rows, i, at)), 16));
}
HG_INLINE vf load_lanes_f16(const uint16_t* const* rows, int i, ptrdiff_t at) {
  return _mm512_cvtph_ps(load_half_lanes(rows, i, at));
}
// What is multiplied with vector i.
HG_INLINE vf repeat_lanes(const float* p, int) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(p)); }
// Lanes n and n + 4 of vectors 2j and 2j + 1 put together by `add`; then of two such n and n + 2; then of two
// such n and n + 1, which leaves one lane for each of the VL rows, in order.
template <class Add>
HG_INLINE vf fold_halves(vf a, vf b, Add add) {
  return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
template <class Add>
HG_INLINE vf fold_pairs(vf a, vf b, Add add) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
template <class Add>
HG_INLINE vf fold_last(vf a, vf b, Add add) {
  return add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// out[j] = {rows[0][j], rows[1][j], ...} for the four floats at each of VL rows.
HG_INLINE void load_columns4(const float* const* rows, ptrdiff_t at, vf out[4]) {
  vf t[4];
  for (int j = 0; j < 4; ++j) {
    vf v = _mm512_castps128_ps512(_mm_loadu_ps(rows[j] + at));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[4 + j] + at), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[8 + j] + at), 2);
    t[j] = _mm512_insertf32x4(v, _mm_loadu_ps(rows[12 + j] + at), 3);
  }
  __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(t[0], t[1]));
  __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(t[2], t[3]));
  __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(t[0], t[1]));
  __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(t[2], t[3]));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

#elif defined(__AVX2__)

constexpr int VL = 8;
typedef __m256 vf;
typedef __m256i vi;

HG_INLINE vi iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
HG_INLINE vi first_lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota()); }
HG_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
HG_INLINE void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
HG_INLINE vf load_n(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
// By parts: many processors take tens of cycles for a masked store.
HG_INLINE void store_n(float* p, vf x, int n) {
  if (n == VL) return store(p, x);
  __m128 part = _mm256_castps256_ps128(x);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(x, 1);
  }
  p += n & 4;
  if (n & 2) {
    _mm_storel_pi((__m64*)p, part);
    part = _mm_movehl_ps(part, part);
  }
  if (n & 1) _mm_store_ss(p + (n & 2), part);
}
HG_INLINE vf set1(float x) { return _mm256_set1_ps(x); }
HG_INLINE vi set1i(int x) { return _mm256_set1_epi32(x); }
HG_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
HG_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
HG_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
HG_INLINE vf vabs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
HG_INLINE vf round_even(vf a) { return _mm256_round_ps(a, 8); }
HG_INLINE vi to_int(vf a) { return _mm256_cvtps_epi32(a); }
HG_INLINE vf as_float(vi a) { return _mm256_castsi256_ps(a); }
HG_INLINE vi as_int(vf a) { return _mm256_castps_si256(a); }
HG_INLINE vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
HG_INLINE vi shift_left(vi a, int n) { return _mm256_slli_epi32(a, n); }
HG_INLINE vi shift_right(vi a, int n) { return _mm256_srai_epi32(a, n); }
HG_INLINE vi add_int(vi a, vi b) { return _mm256_add_epi32(a, b); }
HG_INLINE vi and_int(vi a, vi b) { return _mm256_and_si256(a, b); }
HG_INLINE vi xor_int(vi a, vi b) { return _mm256_xor_si256(a, b); }
HG_INLINE vi load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
HG_INLINE bool all_less(vf a, vf b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) == 0;
}
HG_INLINE vf if_less(vf a, vf b, vf x, vf y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
HG_INLINE vf if_within(vi at, vi low, vi high, vf x, vf y) {
  vi outside = _mm256_or_si256(_mm256_cmpgt_epi32(low, at), _mm256_cmpgt_epi32(at, high));
  return _mm256_blendv_ps(x, y, as_float(outside));
}
HG_INLINE vf load_bf16(const uint16_t* p) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
HG_INLINE vf load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
HG_INLINE void store_f16_unlimited(uint16_t* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
HG_INLINE void store_low_halves(uint16_t* p, vi x) {
  x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(low, high));
}
// Vector 2j + h holds row j + 4h.
HG_INLINE vf load_lanes(const float* const* rows, int i, ptrdiff_t at) {
  return load(rows[i / 2 + i % 2 * 4] + at);
}
HG_INLINE vf load_lanes_bf16(const uint16_t* const* rows, int i, ptrdiff_t at) {
  return load_bf16(rows[i / 2 + i % 2 * 4] + at);
}
HG_INLINE vf load_lanes_f16(const uint16_t* const* rows, int i, ptrdiff_t at) {
  return load_f16(rows[i / 2 + i % 2 * 4] + at);
}
HG_INLINE vf repeat_lanes(const float* p, int) { return load(p); }
template <class Add>
HG_INLINE vf fold_halves(vf a, vf b, Add add) {
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
template <class Add>
HG_INLINE vf fold_pairs(vf a, vf b, Add add) {
  const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  return add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
template <class Add>
HG_INLINE vf fold_last(vf a, vf b, Add add) {
  return add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

HG_INLINE void load_columns4(const float* const* rows, ptrdiff_t at, vf out[4]) {
  vf t[4];
  for (int j = 0; j < 4; ++j) {
    vf v = _mm256_castps128_ps256(_mm_loadu_ps(rows[j] + at));
    t[j] = _mm256_insertf128_ps(v, _mm_loadu_ps(rows[4 + j] + at), 1);
  }
  __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(t[0], t[1]));
  __m256d b = _mm256_castps_pd(_mm256_unpacklo_ps(t[2], t[3]));
  __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(t[0], t[1]));
  __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(t[2], t[3]));
  out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
  out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
  out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
}

#else  // any machine: the compiler's own vectors of four (SSE2 or NEON where there is one)

constexpr int VL = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

HG_INLINE vf load(const float* p) { vf x; memcpy(&x, p, 16); return x; }
HG_INLINE void store(float* p, vf x) { memcpy(p, &x, 16); }
HG_INLINE vf load_n(const float* p, int n) {
  vf x = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
}
HG_INLINE void store_n(float* p, vf x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
HG_INLINE vf set1(float x) { return vf{x, x, x, x}; }
HG_INLINE vi set1i(int x) { return vi{x, x, x, x}; }
HG_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FMA__)  // only in a test, where x86 is to give NEON's bits
  return (vf)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
  return a * b + c;
#endif
}
HG_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
HG_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
HG_INLINE vf as_float(vi a) { return (vf)a; }
HG_INLINE vi as_int(vf a) { return (vi)a; }
HG_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
// Only for |a| < 2^22: what is quantised is below 2^8.
HG_INLINE vf round_even(vf a) { vf magic = set1(12582912.0f); return (a + magic) - magic; }
HG_INLINE vi to_int(vf a) { return __builtin_convertvector(a, vi); }
HG_INLINE vf to_float(vi a) { return __builtin_convertvector(a, vf); }
HG_INLINE vi shift_left(vi a, int n) { return a << n; }
HG_INLINE vi shift_right(vi a, int n) { return a >> n; }
HG_INLINE vi add_int(vi a, vi b) { return a + b; }
HG_INLINE vi and_int(vi a, vi b) { return a & b; }
HG_INLINE vi xor_int(vi a, vi b) { return a ^ b; }
HG_INLINE vi load_int(const void* p) { vi x; memcpy(&x, p, 16); return x; }
HG_INLINE vf if_less(vf a, vf b, vf x, vf y) { return a < b ? x : y; }
HG_INLINE bool all_less(vf a, vf b) {
  const vi less = a < b;
  return less[0] & less[1] & less[2] & less[3];
}
HG_INLINE vf if_within(vi at, vi low, vi high, vf x, vf y) {
  vi inside = (at >= low) & (at <= high);
  return inside ? x : y;
}
HG_INLINE vi iota() { return vi{0, 1, 2, 3}; }
HG_INLINE vi load_u16(const uint16_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
HG_INLINE vf load_bf16(const uint16_t* p) { return (vf)(load_u16(p) << 16); }
HG_INLINE vf load_f16(const uint16_t* p) {
  vi h = load_u16(p);
  vi magnitude = h & 0x7fff;
  // The exponents' biases differ by 112; the product also makes subnormal halves right.
  vf x = (vf)(magnitude << 13) * set1(5.192296858534828e33f);
  vi special = (magnitude << 13) | 0x7f800000;
  x = magnitude >= 0x7c00 ? (vf)special : x;
  return (vf)((vi)x | ((h & 0x8000) << 16));
}
HG_INLINE void store_low_halves(uint16_t* p, vi x) {
  const uint16_t halves[VL] = {(uint16_t)x[0], (uint16_t)x[1], (uint16_t)x[2], (uint16_t)x[3]};
  memcpy(p, halves, sizeof halves);
}
// Of values that a half can hold, and NaN.
HG_INLINE void store_f16_unlimited(uint16_t* p, vf x) {
  const vi bits = (vi)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Below the least normal half, adding 0.5 lines up the bits and rounds them.
  const vi small = (vi)((vf)magnitude + set1(0.5f)) - 0x3f000000;
  vi half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  half = magnitude < 0x38800000 ? small : half;
  half = magnitude > 0x7f800000 ? vi{} + 0x7e00 : half;
  store_low_halves(p, sign | half);
}
// Vectors 2j and 2j + 1 are the halves of row j.
HG_INLINE vf load_lanes(const float* const* rows, int i, ptrdiff_t at) {
  return load(rows[i / 2] + at + i % 2 * 4);
}
HG_INLINE vf load_lanes_bf16(const uint16_t* const* rows, int i, ptrdiff_t at) {
  return load_bf16(rows[i / 2] + at + i % 2 * 4);
}
HG_INLINE vf load_lanes_f16(const uint16_t* const* rows, int i, ptrdiff_t at) {
  return load_f16(rows[i / 2] + at + i % 2 * 4);
}
HG_INLINE vf repeat_lanes(const float* p, int i) { return load(p + i % 2 * 4); }
template <class Add>
HG_INLINE vf fold_halves(vf a, vf b, Add add) { return add(a, b); }
template <class Add>
HG_INLINE vf fold_pairs(vf a, vf b, Add add) {
  return add(vf{a[0], a[1], b[0], b[1]}, vf{a[2], a[3], b[2], b[3]});
}
template <class Add>
HG_INLINE vf fold_last(vf a, vf b, Add add) {
  return add(vf{a[0], a[2], b[0], b[2]}, vf{a[1], a[3], b[1], b[3]});
}

HG_INLINE void load_columns4(const float* const* rows, ptrdiff_t at, vf out[4]) {
  vf a = load(rows[0] + at), b = load(rows[1] + at), c = load(rows[2] + at), d = load(rows[3] + at);
  for (int j = 0; j < 4; ++j) out[j] = vf{a[j], b[j], c[j], d[j]};
}

#endif

// sum += a * b where so many sums are kept that no register is left for copies of them, which compilers
// (GCC 12) make around the intrinsic.
HG_INLINE void add_product(vf& sum, vf a, vf b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = fma(a, b, sum);
#endif
}

// What fma gives a lane.
HG_INLINE float fma_lane(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// To the nearest whole number, ties to even.
HG_INLINE vi round_to_int(vf x) {
#if defined(__AVX2__)
  return to_int(x);  // rounds by itself
#else
  return to_int(round_even(x));
#endif
}

// Values to be quantised whose largest is below this are zeros: the reciprocal of their scale would
// not be finite.
constexpr float kSmallestInput = 1e-30f;

// Rounded to the nearest half, ties to even; what a half cannot hold becomes the largest that it can.
HG_INLINE void store_f16(uint16_t* p, vf x) {
  // The smaller of a NaN and a number is the second argument, on every instruction set.
  store_f16_unlimited(p, vmax(set1(-65504.0f), vmin(set1(65504.0f), x)));
}

// The first n < VL lanes of half-precision values without reading past them.
HG_INLINE vf load_bf16_n(const uint16_t* p, int n) {
  uint16_t part[VL] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load_bf16(part);
}
HG_INLINE vf load_f16_n(const uint16_t* p, int n) {
  uint16_t part[VL] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load_f16(part);
}

template <bool BF16>
void widen_row(const uint16_t* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + VL <= size; i += VL) store(to + i, BF16 ? load_bf16(from + i) : load_f16(from + i));
  if (i < size) {
    const int n = (int)(size - i);
    store_n(to + i, BF16 ? load_bf16_n(from + i, n) : load_f16_n(from + i, n), n);
  }
}

// Rounded to the nearest bfloat16, ties to even; NaN stays NaN.
HG_INLINE vf round_bf16(vf x) {
  const vi bits = as_int(x), upper = set1i((int)0xffff0000u);
  const vi odd = and_int(shift_right(bits, 16), set1i(1));
  const vi rounded = and_int(add_int(bits, add_int(odd, set1i(0x7fff))), upper);
  // The sum could overflow for a NaN; doubling makes it a quiet one, whose mark is in the upper bits.
  return if_within(and_int(bits, set1i(0x7fffffff)), set1i(0x7f800001), set1i(0x7fffffff),
                   as_float(and_int(as_int(x + x), upper)), as_float(rounded));
}
HG_INLINE void store_bf16(uint16_t* p, vf x) {
  store_low_halves(p, shift_right(as_int(round_bf16(x)), 16));
}

// Sums in the one order that all kernels use: halves folded onto each other.
#if defined(__AVX2__)
HG_INLINE float sum_lanes8(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#endif
HG_INLINE float sum_lanes(vf x) {
#if defined(__AVX512F__)
  return sum_lanes8(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
#elif defined(__AVX2__)
  return sum_lanes8(x);
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
HG_INLINE float max_lanes(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#elif defined(__AVX2__)
  __m128 most = _mm_max_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
  most = _mm_max_ps(_mm_movehl_ps(most, most), most);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(most), most));
#else
  float lane[VL];
  store(lane, x);
  for (int width = VL / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
  return lane[0];
#endif
}

// 1.5 * 2^23: numbers of its size are whole, and their lowest bits are what was added to it.
constexpr float kWholeNumbers = 12582912.0f;

// e^x = e^rest 2^n, with |rest| at most half of ln 2: `shifted` has the whole number n in its lowest bits.
struct Exponent {
  vf rest, shifted;
};
HG_INLINE Exponent split_exponent(vf x) {
  const vf shift = set1(kWholeNumbers);
  const vf shifted = fma(x, set1(1.44269504088896341f), shift);
  return {fma(shifted - shift, set1(-0.693147181f), x), shifted};
}
// p 2^n, where x is not so low that this may be subnormal: then exactly 0.
HG_INLINE vf times_power(vf p, vf shifted, vf x) {
  const vf scaled = as_float(add_int(as_int(p), shift_left(as_int(shifted), 23)));
  return if_less(x, set1(-87.3f), set1(0.0f), scaled);
}

constexpr float kMostExponent = 88.3f;

// e^x for x up to kMostExponent, to 1 unit in the last place near zero and 4 at the ends; exactly 0 below -87.3.
HG_INLINE vf exp_v(vf x) {
  const Exponent e = split_exponent(x);
  vf p = set1(1.3814541e-3f);
  p = fma(p, e.rest, set1(8.3687454e-3f));
  p = fma(p, e.rest, set1(4.1668389e-2f));
  p = fma(p, e.rest, set1(1.6666521e-1f));
  p = fma(p, e.rest, set1(4.9999994e-1f));
  p = fma(p, e.rest, set1(1.0f));
  p = fma(p, e.rest, set1(1.0f));
  return times_power(p, e.shifted, x);
}

// tanh by e^2|x|, and by its odd series near zero, where the quotient would cancel.
HG_INLINE vf tanh_v(vf x) {
  const vf one = set1(1.0f);
  vf a = vabs(x);
  vf big = one - set1(2.0f) / (exp_v(vmin(a + a, set1(kMostExponent))) + one);
  vf s = x * x;
  vf t = set1(-5.70498872745e-3f);
  t = fma(t, s, set1(2.06390887954e-2f));
  t = fma(t, s, set1(-5.37397155531e-2f));
  t = fma(t, s, set1(1.33314422036e-1f));
  t = fma(t, s, set1(-3.33332819422e-1f));
  vf small = fma(t * s, x, x);
  vf signed_big = if_less(x, set1(0.0f), set1(0.0f) - big, big);
  return if_less(a, set1(0.625f), small, signed_big);
}

// The error function to about 2e-7 absolute (a rational function of 1 / (1 + p|x|) times e^-x^2).
HG_INLINE vf erf_v(vf x) {
  const vf one = set1(1.0f);
  vf a = vabs(x);
  vf t = one / fma(set1(0.3275911f), a, one);
  vf p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  vf y = one - p * t * exp_v(set1(0.0f) - a * a);
  return if_less(x, set1(0.0f), set1(0.0f) - y, y);
}

HG_INLINE vf sigmoid_v(vf x) {
  return set1(1.0f) / (set1(1.0f) + exp_v(vmin(set1(0.0f) - x, set1(kMostExponent))));
}

}  // namespace
