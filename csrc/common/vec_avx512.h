// 16 floats: AVX-512 F, BW, DQ, VL. See vec.h.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

namespace fastlvm::FASTLVM_ISA {

struct Vec {
  using scalar = float;
  static constexpr int width = 16;
  __m512 v;

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << (n > 16 ? 16 : n)) - 1); }

  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  static Vec first(Vec a, int n) { return {_mm512_maskz_mov_ps(mask(n), a.v)}; }
  static float sum(Vec a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
  static Vec if_greater(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
  }
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vec scale(Vec a, Vec k) { return {_mm512_scalef_ps(a.v, k.v)}; }

  static bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }

  static Vec load_f16(const uint16_t* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))}; }
  static Vec load_bf16(const uint16_t* p, int n) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store_f16(uint16_t* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store_bf16(uint16_t* p, int n) const {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
  }

  FASTLVM_INLINE static void transpose(Vec (&r)[16]) {
    __m512 a[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    __m512 b[16];  // 4 x 4 blocks transposed: b[4 i + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 i ... 4 i + 3
    for (int i = 0; i < 16; i += 4) {
      for (int c = 0; c < 2; ++c) {
        const __m512d low = _mm512_castps_pd(a[i + c]), high = _mm512_castps_pd(a[i + 2 + c]);
        b[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        b[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    for (int c = 0; c < 4; ++c) {
      const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
      const __m512 odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
      const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
      r[c].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      r[8 + c].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      r[4 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      r[12 + c].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }

  static constexpr int states_at_once = 4;  // what the registers hold in the scans
  static constexpr int exp2_steps = 16;
  FASTLVM_INLINE static Vec exp2_head(Vec t, Vec& f) {
    f.v = _mm512_reduce_ps(t.v, 4 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for an infinite t
    // The sum's unit in the last place is 1/16: its last four bits are the place in the table.
    const __m512 place = _mm512_add_ps(t.v, _mm512_set1_ps(12582912.0f / 16));
    const __m512 table = _mm512_permutexvar_ps(_mm512_castps_si512(place), _mm512_loadu_ps(exp2_table16));
    return {_mm512_scalef_ps(table, _mm512_sub_ps(t.v, f.v))};  // times 2 to the integer below t - f
  }

  // 2^t for t <= 127: by the 32nd part below t, so that the integer below t is the one below that part, too. The
  // polynomial is minimax over what is left.
  static Vec exp2(Vec t) {
    constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512 f = _mm512_reduce_ps(t.v, 5 << 4 | down);  // 0 for an infinite t
    const __m512i place = _mm512_castps_si512(_mm512_add_round_ps(t.v, _mm512_set1_ps(12582912.0f / 32), down));
    const __m512 table = _mm512_permutex2var_ps(_mm512_load_ps(exp2_table32), place, _mm512_load_ps(exp2_table32 + 16));
    const __m512 head = _mm512_scalef_ps(table, t.v);
    const __m512 q = _mm512_fmadd_ps(f, _mm512_set1_ps(0.24265269229f), _mm512_set1_ps(0.69312373161f));
    return {_mm512_fmadd_ps(_mm512_mul_ps(head, f), q, head)};
  }

  struct Wide {
    __m512d low, high;
    static Wide load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
    void store(double* p) const {
      _mm512_storeu_pd(p, low);
      _mm512_storeu_pd(p + 8, high);
    }
    static Wide from(Vec a) {
      return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
    }
    friend Wide operator+(Wide a, Wide b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
    static Wide fma(Wide a, Wide b, Wide c) {
      return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
    }
  };
};

}  // namespace fastlvm::FASTLVM_ISA
