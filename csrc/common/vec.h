// A portable vector of floats, one type per instruction set, all with the interface of Scalar below.
//
// Included by isa/*.cpp only, after FASTLVM_ISA has been defined: everything lives in a namespace of that name, so that
// the linker never merges code of two instruction sets. For the same reason nothing under csrc/ops or in these headers
// uses a template or an inline function of the standard library. On NaN: min(a, b) and max(a, b) return b.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fastlvm::FASTLVM_ISA {

template <class T>
struct Scalar {
  using scalar = T;
  static constexpr int width = 1;
  static constexpr bool converts_f16 = false;
  T v;

  static Scalar set1(T x) { return {x}; }
  static Scalar zero() { return {T(0)}; }
  static Scalar load(const T* p) { return {*p}; }
  static Scalar load_first(const T* p, int n) { return {n > 0 ? *p : T(0)}; }  // lanes from n on are zero
  void store(T* p) const { *p = v; }
  void store_first(T* p, int n) const {  // lanes from n on are left alone
    if (n > 0) *p = v;
  }
  static Scalar first(Scalar a, int n) { return {n > 0 ? a.v : T(0)}; }  // lanes from n on become zero
  static T sum(Scalar a) { return a.v; }

  friend Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
  friend Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
  friend Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
  friend Scalar operator/(Scalar a, Scalar b) { return {a.v / b.v}; }
  static Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.v * b.v + c.v}; }
  static Scalar min(Scalar a, Scalar b) { return {a.v < b.v ? a.v : b.v}; }
  static Scalar max(Scalar a, Scalar b) { return {a.v > b.v ? a.v : b.v}; }
  static Scalar abs(Scalar a) { return {a.v < T(0) ? -a.v : a.v}; }
  static Scalar if_zero(Scalar test, Scalar yes, Scalar no) { return test.v == T(0) ? yes : no; }
  static Scalar if_greater(Scalar a, Scalar b, Scalar yes, Scalar no) { return a.v > b.v ? yes : no; }

  // To the nearest integer; |a| < 2^21.
  static Scalar round(Scalar a) {
    constexpr T magic = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);
    const T shifted = a.v + magic;
    return {shifted - magic};
  }
  // a * 2^k for integral k with |k| <= 200, rounded once. In two steps, because 2^k alone may not be a number.
  static Scalar scale(Scalar a, Scalar k) {
    const int32_t whole = k.v == k.v ? static_cast<int32_t>(k.v) : 0;
    const int32_t half = whole >> 1;
    return {a.v * power(half) * power(whole - half)};
  }

  // `width` float64 sums.
  struct Wide {
    double v;
    static Wide load(const double* p) { return {*p}; }
    void store(double* p) const { *p = v; }
    static Wide from(Scalar a) { return {static_cast<double>(a.v)}; }
    friend Wide operator+(Wide a, Wide b) { return {a.v + b.v}; }
    static Wide fma(Wide a, Wide b, Wide c) { return {a.v * b.v + c.v}; }
  };

 private:
  static float power(int32_t k) {
    const int32_t bits = (k + 127) << 23;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
  }
};

}  // namespace fastlvm::FASTLVM_ISA

#if defined(FASTLVM_VECTOR_AVX512)
#include "common/vec_avx512.h"
#elif defined(FASTLVM_VECTOR_AVX2)
#include "common/vec_avx2.h"
#elif defined(FASTLVM_VECTOR_NEON)
#include "common/vec_neon.h"
#else
namespace fastlvm::FASTLVM_ISA {
using Vec = Scalar<float>;
}
#endif
