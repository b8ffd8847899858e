// bfloat16 products with the matrix instruction of Armv8.6; nothing where the target lacks it.
#include "predictor/products.h"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FASTLVM_ISA neon_bf16
#define FASTLVM_VECTOR_NEON
#include "predictor/mmla.h"

namespace fastlvm {
namespace neon_bf16::product {
namespace {

// Activations are rounded to bfloat16 too.
struct Dot {
  using Sum = float32x4_t;
  static constexpr bool scaled = false;
  static constexpr int rows = 6, vectors = 2;
  static Sum zero() { return vdupq_n_f32(0); }
  static Sum add(Sum sum, uint8x16_t rows, uint8x16_t outputs) {
    return vbfmmlaq_f32(sum, vreinterpretq_bf16_u8(rows), vreinterpretq_bf16_u8(outputs));
  }
  static float32x4_t floats(Sum sum) { return sum; }
};

constexpr Product bf16 = {"neon_bf16", 2, narrow, multiply_pairs<Dot>};

}  // namespace
}  // namespace neon_bf16::product

const Product* neon_bf16_product() { return &neon_bf16::product::bf16; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Product* neon_bf16_product() { return nullptr; }
}  // namespace fastlvm
#endif
