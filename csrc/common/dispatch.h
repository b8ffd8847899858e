// Which instruction set the kernels run with: the best that was compiled and that processor and system support, or the
// one named by FASTLVM_ISA or set_isa.
#pragma once

#include <string>
#include <vector>

#include "ops/kernels.h"

namespace fastlvm {

std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();  // best last
void read_isa_environment();                // a bad value is reported by the next active_kernels()
void set_isa(const std::string& name);      // throws std::invalid_argument
const Kernels& active_kernels();            // throws std::invalid_argument

// Products beyond an instruction set's own: level 1 is VNNI, AVX512-BF16 and the dot product of Arm, level 2 AMX.
inline constexpr int extension_levels = 2;

// The products of the active instruction set, with what the processor has of its extensions up to the level, which is
// the highest one unless a test sets another.
Products active_products();
void set_extension_level(int level);  // throws std::invalid_argument

}  // namespace fastlvm
