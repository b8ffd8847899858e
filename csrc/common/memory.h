// Aligned scratch memory. Not inline, see tensor.h.
#pragma once

#include <cstddef>

namespace fastlvm {

inline constexpr size_t alignment = 64;

void* aligned_allocate(size_t bytes);  // throws std::bad_alloc
void aligned_release(void* memory) noexcept;

// Asks Linux for huge pages where whole ones fit: memory that is touched for the first time costs a page fault for
// every 4 KB of it otherwise, and malloc gets the largest arrays fresh from the system every time. Nothing elsewhere.
void prefer_huge_pages(void* memory, size_t bytes) noexcept;

}  // namespace fastlvm
