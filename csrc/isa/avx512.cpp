// Every op with AVX-512 F, BW, DQ and VL; nothing where the target lacks them.
#include "ops/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTLVM_ISA avx512
#define FASTLVM_VECTOR_AVX512
#include "isa/kernels.h"

namespace fastlvm {
const Kernels* avx512_kernels() { return &avx512::kernels; }
}  // namespace fastlvm
#else
namespace fastlvm {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fastlvm
#endif
