// int8 products with the dot product of Armv8.2; nothing where the target lacks it.
#include "predictor/products.h"

#if defined(__ARM_FEATURE_DOTPROD)
#define FASTLVM_ISA neon_dotprod
#define FASTLVM_VECTOR_NEON
#include "predictor/product.h"

namespace fastlvm {
namespace neon_dotprod::product {
namespace {

struct Dot {
  using Element = int8_t;
  using Sum = int32x4_t;
  using Weights = int8x16_t;
  static constexpr int64_t group = 4;
  static constexpr bool scaled = true;
  static constexpr int rows = 5, vectors = 4;
  static Sum zero() { return vdupq_n_s32(0); }
  static Weights load(const uint8_t* p) { return vld1q_s8(reinterpret_cast<const int8_t*>(p)); }
  static int8x16_t broadcast(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Sum add(Sum sum, Weights w, int8x16_t x) { return vdotq_s32(sum, w, x); }
  static Vec finish(Sum sum, const Matrix& m, int64_t output, float scale) {
    return product::scaled({vcvtq_f32_s32(sum)}, m, output, scale);
  }
  static void write(Vec steps, int8_t* to) {
    const int16x4_t narrow = vmovn_s32(vcvtnq_s32_f32(steps.v));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
    memcpy(to, &bytes, 4);
  }
};

void prepare(const float* x, int64_t x_stride, int64_t rows, int64_t inputs, uint8_t* data, int64_t stride,
             float* scale) {
  quantise<int8_t>(x, x_stride, rows, inputs, data, stride, scale, 0, &Dot::write);
}

constexpr Product int8 = {"neon_dotprod", 1, prepare, multiply<Dot>};

}  // namespace
}  // namespace neon_dotprod::product

const Product* neon_dotprod_int8() { return &neon_dotprod::product::int8; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Product* neon_dotprod_int8() { return nullptr; }
}  // namespace fastlvm
#endif
