// 8 floats: AVX2, FMA, F16C. See vec.h.
#pragma once

#include <immintrin.h>

namespace fastlvm::FASTLVM_ISA {

struct Vec {
  using scalar = float;
  static constexpr int width = 8;
  __m256 v;

  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_first(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  static Vec first(Vec a, int n) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(mask(n)))}; }
  static float sum(Vec a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vec if_greater(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
  }
  static Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec scale(Vec a, Vec k) {  // in two steps, because 2^k alone may not be a number
    const __m256i whole = _mm256_cvtps_epi32(k.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
  }

  static bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0; }

  static Vec load_f16(const uint16_t* p, int n) { return {_mm256_cvtph_ps(load_first16(p, n))}; }
  static Vec load_bf16(const uint16_t* p, int n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_first16(p, n)), 16))};
  }
  void store_f16(uint16_t* p, int n) const {
    store_first16(p, n, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store_bf16(uint16_t* p, int n) const {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    store_first16(p, n, _mm256_castsi256_si128(packed));
  }

  FASTLVM_INLINE static void transpose(Vec (&r)[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
      a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {  // b[i + c] holds columns c and c + 4 of rows i ... i + 3
      for (int c = 0; c < 2; ++c) {
        b[i + 2 * c] = _mm256_shuffle_ps(a[i + c], a[i + 2 + c], 0x44);
        b[i + 2 * c + 1] = _mm256_shuffle_ps(a[i + c], a[i + 2 + c], 0xee);
      }
    }
    for (int c = 0; c < 4; ++c) {
      r[c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
      r[4 + c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
  }

  static constexpr int states_at_once = 2;  // what the registers hold in the scans
  static constexpr int exp2_steps = 8;
  FASTLVM_INLINE static Vec exp2_head(Vec t, Vec& f) {
    t.v = _mm256_max_ps(_mm256_set1_ps(-127.0f), t.v);
    // The sum's unit in the last place is 1/8: its last three bits are the place in the table, the others the power.
    const __m256 shift = _mm256_set1_ps(12582912.0f / 8), place = _mm256_add_ps(t.v, shift);
    f.v = _mm256_sub_ps(t.v, _mm256_sub_ps(place, shift));
    const __m256i bits = _mm256_castps_si256(place);
    const __m256 table = _mm256_permutevar8x32_ps(_mm256_loadu_ps(exp2_table8), bits);
    const __m256i power = _mm256_slli_epi32(_mm256_srai_epi32(bits, 3), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(table), power))};
  }

  struct Wide {
    __m256d low, high;
    static Wide load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
    void store(double* p) const {
      _mm256_storeu_pd(p, low);
      _mm256_storeu_pd(p + 4, high);
    }
    static Wide from(Vec a) {
      return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
    }
    friend Wide operator+(Wide a, Wide b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
    static Wide fma(Wide a, Wide b, Wide c) {
      return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
    }
  };

 private:
  static __m128i load_first16(const uint16_t* p, int n) {
    if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    uint16_t words[8] = {};
    for (int i = 0; i < n; ++i) words[i] = p[i];
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  }
  static void store_first16(uint16_t* p, int n, __m128i x) {
    if (n >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    uint16_t words[8];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), x);
    for (int i = 0; i < n; ++i) p[i] = words[i];
  }
  static __m256 power(__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace fastlvm::FASTLVM_ISA
