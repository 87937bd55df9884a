// Activations of registers of sums. Those of ATen's vectors, calls of a library, cost 4 ms for 1,028 x 2,048 outputs (8 with
// tanh), a third to half of the layer at 1:4v4; these, which the compiler sees through, 1.2 to 2.4 (Zen 3, one thread).
#pragma once

#include <limits>

#include "half.h"

namespace sparsedm {

enum Activation : int64_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kGeglu = 4 };

namespace detail {

typedef int32_t Ints __attribute__((vector_size(kBytes)));
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// NaN stays NaN: it is neither above nor below.
inline Vec clamp(Vec x, float least, float most) {
  const Vec low = broadcast(least), high = broadcast(most);
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <int degree>
inline Vec polynomial(Vec x, const float (&coefficients)[degree + 1]) {
  Vec sum = broadcast(coefficients[degree]);
  SPARSEDM_UNROLL
  for (int i = degree - 1; i >= 0; --i) sum = sum * x + broadcast(coefficients[i]);
  return sum;
}

// To 3.3e-7: x P(x^2) / Q(x^2), a minimax fit of relative error 2e-8 up to 3.92, from where on erf is 1 in float32.
inline Vec erf(Vec x) {
  static constexpr float p[] = {1.1283791065216064f,    0.1903970092535019f,    0.05274729058146477f,
                                0.003765163943171501f, 0.0002848648582585156f, 2.050058810709743e-06f};
  static constexpr float q[] = {1.0f,                   0.5020676851272583f,    0.11410503834486008f,
                                0.014968312345445156f, 0.0011624115286394954f, 3.809048575931229e-05f};
  const Vec end = broadcast(3.92f), one = broadcast(1.0f), near = clamp(x, -3.92f, 3.92f), z = near * near;
  const Vec inside = clamp(near * polynomial<5>(z, p) / polynomial<5>(z, q), -1.0f, 1.0f);
  return x >= end ? one : x <= -end ? -one : inside;  // exactly, so that gelu vanishes far below zero
}

// To 2 units in the last place; its argument is clamped to where the result is a normal number.
inline Vec exp(Vec x) {
  // x = n log(2) + r: the product with log(2) in two parts, the first of which is exact. Taylor's terms for |r| < 0.35.
  static constexpr float terms[] = {1.0f,          1.0f,          1.0f / 2.0f,   1.0f / 6.0f,
                                    1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f, 1.0f / 5040.0f};
  const Vec rounding = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
  x = clamp(x, -87.0f, 88.0f);
  const Vec n = x * broadcast(1.44269504f) + rounding - rounding;
  const Vec r = x - n * broadcast(0.693359375f) + n * broadcast(2.12194440e-4f);
  const Vec power = (Vec)(((Bits)__builtin_convertvector(n, Ints) + 127) << 23);
  return polynomial<7>(r, terms) * power;
}

}  // namespace detail

inline Vec gelu(Vec x) {
  return broadcast(0.5f) * x * (broadcast(1.0f) + detail::erf(x * broadcast(0.70710678f)));
}

namespace detail {

// x / (1 + exp(-u)). As exp ends at 1.7e38, x must not grow beyond it below zero, where the quotient vanishes.
inline Vec gated(Vec x, Vec u) { return clamp(x, -88.0f, kInfinity) / (broadcast(1.0f) + exp(-u)); }

}  // namespace detail

// 1 + tanh(u) is 2 / (1 + exp(-2 u)).
inline Vec gelu_tanh(Vec x) {
  return detail::gated(x, x * (broadcast(2 * 0.79788456f) + broadcast(2 * 0.035677408f) * x * x));
}

inline Vec silu(Vec x) { return detail::gated(x, x); }

template <class Function>
inline void map(float* data, int64_t size, Function f) {
  for (int64_t i = 0; i < size; i += kWidth) store(data + i, f(load(data + i)));
}

// In place, in whole registers: `size` is a multiple of kWidth.
inline void activate(float* data, int64_t size, Activation activation) {
  switch (activation) {
    case kNone:
    case kGeglu: return;  // of two channels: see apply_gates
    case kGelu: return map(data, size, gelu);
    case kGeluTanh: return map(data, size, gelu_tanh);
    case kSilu: return map(data, size, silu);
  }
}

// values *= gelu(gates), in whole registers.
inline void apply_gates(float* values, const float* gates, int64_t size) {
  for (int64_t i = 0; i < size; i += kWidth) store(values + i, load(values + i) * gelu(load(gates + i)));
}

}  // namespace sparsedm
