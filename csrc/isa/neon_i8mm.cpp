// int8 products with the matrix instruction of Armv8.6; nothing where the target lacks it.
#include "predictor/products.h"

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define FASTLVM_ISA neon_i8mm
#define FASTLVM_VECTOR_NEON
#include "predictor/mmla.h"

namespace fastlvm {
namespace neon_i8mm::product {
namespace {

struct Dot {
  using Sum = int32x4_t;
  static constexpr bool scaled = true;
  static constexpr int rows = 6, vectors = 2;
  static Sum zero() { return vdupq_n_s32(0); }
  static Sum add(Sum sum, uint8x16_t rows, uint8x16_t outputs) {
    return vmmlaq_s32(sum, vreinterpretq_s8_u8(rows), vreinterpretq_s8_u8(outputs));
  }
  static float32x4_t floats(Sum sum) { return vcvtq_f32_s32(sum); }
};

}  // namespace
}  // namespace neon_i8mm::product

const Product* neon_i8mm_int8() {
  const Product* const dots = neon_dotprod_int8();
  if (!dots) return nullptr;
  static const Product made = {"neon_i8mm", dots->element, dots->prepare,
                               neon_i8mm::product::multiply_pairs<neon_i8mm::product::Dot>};
  return &made;
}
}  // namespace fastlvm
#else
namespace fastlvm {
const Product* neon_i8mm_int8() { return nullptr; }
}  // namespace fastlvm
#endif
