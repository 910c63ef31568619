// A vector of signed bytes, widened as it is read.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__)

HG_INLINE vf load_i8(const int8_t* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

#elif defined(__AVX2__)

HG_INLINE vf load_i8(const int8_t* p) {
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

#else

HG_INLINE vf load_i8(const int8_t* p) {
  typedef int8_t bytes __attribute__((vector_size(4)));
  bytes x;
  memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vf);
}

#endif

}  // namespace
