// Aligned scratch memory. Not inline, see tensor.h.
#pragma once

#include <cstddef>

namespace fastlvm {

inline constexpr size_t alignment = 64;

void* aligned_allocate(size_t bytes);  // throws std::bad_alloc
void aligned_release(void* memory) noexcept;

}  // namespace fastlvm
