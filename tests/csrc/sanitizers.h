// What AddressSanitizer is told; native.mk includes it once in each program it watches.
#pragma once

#if defined(FASTLVM_ASAN)
// Fresh memory holds NaNs, so that what is read before it is written shows in the result.
extern "C" const char* __asan_default_options() {
  return "max_malloc_fill_size=1073741824:malloc_fill_byte=255:quarantine_size_mb=16:detect_stack_use_after_return=0";
}
#endif
