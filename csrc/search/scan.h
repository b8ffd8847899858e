// The kernels of a search: rotating a query, its table, the estimates of a list's rows, and scores by int8 codes.
#pragma once

#include "common/rows.h"
#include "search/lists.h"

namespace fastlvm::FASTLVM_ISA::search {

// The sums and differences of numbers that are `half` apart.
template <class V>
void butterflies(float* x, int64_t size, int64_t half) {
  for (int64_t begin = 0; begin < size; begin += 2 * half)
    for (int64_t i = begin; i < begin + half; i += V::width) {
      const V a = V::load(x + i), b = V::load(x + i + half);
      (a + b).store(x + i), (a - b).store(x + i + half);
    }
}

#if defined(FASTLVM_VECTOR_AVX512)
// Of all halves within a vector.
inline void butterflies_within(float* x) {
  __m512 v = _mm512_loadu_ps(x);
  const auto step = [&](__m512 swapped, __mmask16 second) {
    v = _mm512_add_ps(swapped, _mm512_mask_xor_ps(v, second, v, _mm512_set1_ps(-0.0f)));
  };
  step(_mm512_permute_ps(v, 0xb1), 0xaaaa);
  step(_mm512_permute_ps(v, 0x4e), 0xcccc);
  step(_mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
  step(_mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
  _mm512_storeu_ps(x, v);
}
#endif

// In place, x [2^k]: divided by √2^k, so that lengths stay.
inline void hadamard(float* x, int64_t size) {
  int64_t half = 1;
#if defined(FASTLVM_VECTOR_AVX512)
  if (size >= Vec::width) {
    for (int64_t i = 0; i < size; i += Vec::width) butterflies_within(x + i);
    half = Vec::width;
  }
#endif
  for (; half < size && half < Vec::width; half *= 2) butterflies<Scalar<float>>(x, size, half);
  for (; half < size; half *= 2) butterflies<Vec>(x, size, half);
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < size; ++i) x[i] *= scale;
}

inline void rotate(const Rotation& r, float* x) {
  int64_t size = 1;
  while (2 * size <= r.dim) size *= 2;
  for (int64_t step = 0; step < rotation_rounds; ++step) {
    const int64_t round = r.back ? rotation_rounds - 1 - step : step;
    const float* const signs = r.signs + round * r.dim;
    float* const part = x + (round % 2 ? r.dim - size : 0);
    if (r.back) hadamard(part, size);  // its own inverse
    for (int64_t i = 0; i < r.dim; ++i) x[i] *= signs[i];
    if (!r.back) hadamard(part, size);
  }
}

constexpr int64_t entries_of_pair = 128, most_entry = 63;

// What each of 16 codes selects of four numbers, above the least of them: bytes, twice.
inline void entries_of(const float* four, float least, uint8_t* to) {
#if defined(FASTLVM_VECTOR_AVX512)
  const auto selected = [&](int j, __mmask16 codes) { return _mm512_maskz_mov_ps(codes, _mm512_set1_ps(four[j])); };
  __m512 sums = _mm512_add_ps(selected(0, 0xaaaa), selected(1, 0xcccc));
  sums = _mm512_add_ps(_mm512_add_ps(sums, selected(2, 0xf0f0)), selected(3, 0xff00));
  sums = _mm512_add_ps(_mm512_sub_ps(sums, _mm512_set1_ps(least)), _mm512_set1_ps(0.5f));
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(sums));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_broadcastsi128_si256(bytes));
#else
  for (int code = 0; code < 16; ++code) {
    float sum = (code & 1 ? four[0] : 0.0f) + (code & 2 ? four[1] : 0.0f);
    sum = sum + (code & 4 ? four[2] : 0.0f) + (code & 8 ? four[3] : 0.0f);
    to[code] = to[code + 16] = static_cast<uint8_t>(sum - least + 0.5f);
  }
#endif
}

