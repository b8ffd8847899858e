// int8 products with AVX-512 VNNI; nothing where the target lacks it.
#include "predictor/products.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FASTLVM_ISA avx512_vnni
#define FASTLVM_VECTOR_AVX512
#include "predictor/product.h"

namespace fastlvm {
namespace avx512_vnni::product {
namespace {

// Activations carry 128 more than they are, since one side of the instruction is unsigned: a sum has 128 Σ w too much.
struct Dot {
  using Element = uint8_t;
  using Sum = __m512i;
  using Weights = __m512i;
  static constexpr int64_t group = 4;
  static constexpr bool scaled = true;
  static constexpr int rows = 6, vectors = 2;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Weights load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static __m512i broadcast(const uint8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }
  // GCC 12 copies every sum before and after the instruction when it is written as _mm512_dpbusd_epi32.
  static Sum add(Sum sum, Weights w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
  }
  static Vec finish(Sum sum, const Matrix& m, int64_t output, float scale) {
    const __m512i whole = _mm512_sub_epi32(sum, _mm512_loadu_si512(m.sums + output));
    return product::scaled({_mm512_cvtepi32_ps(whole)}, m, output, scale);
  }
  static void write(Vec steps, uint8_t* to) {
    const __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(steps.v), _mm512_set1_epi32(128));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(shifted));
  }
};

void prepare(const float* x, int64_t x_stride, int64_t rows, int64_t inputs, uint8_t* data, int64_t stride,
             float* scale) {
  quantise<uint8_t>(x, x_stride, rows, inputs, data, stride, scale, 128, &Dot::write);
}

constexpr Product int8 = {"avx512_vnni", 1, prepare, multiply<Dot>};

}  // namespace
}  // namespace avx512_vnni::product

const Product* avx512_vnni_int8() { return &avx512_vnni::product::int8; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Product* avx512_vnni_int8() { return nullptr; }
}  // namespace fastlvm
#endif
