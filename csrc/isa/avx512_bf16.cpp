// bfloat16 products with AVX512-BF16; nothing where the target lacks it.
#include "predictor/products.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#define FASTLVM_ISA avx512_bf16
#define FASTLVM_VECTOR_AVX512
#include "predictor/product.h"

namespace fastlvm {
namespace avx512_bf16::product {
namespace {

// Activations are rounded to bfloat16 too.
struct Dot {
  using Element = uint16_t;
  using Sum = __m512;
  using Weights = __m512bh;
  static constexpr int64_t group = 2;
  static constexpr bool scaled = false;
  static constexpr int rows = 6, vectors = 2;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Weights load(const uint8_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static __m512bh broadcast(const uint16_t* x) {
    int32_t two;
    memcpy(&two, x, sizeof two);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
  }
  static Sum add(Sum sum, Weights w, __m512bh x) { return _mm512_dpbf16_ps(sum, w, x); }
  static Vec finish(Sum sum, const Matrix&, int64_t, float) { return {sum}; }
};

constexpr Product bf16 = {"avx512_bf16", 2, narrow, multiply<Dot>};

}  // namespace
}  // namespace avx512_bf16::product

const Product* avx512_bf16_product() { return &avx512_bf16::product::bf16; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Product* avx512_bf16_product() { return nullptr; }
}  // namespace fastlvm
#endif
