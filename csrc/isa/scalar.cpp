// Every op with the architecture's baseline instructions, one element at a time.
#define FASTLVM_ISA scalar
#include "isa/kernels.h"

namespace fastlvm {
const Kernels* scalar_kernels() { return &scalar::kernels; }
}  // namespace fastlvm
