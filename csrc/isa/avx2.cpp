// Every op with AVX2, FMA and F16C; nothing where the target lacks them.
#include "ops/kernels.h"

#if defined(__AVX2__) && (defined(_MSC_VER) || (defined(__FMA__) && defined(__F16C__)))
#define FASTLVM_ISA avx2
#define FASTLVM_VECTOR_AVX2
#include "isa/kernels.h"

namespace fastlvm {
const Kernels* avx2_kernels() { return &avx2::kernels; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastlvm
#endif
