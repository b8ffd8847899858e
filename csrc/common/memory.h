// Aligned scratch memory, and the cache before it. Not inline, see tensor.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlvm {

inline constexpr size_t alignment = 64;

void* aligned_allocate(size_t bytes);  // throws std::bad_alloc
void aligned_release(void* memory) noexcept;

// Asks Linux for huge pages where whole ones fit: memory that is touched for the first time costs a page fault for
// every 4 KB of it otherwise, and malloc gets the largest arrays fresh from the system every time. Nothing elsewhere.
void prefer_huge_pages(void* memory, size_t bytes) noexcept;

int64_t second_cache();  // bytes of a core's second cache; a guess where the system does not say

}  // namespace fastlvm
