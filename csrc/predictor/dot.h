// The Dots of product.h that every instruction set has: float32, bfloat16 weights widened, int8 by 16-bit products.
#pragma once

#include "predictor/product.h"

namespace fastlvm::FASTLVM_ISA::product {

#if defined(FASTLVM_VECTOR_AVX512)
constexpr int tile_rows = 6, tile_vectors = 2;
#elif defined(FASTLVM_VECTOR_AVX2)
constexpr int tile_rows = 5, tile_vectors = 2;
#elif defined(FASTLVM_VECTOR_NEON)
constexpr int tile_rows = 5, tile_vectors = 4;
#else
constexpr int tile_rows = 1, tile_vectors = 16;
#endif

struct DotF32 {
  using Element = float;
  using Sum = Vec;
  using Weights = Vec;
  static constexpr int64_t group = 1;
  static constexpr bool scaled = false;
  static constexpr int rows = tile_rows, vectors = tile_vectors;
  static Sum zero() { return Vec::zero(); }
  static Weights load(const uint8_t* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
  static Vec broadcast(const float* x) { return Vec::set1(*x); }
  static Sum add(Sum sum, Weights w, Vec x) { return Vec::fma(w, x, sum); }
  static Vec finish(Sum sum, const Matrix&, int64_t, float) { return sum; }
};

// Lanes hold two bfloat16 numbers; the activations stay float32.
struct DotBf16 {
  using Element = float;
  using Sum = Vec;
  struct Pair {
    Vec first, second;
  };
  using Weights = Pair;
  static constexpr int64_t group = 2;
  static constexpr bool scaled = false;
  static constexpr int rows = tile_rows, vectors = tile_vectors > 2 && Vec::width > 1 ? 2 : tile_vectors;
  static Sum zero() { return Vec::zero(); }
  static Pair load(const uint8_t* p) {
#if defined(FASTLVM_VECTOR_AVX512)
    const __m512i lanes = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(lanes, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
#elif defined(FASTLVM_VECTOR_AVX2)
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(lanes, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
#elif defined(FASTLVM_VECTOR_NEON)
    const uint32x4_t lanes = vreinterpretq_u32_u8(vld1q_u8(p));
    return {{vreinterpretq_f32_u32(vshlq_n_u32(lanes, 16))},
            {vreinterpretq_f32_u32(vandq_u32(lanes, vdupq_n_u32(0xffff0000u)))}};
#else
    uint16_t both[2];
    memcpy(both, p, sizeof both);
    return {{from_bf16(both[0])}, {from_bf16(both[1])}};
#endif
  }
  static Pair broadcast(const float* x) { return {Vec::set1(x[0]), Vec::set1(x[1])}; }
  static Sum add(Sum sum, Pair w, Pair x) { return Vec::fma(w.second, x.second, Vec::fma(w.first, x.first, sum)); }
  static Vec finish(Sum sum, const Matrix&, int64_t, float) { return sum; }
};

// Both sides of a product as 16-bit numbers, so that the sum of a pair cannot overflow as in vpmaddubsw. int16_t
// activations, but for NEON and scalar, which multiply int8.
struct DotInt8 {
  static constexpr int64_t group = 4;
  static constexpr bool scaled = true;
#if defined(FASTLVM_VECTOR_AVX512)
  using Element = int16_t;
  struct Sum {
    __m512i low, high;  // two lanes each of outputs 0 … 7 and 8 … 15
  };
  using Weights = Sum;
  using Input = __m512i;
  static constexpr int rows = 6, vectors = 2;
  static Sum zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static Weights load(const uint8_t* p) {
    const auto half = [p](int i) {
      return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + i));
    };
    return {half(0), half(1)};
  }
  static Input broadcast(const int16_t* x) {
    int64_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi64(four);
  }
  static Sum add(Sum sum, Weights w, Input x) {
    return {_mm512_add_epi32(sum.low, _mm512_madd_epi16(w.low, x)),
            _mm512_add_epi32(sum.high, _mm512_madd_epi16(w.high, x))};
  }
  static Vec whole(Sum sum) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                  odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_permutex2var_epi32(sum.low, even, sum.high),
                                                _mm512_permutex2var_epi32(sum.low, odd, sum.high)))};
  }
  static void write(Vec steps, int16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(steps.v)));
  }
