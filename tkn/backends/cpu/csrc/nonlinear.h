// The functions between layers, of vectors. Exponentials of float are polynomials, right within a few units of the last
// place; those of double are the library's.
#pragma once

#include <cmath>

#include "vector.h"

extern "C" {

// tkn/plan/nonlinearity.py has the same numbers.
enum Nonlinearity {
  IDENTITY = 0,
  RELU = 1,
  RELU6 = 2,
  LEAKY_RELU = 3,   // slope * x below 0
  ELU = 4,          // slope * (exp(x) - 1) below 0
  SIGMOID = 5,
  SILU = 6,
  HARDSIGMOID = 7,
  HARDSWISH = 8,
  TANH = 9,
  GELU = 10,
  GELU_TANH = 11,   // by tanh instead of erf
};

struct Function {
  int32_t kind;
  double slope;
};

}  // extern "C"

namespace {

// `V`: Vector. Of a template, only the branch of this REAL is compiled.
template <class V>
INLINE V exponential(V x) {
  if constexpr (sizeof(REAL) == 4) {
    typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
    const Vector lowest = broadcast(REAL(-87.3)), highest = broadcast(REAL(88.7));
    const Vector bounded = x < lowest ? lowest : x > highest ? highest : x;
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const Vector magic = broadcast(REAL(12582912)), whole = bounded * REAL(1.44269504) + magic - magic;
    const Vector rest = bounded - whole * REAL(0.693145752) - whole * REAL(1.42860677e-6);
    Vector y = broadcast(REAL(1.0 / 5040));
    for (REAL factor : {REAL(1.0 / 720), REAL(1.0 / 120), REAL(1.0 / 24), REAL(1.0 / 6), REAL(0.5), REAL(1), REAL(1)}) y = y * rest + factor;
    const Integers exponent = (__builtin_convertvector(x != x ? V{} : whole, Integers) + 127) << 23;
    y = y * __builtin_bit_cast(V, exponent);
    return x < lowest ? Vector{} : x > highest ? broadcast(REAL(INFINITY)) : y;
  } else {
    for (int i = 0; i < WIDTH; i++) x[i] = std::exp(x[i]);
    return x;
  }
}

INLINE Vector sigmoid(Vector x) { return REAL(1) / (REAL(1) + exponential(-x)); }

// exp(x) - 1, also where both are nearly the same.
INLINE Vector exponential_less_one(Vector x) {
  Vector near = broadcast(REAL(1));
  for (int k = 12; k > 1; k--) near = near * x * REAL(1.0 / k) + REAL(1);
  const Vector size = x < Vector{} ? -x : x;
  return size < REAL(0.5) ? near * x : exponential(x) - REAL(1);
}

INLINE Vector hyperbolic_tangent(Vector x) {
  const Vector size = x < Vector{} ? -x : x, low = exponential_less_one(size * REAL(-2));
  const Vector y = -low / (low + REAL(2));
  return x < Vector{} ? -y : x != x ? x : y;
}

// The share of a normal distribution below x: Abramowitz and Stegun, 7.1.26; of double, the library's.
INLINE Vector normal_share(Vector x) {
  if constexpr (sizeof(REAL) == 4) {
    const Vector z = (x < Vector{} ? -x : x) * REAL(0.70710678), t = REAL(1) / (REAL(1) + z * REAL(0.3275911));
    Vector y = broadcast(REAL(1.061405429));
    for (REAL factor : {REAL(-1.453152027), REAL(1.421413741), REAL(-0.284496736), REAL(0.254829592)}) y = y * t + factor;
    y = y * t * exponential(-z * z) * REAL(0.5);
    return x < Vector{} ? y : REAL(1) - y;
  } else {
    for (int i = 0; i < WIDTH; i++) x[i] = REAL(0.5) * std::erfc(-x[i] * REAL(0.70710678118654752));
    return x;
  }
}

INLINE Vector clamped(Vector x, REAL high) {
  const Vector y = relu(x), top = broadcast(high);
  return y > top ? top : y;
}

// Values of a whole run of numbers: the function is looked at once.
template <class F>
INLINE void in_place(REAL* x, int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) store(x + i, f(load(x + i)));
  if (i < count) {
    Vector rest = {};
    std::memcpy(&rest, x + i, (count - i) * sizeof(REAL));
    rest = f(rest);
    std::memcpy(x + i, &rest, (count - i) * sizeof(REAL));
  }
}

__attribute__((noinline)) void apply(const Function& function, REAL* x, int64_t count) {
  const REAL slope = (REAL)function.slope;
  switch (function.kind) {
    case RELU: return in_place(x, count, [](Vector v) { return relu(v); });
    case RELU6: return in_place(x, count, [](Vector v) { return clamped(v, 6); });
    case LEAKY_RELU: return in_place(x, count, [=](Vector v) { return v > Vector{} ? v : v * slope; });
    case ELU: return in_place(x, count, [=](Vector v) { return v > Vector{} ? v : exponential_less_one(v) * slope; });
    case SIGMOID: return in_place(x, count, [](Vector v) { return sigmoid(v); });
    case SILU: return in_place(x, count, [](Vector v) { return v * sigmoid(v); });
    case HARDSIGMOID: return in_place(x, count, [](Vector v) { return clamped(v + REAL(3), 6) * REAL(1.0 / 6); });
    case HARDSWISH: return in_place(x, count, [](Vector v) { return v * (clamped(v + REAL(3), 6) * REAL(1.0 / 6)); });
    case TANH: return in_place(x, count, [](Vector v) { return hyperbolic_tangent(v); });
    case GELU: return in_place(x, count, [](Vector v) { return v * normal_share(v); });
    case GELU_TANH:
      return in_place(x, count, [](Vector v) { return v * sigmoid((v + v * v * v * REAL(0.044715)) * REAL(1.5957691216)); });
    default: return;
  }
}

// Of one vector that is about to be combined with others.
template <class V>
INLINE V value_of(const Function& function, V x) {
  if (function.kind == IDENTITY) return x;
  if (function.kind == RELU) return relu(x);
  REAL numbers[sizeof(V) / sizeof(REAL)];
  store(numbers, x);
  apply(function, numbers, sizeof(V) / sizeof(REAL));
  return load<V>(numbers);
}

}  // namespace
