// 4 floats: AArch64 Advanced SIMD. See vec.h.
#pragma once

#include <arm_neon.h>

namespace fastlvm::FASTLVM_ISA {

struct Vec {
  using scalar = float;
  static constexpr int width = 4;
  float32x4_t v;

  static uint32x4_t mask(int n) {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n));
  }

  static Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_first(const float* p, int n) {
    if (n >= 4) return load(p);
    float lanes[4] = {0, 0, 0, 0};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_first(float* p, int n) const {
    if (n >= 4) return store(p);
    float lanes[4];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static Vec first(Vec a, int n) { return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), mask(n)))}; }
  static float sum(Vec a) { return vaddvq_f32(a.v); }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
  static Vec if_greater(Vec a, Vec b, Vec yes, Vec no) { return {vbslq_f32(vcgtq_f32(a.v, b.v), yes.v, no.v)}; }
  static Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  static Vec scale(Vec a, Vec k) {  // in two steps, because 2^k alone may not be a number
    const int32x4_t whole = vcvtq_s32_f32(k.v);
    const int32x4_t half = vshrq_n_s32(whole, 1);
    return {vmulq_f32(vmulq_f32(a.v, power(half)), power(vsubq_s32(whole, half)))};
  }

  static bool any_greater(Vec a, Vec b) { return vmaxvq_u32(vcgtq_f32(a.v, b.v)) != 0; }

  static Vec load_f16(const uint16_t* p, int n) { return {vcvt_f32_f16(vreinterpret_f16_u16(load_first16(p, n)))}; }
  static Vec load_bf16(const uint16_t* p, int n) {
    return {vreinterpretq_f32_u32(vshll_n_u16(load_first16(p, n), 16))};
  }
  void store_f16(uint16_t* p, int n) const { store_first16(p, n, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  void store_bf16(uint16_t* p, int n) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), vandq_u32(high, vdupq_n_u32(1)));
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40)), number = vceqq_f32(v, v);
    store_first16(p, n, vmovn_u32(vbslq_u32(number, vshrq_n_u32(sum, 16), quiet)));
  }

  FASTLVM_INLINE static void transpose(Vec (&r)[4]) {
    const float32x4_t a = vtrn1q_f32(r[0].v, r[1].v), b = vtrn2q_f32(r[0].v, r[1].v);
    const float32x4_t c = vtrn1q_f32(r[2].v, r[3].v), d = vtrn2q_f32(r[2].v, r[3].v);
    r[0].v = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    r[1].v = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    r[2].v = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    r[3].v = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
  }

  static constexpr int states_at_once = 4;  // what the registers hold in the scans
  static constexpr int exp2_steps = 1;
  FASTLVM_INLINE static Vec exp2_head(Vec t, Vec& f) {
    t = max(set1(-127.0f), t);
    const float32x4_t k = vrndnq_f32(t.v);
    f.v = vsubq_f32(t.v, k);
    return {power(vcvtq_s32_f32(k))};
  }

  struct Wide {
    float64x2_t low, high;
    static Wide load(const double* p) { return {vld1q_f64(p), vld1q_f64(p + 2)}; }
    void store(double* p) const {
      vst1q_f64(p, low);
      vst1q_f64(p + 2, high);
    }
    static Wide from(Vec a) { return {vcvt_f64_f32(vget_low_f32(a.v)), vcvt_high_f64_f32(a.v)}; }
    friend Wide operator+(Wide a, Wide b) { return {vaddq_f64(a.low, b.low), vaddq_f64(a.high, b.high)}; }
    static Wide fma(Wide a, Wide b, Wide c) {
      return {vfmaq_f64(c.low, a.low, b.low), vfmaq_f64(c.high, a.high, b.high)};
    }
  };

 private:
  static uint16x4_t load_first16(const uint16_t* p, int n) {
    if (n >= 4) return vld1_u16(p);
    uint16_t words[4] = {0, 0, 0, 0};
    for (int i = 0; i < n; ++i) words[i] = p[i];
    return vld1_u16(words);
  }
  static void store_first16(uint16_t* p, int n, uint16x4_t x) {
    if (n >= 4) return vst1_u16(p, x);
    uint16_t words[4];
    vst1_u16(words, x);
    for (int i = 0; i < n; ++i) p[i] = words[i];
  }
  static float32x4_t power(int32x4_t k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
  }
};

}  // namespace fastlvm::FASTLVM_ISA