#elif defined(FASTLVM_VECTOR_AVX2)
  using Element = int16_t;
  struct Sum {
    __m256i low, high;  // two lanes each of outputs 0 … 3 and 4 … 7
  };
  using Weights = Sum;
  using Input = __m256i;
  static constexpr int rows = 5, vectors = 1;
  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Weights load(const uint8_t* p) {
    const auto half = [p](int i) {
      return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
    };
    return {half(0), half(1)};
  }
  static Input broadcast(const int16_t* x) {
    int64_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  static Sum add(Sum sum, Weights w, Input x) {
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(w.low, x)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(w.high, x))};
  }
  static Vec whole(Sum sum) {
    const __m256i pairs = _mm256_hadd_epi32(sum.low, sum.high);  // outputs 0 1 4 5 2 3 6 7
    return {_mm256_cvtepi32_ps(_mm256_permute4x64_epi64(pairs, 0xd8))};
  }
  static void write(Vec steps, int16_t* to) {
    const __m256i whole = _mm256_cvtps_epi32(steps.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
#elif defined(FASTLVM_VECTOR_NEON)
  using Element = int8_t;
  struct Sum {
    int32x4_t low, high;  // two lanes each of outputs 0, 1 and 2, 3
  };
  using Weights = int8x16_t;
  using Input = int8x8_t;
  static constexpr int rows = 5, vectors = 2;
  static Sum zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static Weights load(const uint8_t* p) { return vld1q_s8(reinterpret_cast<const int8_t*>(p)); }
  static Input broadcast(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vreinterpret_s8_s32(vdup_n_s32(four));
  }
  static Sum add(Sum sum, Weights w, Input x) {  // |product| <= 127², a pair of them is taken in 32 bits
    return {vpadalq_s16(sum.low, vmull_s8(vget_low_s8(w), x)), vpadalq_s16(sum.high, vmull_s8(vget_high_s8(w), x))};
  }
  static Vec whole(Sum sum) { return {vcvtq_f32_s32(vpaddq_s32(sum.low, sum.high))}; }
  static void write(Vec steps, int8_t* to) {
    const int16x4_t narrow = vmovn_s32(vcvtnq_s32_f32(steps.v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
    memcpy(to, &bytes, 4);
  }
#else
  using Element = int8_t;
  using Sum = int32_t;
  struct Weights {
    int8_t w[4];
  };
  using Input = Weights;
  static constexpr int rows = tile_rows, vectors = tile_vectors;
  static Sum zero() { return 0; }
  static Weights load(const uint8_t* p) {
    Weights w;
    memcpy(&w, p, sizeof w);
    return w;
  }
  static Input broadcast(const int8_t* x) { return load(reinterpret_cast<const uint8_t*>(x)); }
  static Sum add(Sum sum, Weights w, Input x) {
    return sum + w.w[0] * x.w[0] + w.w[1] * x.w[1] + w.w[2] * x.w[2] + w.w[3] * x.w[3];
  }
  static Vec whole(Sum sum) { return {static_cast<float>(sum)}; }
  static void write(Vec steps, int8_t* to) { *to = static_cast<int8_t>(steps.v == steps.v ? steps.v : 0.0f); }
#endif
  static Vec finish(Sum sum, const Matrix& m, int64_t output, float scale) {
    return product::scaled(whole(sum), m, output, scale);
  }
};

inline void prepare_int8(const float* x, int64_t x_stride, int64_t rows, int64_t inputs, uint8_t* data, int64_t stride,
                         float* scale) {
  quantise<DotInt8::Element>(x, x_stride, rows, inputs, data, stride, scale, 0, &DotInt8::write);
}

inline constexpr Product fp32 = {FASTLVM_TEXT(FASTLVM_ISA), 4, nullptr, multiply<DotF32>};
inline constexpr Product bf16 = {FASTLVM_TEXT(FASTLVM_ISA), 4, nullptr, multiply<DotBf16>};
inline constexpr Product int8 = {FASTLVM_TEXT(FASTLVM_ISA), sizeof(DotInt8::Element), prepare_int8, multiply<DotInt8>};

}  // namespace fastlvm::FASTLVM_ISA::product
