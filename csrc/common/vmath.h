// exp, exp2, softplus, sigmoid, SiLU and their slopes, on the vectors of vec.h.
//
// Worst error against float64 in units in the last place, over every float: exp 1.01, exp2 1.97, softplus 2.80, sigmoid
// 2.40, SiLU 3.19 (where exp(-|x|) is subnormal, |x| > 87, SiLU's error is below 1e-43 instead). Measured by
// tests/csrc/vmath_accuracy.cpp for scalar, avx2 and avx512 on x86-64.
#pragma once

#include "common/vec.h"

namespace fastlvm::FASTLVM_ISA {

template <class V>
FASTLVM_INLINE V exp(V x) {
  // Beyond these bounds the result is 0 or inf in any case; a NaN passes.
  x = V::min(V::set1(89.0f), V::max(V::set1(-104.0f), x));
  const V k = V::round(x * V::set1(1.44269504f));
  V r = V::fma(k, V::set1(-0.693359375f), x);  // ln2 in two parts, the first with few bits
  r = V::fma(k, V::set1(2.12194440e-4f), r);
  V q = V::set1(1.9875691500e-4f);
  q = V::fma(q, r, V::set1(1.3981999507e-3f));
  q = V::fma(q, r, V::set1(8.3334519073e-3f));
  q = V::fma(q, r, V::set1(4.1665795894e-2f));
  q = V::fma(q, r, V::set1(1.6666665459e-1f));
  q = V::fma(q, r, V::set1(5.0000001201e-1f));
  const V p = V::fma(r * r, q, r);  // exp(r) - 1, |r| <= ln2 / 2
  return V::scale(V::set1(1.0f) + p, k);
}

// log(1 + exp(x)), and x itself above 20.
template <class V>
FASTLVM_INLINE V softplus(V x) {
  const V e = exp(V::zero() - V::abs(x));  // (0, 1]
  const V s = e / (V::set1(2.0f) + e);     // log1p(e) = 2 atanh(s)
  const V w = s * s;
  V q = V::set1(0.12150469422340393f);
  q = V::fma(q, w, V::set1(0.10713828355073929f));
  q = V::fma(q, w, V::set1(0.14308442175388336f));
  q = V::fma(q, w, V::set1(0.19999438524246216f));
  q = V::fma(q, w, V::set1(0.3333333730697632f));
  const V log1p = V::fma(w * q, s + s, s + s);
  return V::if_greater(x, V::set1(20.0f), x, V::max(V::zero(), x) + log1p);
}

template <class V>
FASTLVM_INLINE V sigmoid(V x) {
  const V one = V::set1(1.0f), e = exp(V::zero() - V::abs(x));
  return V::if_greater(V::zero(), x, e, one) / (one + e);
}

// d softplus(x) / dx
template <class V>
FASTLVM_INLINE V softplus_slope(V x) {
  return V::if_greater(x, V::set1(20), V::set1(1), sigmoid(x));
}

constexpr double log2e = 1.4426950408889634;

// 2^t = head (1 + p), t <= 127; 0 below 2^-126. The polynomials are minimax for p / 2^f over the range of f.
template <class V>
struct Exp2Parts {
  V head, p;
};

template <class V>
FASTLVM_INLINE Exp2Parts<V> exp2_parts(V t) {
  V f;
  const V head = V::exp2_head(t, f);
  const auto c = [](double x) { return V::set1(static_cast<typename V::scalar>(x)); };
  if constexpr (V::exp2_steps == 16) {
    const V q = V::fma(f, V::fma(f, c(0.05550213649376296), c(0.24023428802519484)), c(0.6931471826666429));
    return {head, f * q};
  } else if constexpr (V::exp2_steps == 8) {
    V q = V::fma(f, c(0.009617653399518436), c(0.05551059515059555));
    q = V::fma(f, V::fma(f, q, c(0.24022651027637174)), c(0.6931471742815498));
    return {head, f * q};
  } else {
    V q = V::fma(f, c(0.00015353361959569156), c(0.0013398875016719103));
    q = V::fma(f, V::fma(f, q, c(0.00961843691766262)), c(0.055503323674201965));
    q = V::fma(f, V::fma(f, q, c(0.24022647738456726)), c(0.6931471824645996));
    return {head, f * q};
  }
}

template <class V>
FASTLVM_INLINE V exp2(V t) {
  if constexpr (requires { V::exp2(t); }) return V::exp2(t);
  const auto [head, p] = exp2_parts(t);
  return V::fma(head, p, head);
}

// 2^t h. The error of the factor is relative to its distance from one, so that it does not pile up over long memories.
template <class V>
FASTLVM_INLINE V times(V h, Exp2Parts<V> factor) {
  const V s = factor.head * h;
  return V::fma(s, factor.p, s);
}

template <class V>
FASTLVM_INLINE V times_exp2(V h, V t) {
  return times(h, exp2_parts(t));
}

// Whether times_exp2 may take all of t.
template <class V>
FASTLVM_INLINE bool are_normal_powers(V t) {
  return !V::any_greater(V::abs(t), V::set1(126));
}

// The same for any t: a zero stays one, and only a product out of range is infinite.
template <class V>
FASTLVM_INLINE V times_any_exp2(V h, V t) {
  t = V::min(V::set1(252), V::max(V::set1(-252), t));
  const V k = V::round(t);
  const V p = exp2(t - k);
  return V::scale(h, k) * p;
}

// float64, by the C library.

using Double = Scalar<double>;

inline Double exp(Double x) { return {::exp(x.v)}; }
inline Double exp2(Double t) { return {::exp2(t.v)}; }
inline Exp2Parts<Double> exp2_parts(Double t) { return {exp2(t), {0}}; }
inline Double times(Double h, Exp2Parts<Double> factor) { return factor.head * h; }
inline Double times_any_exp2(Double h, Double t) { return {h.v == 0 ? 0 : h.v * ::exp2(t.v)}; }
inline Double softplus(Double x) { return {x.v > 20 ? x.v : ::log1p(::exp(x.v))}; }
inline Double sigmoid(Double x) { return {1 / (1 + ::exp(-x.v))}; }

template <class V>
FASTLVM_INLINE V silu(V x) {
  return x * sigmoid(x);
}

// d silu(x) / dx
template <class V>
FASTLVM_INLINE V silu_slope(V x) {
  const V s = sigmoid(x);
  const V one = V::set1(1);
  return s * V::fma(x, one - s, one);
}

}  // namespace fastlvm::FASTLVM_ISA
