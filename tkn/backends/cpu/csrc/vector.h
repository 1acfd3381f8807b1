// Vectors of the CPU, as wide as the compiler's flags allow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef REAL
#define REAL float
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 24;  // of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 12;  // of 16
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 24;  // of 32
#else
#error "the ROI engine knows AVX-512, AVX2 with FMA, and NEON"
#endif

constexpr int WIDTH = VECTOR_BYTES / sizeof(REAL);
typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
// For half as many images; some CPUs compute two of them in the time of one Vector.
typedef REAL HalfVector __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(REAL)), may_alias));

#define INLINE inline __attribute__((always_inline))

namespace {

// x - 0 is x for every x, so this is a broadcast and nothing else.
template <class V = Vector>
INLINE V broadcast(REAL x) {
  return x - V{};
}
// Templates forget how a type is aligned.
template <class V>
struct InMemory {
  typedef V Type __attribute__((aligned(sizeof(REAL)), may_alias));
};
template <class V = Vector>
INLINE V load(const REAL* x) {
  return *reinterpret_cast<const typename InMemory<V>::Type*>(x);
}
template <class V>
INLINE void store(REAL* x, V v) {
  *reinterpret_cast<typename InMemory<V>::Type*>(x) = v;
}
// The first `count` numbers, at most a vector; what follows them in memory is not touched.
INLINE void store_first(REAL* x, Vector v, int count) {
  if (count == WIDTH) return store(x, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(REAL) == 4) _mm512_mask_storeu_ps(x, (1u << count) - 1, __builtin_bit_cast(__m512, v));
  else _mm512_mask_storeu_pd(x, (1u << count) - 1, __builtin_bit_cast(__m512d, v));
#else
  std::memcpy(x, &v, count * sizeof(REAL));
#endif
}
// The first `count` numbers, and zeros.
INLINE Vector first_of(Vector v, int count) {
  for (int i = 0; i < WIDTH; i++) v[i] = i < count ? v[i] : 0;
  return v;
}
// The numbers of even or odd places of two vectors.
template <int FIRST>
INLINE Vector every_second(Vector a, Vector b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(REAL) == 4) {
    const __m512i places = _mm512_add_epi32(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), _mm512_set1_epi32(FIRST));
    return __builtin_bit_cast(Vector, _mm512_permutex2var_ps(__builtin_bit_cast(__m512, a), places, __builtin_bit_cast(__m512, b)));
  }
#endif
  Vector v = {};
  for (int i = 0; i < WIDTH; i++) v[i] = i < WIDTH / 2 ? a[(2 * i + FIRST) % WIDTH] : b[(2 * i + FIRST) % WIDTH];
  return v;
}
// `count` numbers from x on, `step` apart; more than that of a line may be touched, as far as a whole vector would reach.
INLINE Vector load_strided(const REAL* x, int64_t step, int count) {
  if (step == 1) return load(x);
  if (step == 2) return every_second<0>(load(x), load(x + WIDTH));
  Vector v = {};
  for (int i = 0; i < count; i++) v[i] = x[i * step];
  return v;
}
// The first `count` numbers, to places `step` apart.
INLINE void store_strided(REAL* x, int64_t step, Vector v, int count) {
  if (step == 1) return store_first(x, v, count);
  for (int i = 0; i < count; i++) x[i * step] = v[i];
}
// As many places as a vector has numbers.
typedef int32_t Places __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
INLINE Places load_places(const int32_t* x) { return *reinterpret_cast<const Places*>(x); }
// The numbers at `Places`. Of a template, only the branch of this REAL is compiled.
template <class P>
INLINE Vector gathered(const REAL* x, P at) {
#if defined(__AVX512F__)
  if constexpr (sizeof(REAL) == 4) return __builtin_bit_cast(Vector, _mm512_i32gather_ps(__builtin_bit_cast(__m512i, at), x, sizeof(REAL)));
#endif
  Vector v = {};
  for (int i = 0; i < WIDTH; i++) v[i] = x[at[i]];
  return v;
}
// Keeps what was loaded in a register: compilers would load it anew for each use, which costs twice across cache lines.
INLINE void keep(Vector& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}
// As torch's: NaN stays NaN.
template <class V>
INLINE V relu(V v) {
  return v < V{} ? V{} : v;
}
template <class V>
INLINE V maximum(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}
template <int BYTES>
struct Halves {
  typedef REAL Half __attribute__((vector_size(BYTES / 2), aligned(sizeof(REAL)), may_alias));
  Half low, high;
};
template <int BYTES, class V>
INLINE REAL sum_of(V v) {
  if constexpr (BYTES == sizeof(REAL)) {
    return v[0];
  } else if constexpr (BYTES <= 16) {
    REAL total = v[0];
    for (unsigned i = 1; i < BYTES / sizeof(REAL); i++) total += v[i];
    return total;
  } else {
    const auto halves = __builtin_bit_cast(Halves<BYTES>, v);
    return sum_of<BYTES / 2>(halves.low + halves.high);
  }
}
INLINE REAL sum(HalfVector v) { return sum_of<VECTOR_BYTES / 2>(v); }
INLINE REAL sum(Vector v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(REAL) == 4) {  // what follows would go through memory
    const __m512 whole = __builtin_bit_cast(__m512, v);
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(whole), high);
    __m128 few = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    few = _mm_add_ps(few, _mm_movehl_ps(few, few));
    return _mm_cvtss_f32(_mm_add_ss(few, _mm_movehdup_ps(few)));
  }
#endif
  return sum_of<VECTOR_BYTES>(v);
}

}  // namespace
