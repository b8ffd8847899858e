// Every op with AArch64 Advanced SIMD; nothing where the target lacks them.
#include "ops/kernels.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#define FASTLVM_ISA neon
#define FASTLVM_VECTOR_NEON
#include "isa/kernels.h"

namespace fastlvm {
const Kernels* neon_kernels() { return &neon::kernels; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace fastlvm
#endif
