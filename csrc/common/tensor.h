// Strided views on arrays that somebody else owns.
//
// Everything here is plain data without member functions: the header is included by objects compiled for different
// instruction sets, and an inline function shared between them could be merged into one the machine cannot run.
#pragma once

#include <cstdint>

namespace fastlvm {

enum class DType : uint8_t { none, f16, bf16, f32, f64 };

inline constexpr int max_rank = 4;

// Strides count elements, and may be zero or negative. `dtype == none` says that the array was not given; one
// that was has an address, even if it is empty.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::none;
  int rank = 0;
  int64_t shape[max_rank] = {0, 0, 0, 0};
  int64_t stride[max_rank] = {0, 0, 0, 0};
};

}  // namespace fastlvm