// An entry is what four coordinates add above their least, in steps that make the largest 63: four of them fit a byte,
// and all of them 16 bits.
inline void fill(const float* query, int64_t dim, int64_t pairs, Table& table) {
  const int64_t groups = 4 * pairs;
  const auto at = [&](int64_t i) { return i < dim ? query[i] : 0.0f; };
  float most = 0, sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    float size = 0;
    for (int64_t i = 4 * g; i < 4 * g + 4; ++i) size += fabsf(at(i));
    most = size > most ? size : most, sum += size;
  }
  const float steps = static_cast<float>(smaller(most_entry, 65535 / groups));
  const bool empty = !(most > 1e-30f);  // the inverse of a smaller step is no number
  const float inverse = empty ? 0.0f : steps / most;
  table.base = -sum, table.step = empty ? 0.0f : 2 * most / steps;
  for (int64_t g = 0; g < groups; ++g) {
    float four[4], least = 0;
    for (int j = 0; j < 4; ++j) four[j] = at(4 * g + j) * inverse, least += four[j] < 0 ? four[j] : 0.0f;
    // Groups of a pair: low and high half of its first column, then of its second.
    entries_of(four, least, table.entries + g / 4 * entries_of_pair + g % 2 * 64 + g / 2 % 2 * 32);
  }
}

// Sums of the entries that the codes of a block's rows select.
#if defined(FASTLVM_VECTOR_AVX512)
inline void block_sums(const uint8_t* bits, const uint8_t* ahead, const uint8_t* entries, int64_t pairs,
                       uint16_t* sums) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i all = _mm512_setzero_si512(), odd = all;  // words of two rows, and what their odd ones hold
  const auto halves = [&](int64_t pair) {
    prefetch(ahead + pair * 64);
    const __m512i codes = _mm512_loadu_si512(bits + pair * 64);
    const uint8_t* const from = entries + pair * entries_of_pair;
    return _mm512_add_epi8(
        _mm512_shuffle_epi8(_mm512_loadu_si512(from), _mm512_and_si512(codes, low)),
        _mm512_shuffle_epi8(_mm512_loadu_si512(from + 64), _mm512_and_si512(_mm512_srli_epi16(codes, 4), low)));
  };
  const auto add = [&](__m512i bytes) {
    all = _mm512_add_epi16(all, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  };
  int64_t pair = 0;
  for (; pair + 2 <= pairs; pair += 2) add(_mm512_add_epi8(halves(pair), halves(pair + 1)));
  if (pair < pairs) add(halves(pair));
  const auto both = [](__m512i v) {  // of a pair's columns
    return _mm256_add_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  };
  const __m256i high = both(odd), rest = _mm256_sub_epi16(both(all), _mm256_slli_epi16(high, 8));
  // Rows 0 … 7 and 16 … 23, then 8 … 15 and 24 … 31.
  const __m256i first = _mm256_unpacklo_epi16(rest, high), second = _mm256_unpackhi_epi16(rest, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16), _mm256_permute2x128_si256(first, second, 0x31));
}
#elif defined(FASTLVM_VECTOR_AVX2)
inline void block_sums(const uint8_t* bits, const uint8_t* ahead, const uint8_t* entries, int64_t pairs,
                       uint16_t* sums) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i all = _mm256_setzero_si256(), odd = all;
  const auto load = [](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const auto halves = [&](const uint8_t* from, const uint8_t* table) {
    const __m256i codes = load(from);
    return _mm256_add_epi8(_mm256_shuffle_epi8(load(table), _mm256_and_si256(codes, low)),
                           _mm256_shuffle_epi8(load(table + 64), _mm256_and_si256(_mm256_srli_epi16(codes, 4), low)));
  };
  for (int64_t pair = 0; pair < pairs; ++pair) {
    prefetch(ahead + pair * 64);
    const uint8_t *const from = bits + pair * 64, *const table = entries + pair * entries_of_pair;
    const __m256i bytes = _mm256_add_epi8(halves(from, table), halves(from + 32, table + 32));
    all = _mm256_add_epi16(all, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }
  const __m256i rest = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8));
  const __m256i first = _mm256_unpacklo_epi16(rest, odd), second = _mm256_unpackhi_epi16(rest, odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_permute2x128_si256(first, second, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16), _mm256_permute2x128_si256(first, second, 0x31));
}
#elif defined(FASTLVM_VECTOR_NEON)
inline void block_sums(const uint8_t* bits, const uint8_t* ahead, const uint8_t* entries, int64_t pairs,
                       uint16_t* sums) {
  const uint8x16_t low = vdupq_n_u8(15);
  uint16x8_t total[4] = {vdupq_n_u16(0), vdupq_n_u16(0), vdupq_n_u16(0), vdupq_n_u16(0)};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    prefetch(ahead + pair * 64);
    const uint8_t *const from = bits + pair * 64, *const table = entries + pair * entries_of_pair;
    for (int half = 0; half < 2; ++half) {
      uint8x16_t bytes = vdupq_n_u8(0);
      for (int column = 0; column < 2; ++column) {
        const uint8x16_t codes = vld1q_u8(from + 32 * column + 16 * half);
        bytes = vaddq_u8(bytes, vqtbl1q_u8(vld1q_u8(table + 32 * column), vandq_u8(codes, low)));
        bytes = vaddq_u8(bytes, vqtbl1q_u8(vld1q_u8(table + 64 + 32 * column), vshrq_n_u8(codes, 4)));
      }
      total[2 * half] = vaddw_u8(total[2 * half], vget_low_u8(bytes));
      total[2 * half + 1] = vaddw_u8(total[2 * half + 1], vget_high_u8(bytes));
    }
  }
  for (int i = 0; i < 4; ++i) vst1q_u16(sums + 8 * i, total[i]);
}
#else
inline void block_sums(const uint8_t* bits, const uint8_t* ahead, const uint8_t* entries, int64_t pairs,
                       uint16_t* sums) {
  for (int64_t row = 0; row < block_rows; ++row) sums[row] = 0;
  for (int64_t column = 0; column < 2 * pairs; ++column) {
    prefetch(ahead + column * block_rows);
    const uint8_t* const table = entries + column / 2 * entries_of_pair + column % 2 * 32;
    for (int64_t row = 0; row < block_rows; ++row) {
      const uint8_t code = bits[column * block_rows + row];
      sums[row] = static_cast<uint16_t>(sums[row] + table[code & 15] + table[64 + (code >> 4)]);
    }
  }
}
#endif

