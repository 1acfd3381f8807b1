// Two numbers of bfloat16 in the place of a float, and sums of products of such pairs.
#pragma once

#include "vector.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI2__)
#define BFLOAT16_PRODUCTS 1
#else
#define BFLOAT16_PRODUCTS 0
#endif

#if BFLOAT16_PRODUCTS

namespace {

// sums + a * b of the pairs in a and b, which take the place of a float each.
INLINE Vector plus_products(Vector sums, Vector a, Vector b) {
  return __builtin_bit_cast(Vector, _mm512_dpbf16_ps(__builtin_bit_cast(__m512, sums), __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b)));
}
INLINE HalfVector plus_products(HalfVector sums, HalfVector a, HalfVector b) {
  return __builtin_bit_cast(HalfVector, _mm256_dpbf16_ps(__builtin_bit_cast(__m256, sums), __builtin_bit_cast(__m256bh, a), __builtin_bit_cast(__m256bh, b)));
}

template <class V = Vector>
INLINE V broadcast_pair(const REAL* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  if constexpr (sizeof(V) == sizeof(Vector)) return __builtin_bit_cast(V, _mm512_set1_epi32(bits));
  else return __builtin_bit_cast(V, _mm256_set1_epi32(bits));
}

// Rounded to nearest, the numbers of `first` and then those of `second`.
INLINE Vector rounded(Vector first, Vector second) {
  return __builtin_bit_cast(Vector, _mm512_cvtne2ps_pbh(__builtin_bit_cast(__m512, second), __builtin_bit_cast(__m512, first)));
}
INLINE HalfVector rounded(HalfVector first, HalfVector second) {
  return __builtin_bit_cast(HalfVector, _mm256_cvtne2ps_pbh(__builtin_bit_cast(__m256, second), __builtin_bit_cast(__m256, first)));
}

// Pairs of a number of `first` and one of `second`, rounded to nearest.
INLINE Vector paired(Vector first, Vector second) {
  const __m512i upwards = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_or_si512(upwards, _mm512_slli_epi32(_mm512_add_epi32(upwards, _mm512_set1_epi32(16)), 16));
  return __builtin_bit_cast(Vector, _mm512_permutexvar_epi16(places, __builtin_bit_cast(__m512i, rounded(first, second))));
}
INLINE HalfVector paired(HalfVector first, HalfVector second) {
  const __m256i upwards = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i places = _mm256_or_si256(upwards, _mm256_slli_epi32(_mm256_add_epi32(upwards, _mm256_set1_epi32(8)), 16));
  return __builtin_bit_cast(HalfVector, _mm256_permutexvar_epi16(places, __builtin_bit_cast(__m256i, rounded(first, second))));
}

}  // namespace

#endif
