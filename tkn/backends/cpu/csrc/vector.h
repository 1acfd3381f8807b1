// Vectors of the CPU, as wide as the compiler's flags allow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

#define INLINE inline __attribute__((always_inline))

namespace {

// x - 0 is x for every x, so this is a broadcast and nothing else.
INLINE Vector broadcast(REAL x) { return x - Vector{}; }
INLINE Vector load(const REAL* x) { return *reinterpret_cast<const Vector*>(x); }
INLINE void store(REAL* x, Vector v) { *reinterpret_cast<Vector*>(x) = v; }
// As torch's: NaN stays NaN.
INLINE Vector relu(Vector v) { return v < Vector{} ? Vector{} : v; }
INLINE Vector maximum(Vector a, Vector b) { return (b > a) | (b != b) ? b : a; }
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
INLINE REAL sum(Vector v) { return sum_of<VECTOR_BYTES>(v); }

}  // namespace
