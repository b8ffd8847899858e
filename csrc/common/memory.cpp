#include "common/memory.h"

#include <new>

namespace fastlvm {

void* aligned_allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{alignment}); }

void aligned_release(void* memory) noexcept { ::operator delete(memory, std::align_val_t{alignment}); }

}  // namespace fastlvm