// Estimates of `rows` <= 32 rows of a block that reach the threshold.
inline int64_t keep(const Scan& s, const uint16_t* sums, const float* factor, int64_t row, int64_t rows, int64_t kept) {
#if defined(FASTLVM_VECTOR_AVX512)
  const __m512 base = _mm512_set1_ps(s.table.base), step = _mm512_set1_ps(s.table.step);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < rows; i += 16) {
    const __mmask16 inside = Vec::mask(static_cast<int>(rows - i));
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + i)));
    const __m512 signs = _mm512_fmadd_ps(_mm512_cvtepi32_ps(wide), step, base);
    const __m512 factors = _mm512_loadu_ps(factor + i);
    const __m512 scores = _mm512_fmadd_ps(signs, factors, _mm512_set1_ps(s.centroid));
    const __mmask16 good = _mm512_mask_cmp_ps_mask(inside, scores, _mm512_set1_ps(s.threshold), _CMP_GE_OQ);
    if (!good) continue;
    const __m512i bits = _mm512_castps_si512(scores), flip = _mm512_srai_epi32(bits, 31);
    const __m512i ordered = _mm512_xor_si512(bits, _mm512_or_si512(flip, _mm512_set1_epi32(INT32_MIN)));
    const __m512i places = _mm512_sub_epi32(_mm512_set1_epi32(~(s.first + static_cast<int32_t>(row + i))), lanes);
    const auto store = [&](__m256i high, __m256i low, __mmask8 of) {
      const __m512i keys =
          _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(high), 32), _mm512_cvtepu32_epi64(low));
      _mm512_storeu_si512(s.keys + kept, _mm512_maskz_compress_epi64(of, keys));
      kept += _mm_popcnt_u32(of);
    };
    store(_mm512_castsi512_si256(ordered), _mm512_castsi512_si256(places), static_cast<__mmask8>(good));
    store(_mm512_extracti64x4_epi64(ordered, 1), _mm512_extracti64x4_epi64(places, 1),
          static_cast<__mmask8>(good >> 8));
  }
