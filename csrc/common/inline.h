// What a register-blocked kernel asks of the compiler: its tile stays in registers only if loops over it are unrolled.
#pragma once

#if defined(__GNUC__)
#define FASTLVM_ALWAYS_INLINE [[gnu::always_inline]] inline
#define FASTLVM_UNROLL _Pragma("GCC unroll 8")
#else
#define FASTLVM_ALWAYS_INLINE inline
#define FASTLVM_UNROLL
#endif
