// float16 and bfloat16 to float32 and back, rounded to nearest even, one at a time. See vec.h for the rules of this
// header.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastlvm::FASTLVM_ISA {

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN, kept quiet
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
  float out;
  if (rest < 0x400) {  // zero or subnormal: rest * 2^-24
    out = static_cast<float>(rest) * 5.9604644775390625e-8f;
    uint32_t bits;
    memcpy(&bits, &out, sizeof bits);
    bits |= sign;
    memcpy(&out, &bits, sizeof out);
    return out;
  }
  const uint32_t bits = sign | (rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ff) << 13 : (rest << 13) + 0x38000000u);
  memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint16_t to_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
  if (bits < 0x38800000u) {                                              // below 2^-14: a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    const float shifted = magnitude + 0.5f;  // the sum's unit in the last place is 2^-24
    uint32_t sum;
    memcpy(&sum, &shifted, sizeof sum);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13);
}

}  // namespace fastlvm::FASTLVM_ISA