#else
  float signs[block_rows], scores[block_rows];
  for (int64_t i = 0; i < block_rows; ++i) signs[i] = static_cast<float>(sums[i]) * s.table.step + s.table.base;
  for (int64_t i = 0; i < rows; ++i) scores[i] = signs[i] * factor[i] + s.centroid;
  for (int64_t i = 0; i < rows; ++i) {
    s.keys[kept] = key_of(scores[i], static_cast<uint32_t>(s.first + row + i));
    kept += scores[i] >= s.threshold;
  }
#endif
  return kept;
}

// Lists are short and lie anywhere: the processor's own prefetcher has hardly found one when it ends.
inline int64_t scan(const Scan& s) {
  constexpr int64_t ahead = 3;
  const int64_t bytes = bytes_of_block(s.pairs), codes = code_bytes(s.pairs), blocks = div_up(s.rows, block_rows);
  int64_t kept = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t later = block + ahead, row = block * block_rows;
    const uint8_t* const here = s.blocks + block * bytes;
    const uint8_t* const then = later < blocks ? s.blocks + later * bytes : s.next + (later - blocks) * bytes;
    prefetch(then + codes), prefetch(then + codes + 64);
    alignas(64) uint16_t sums[block_rows];
    block_sums(here, then, s.table.entries, s.pairs, sums);
    const auto* const factors = reinterpret_cast<const float*>(here + codes);
    kept = keep(s, sums, factors, row, smaller(block_rows, s.rows - row), kept);
  }
  return kept;
}

inline float dot(const int8_t* code, const float* query, int64_t dim) {
#if defined(FASTLVM_VECTOR_AVX512)
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto at = [&](int64_t i) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code + i))));
  };
  int64_t i = 0;
  for (; i + 64 <= dim; i += 64) {
    FASTLVM_UNROLL
    for (int k = 0; k < 4; ++k) sums[k] = _mm512_fmadd_ps(at(i + 16 * k), _mm512_loadu_ps(query + i + 16 * k), sums[k]);
  }
  for (; i < dim; i += 16) {
    const __mmask16 inside = Vec::mask(static_cast<int>(dim - i));
    const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(inside, code + i)));
    sums[0] = _mm512_fmadd_ps(values, _mm512_maskz_loadu_ps(inside, query + i), sums[0]);
  }
  return Vec::sum({_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]))});
#else
  constexpr int64_t lanes = 32;
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes)
    for (int64_t k = 0; k < lanes; ++k) sums[k] += static_cast<float>(code[i + k]) * query[i + k];
  for (int64_t k = 0; i + k < dim; ++k) sums[k] += static_cast<float>(code[i + k]) * query[i + k];
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
#endif
}

// Rows lie far apart: some of those that follow are fetched while one is read.
inline void score(const Score& s) {
  constexpr int64_t ahead = 4, line = 64;
  const auto fetch = [&](int64_t i) {
    if (i >= s.count + s.following) return;
    const int8_t* const code = s.codes + s.positions[i] * s.dim;
    prefetch(s.scales + s.positions[i]);
    for (int64_t at = 0; at < s.dim; at += line) prefetch(code + at);
  };
  for (int64_t i = 0; i < ahead; ++i) fetch(i);
  for (int64_t i = 0; i < s.count; ++i) {
    fetch(i + ahead);
    const int64_t position = s.positions[i];
    s.scores[i] = dot(s.codes + position * s.dim, s.query, s.dim) * s.scales[position];
  }
}

inline constexpr SearchKernels kernels = {rotate, fill, scan, score};

}  // namespace fastlvm::FASTLVM_ISA::search
