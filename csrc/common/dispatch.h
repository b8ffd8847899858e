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

// The products of the active instruction set, those of its extensions (VNNI, BF16, dot product) where the processor has
// them and set_extensions(false) has not put them aside.
Products active_products();
void set_extensions(bool wanted);

}  // namespace fastlvm
