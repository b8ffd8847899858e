// A portable vector of floats, one type per instruction set, all with the interface of Scalar below.
//
// Included by isa/*.cpp only, after FASTLVM_ISA has been defined: everything lives in a namespace of that name, so that
// the linker never merges code of two instruction sets. For the same reason nothing under csrc/ops or in these headers
// uses a template or an inline function of the standard library. On NaN: min(a, b) and max(a, b) return b.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/half.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

// Inner loops fall apart where the compiler stops inlining by its own rules.
#if defined(_MSC_VER) && !defined(__clang__)
#define FASTLVM_INLINE __forceinline
#else
#define FASTLVM_INLINE inline __attribute__((always_inline))
#endif

// An array of vectors stays in registers only if the loops over it are unrolled.
#if defined(__GNUC__)
#define FASTLVM_UNROLL _Pragma("GCC unroll 8")
#else
#define FASTLVM_UNROLL
#endif

namespace fastlvm::FASTLVM_ISA {

// Fetches a line into the second cache. The empty statement keeps GCC from dropping a function that only prefetches.
FASTLVM_INLINE void prefetch([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
#endif
}

// Fetches a line into the first cache.
FASTLVM_INLINE void prefetch_near([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 3);
#endif
}

// While one lives, results too small for a normal number become zero on this thread. A state that decays without new
// input would stop at some subnormal number for good, and every step with it takes the slow path of the processor. Not
// for vectors whose fma rounds twice: h + p h would stop where p h becomes zero.
template <class V>
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(read()) { write(V::width > 1 ? before_ | flush : before_); }
  ~FlushSubnormals() { write(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE2__) || defined(_M_X64)
  using Word = unsigned int;
  static constexpr Word flush = 0x8000;
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__) && defined(__GNUC__)
  using Word = uint64_t;
  static constexpr Word flush = 1 << 24;
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { asm volatile("msr fpcr, %0" ::"r"(word)); }
#else
  using Word = int;
  static constexpr Word flush = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif
  Word before_;
};

template <class T>
struct Scalar {
  using scalar = T;
  static constexpr int width = 1;
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
  static Scalar if_greater(Scalar a, Scalar b, Scalar yes, Scalar no) { return a.v > b.v ? yes : no; }
  static bool any_greater(Scalar a, Scalar b) { return a.v > b.v; }

  static Scalar load_f16(const uint16_t* p, int n) { return {n > 0 ? static_cast<T>(from_f16(*p)) : T(0)}; }
  static Scalar load_bf16(const uint16_t* p, int n) { return {n > 0 ? static_cast<T>(from_bf16(*p)) : T(0)}; }
  void store_f16(uint16_t* p, int n) const {
    if (n > 0) *p = to_f16(static_cast<float>(v));
  }
  void store_bf16(uint16_t* p, int n) const {
    if (n > 0) *p = to_bf16(static_cast<float>(v));
  }
  static void transpose(Scalar (&)[1]) {}  // rows of a square become its columns

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

  // 2^k for the nearest multiple k of 1 / exp2_steps to t, and f = t - k; t <= 127, and 2^k is 0 below 2^-126.
  static constexpr int states_at_once = 4;  // what the registers hold in the scans
  static constexpr int exp2_steps = 1;
  static Scalar exp2_head(Scalar t, Scalar& f) {
    const Scalar inside = max(set1(-127), t), k = round(inside);
    f = inside - k;
    return {power(k.v == k.v ? static_cast<int32_t>(k.v) : 0)};
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
  static T power(int32_t k) {
    const int32_t bits = (k + 127) << 23;
    float out;
    memcpy(&out, &bits, sizeof out);
    return T(out);
  }
};

// 2^(j / n) for j < n.
alignas(64) inline constexpr float exp2_table32[32] = {
    1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f, 1.1637249f,
    1.1892071f, 1.2152474f, 1.2418578f, 1.2690510f, 1.2968396f, 1.3252367f, 1.3542556f, 1.3839099f,
    1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f, 1.6104903f, 1.6457555f,
    1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f, 1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};
inline constexpr float exp2_table16[16] = {1.0f,       1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f,
                                           1.2968396f, 1.3542556f, 1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f,
                                           1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
inline constexpr float exp2_table8[8] = {1.0f,       1.0905077f, 1.1892071f, 1.2968396f,
                                         1.4142135f, 1.5422108f, 1.6817929f, 1.8340081f};

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
