// The products beyond an instruction set's own, one per object in isa/; null where the target or the compiler lacks the
// instructions.
#pragma once

#include "predictor/network.h"

namespace fastlvm {

const Product* avx512_vnni_int8();
const Product* avx512_bf16_product();
const Product* avx512_amx_int8();
const Product* avx512_amx_bf16();
const Product* neon_dotprod_int8();
const Product* neon_i8mm_int8();
const Product* neon_bf16_product();

}  // namespace fastlvm
