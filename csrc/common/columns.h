// Small matrices turned over: V::width rows of a few elements that lie side by side in memory, to and from vectors over
// the rows. See vec.h for the rules of this header.
#pragma once

#include "common/vec.h"

namespace fastlvm::FASTLVM_ISA {

constexpr int64_t max_columns = 8;

#if defined(FASTLVM_VECTOR_AVX512)

// Element (row, k) of [16, N] is lane (row * N + k) % 16 of the vector (row * N + k) / 16. Operands go in pairs: bit 4
// of an index says which of the two, and a mask the lanes that come from the pair.
template <int N>
struct ColumnTables {
  alignas(64) int32_t split[N][16], join[N][16];
  uint16_t split_mask[N][N], join_mask[N][N];

  constexpr ColumnTables() : split(), join(), split_mask(), join_mask() {
    for (int i = 0; i < N; ++i) {
      for (int lane = 0; lane < 16; ++lane) {
        const int to = lane * N + i, from = i * 16 + lane;
        split[i][lane] = to % 32;
        join[i][lane] = from / N + from % N % 2 * 16;
        uint16_t &to_mask = split_mask[i][to / 32], &from_mask = join_mask[i][from % N / 2];
        to_mask = static_cast<uint16_t>(to_mask | 1 << lane);
        from_mask = static_cast<uint16_t>(from_mask | 1 << lane);
      }
    }
  }
};

template <int N>
inline constexpr ColumnTables<N> column_tables{};

template <int N>
inline void permute_columns(const float* in, const int32_t (&lanes)[N][16], const uint16_t (&masks)[N][N], float* out) {
  __m512 operands[N + 1];
  for (int j = 0; j < N; ++j) operands[j] = _mm512_loadu_ps(in + j * 16);
  operands[N] = operands[N - 1];
  for (int i = 0; i < N; ++i) {
    const __m512i index = _mm512_load_si512(lanes[i]);
    __m512 result = _mm512_permutex2var_ps(operands[0], index, operands[1]);
    for (int j = 2; j < N; j += 2) {
      const __m512 more = _mm512_permutex2var_ps(operands[j], index, operands[j + 1]);
      result = _mm512_mask_mov_ps(result, masks[i][j / 2], more);
    }
    _mm512_storeu_ps(out + i * 16, result);
  }
}

template <int N>
inline void turn_columns(const float* in, float* out, bool split) {
  constexpr const ColumnTables<N>& tables = column_tables<N>;
  if (split)
    permute_columns<N>(in, tables.split, tables.split_mask, out);
  else
    permute_columns<N>(in, tables.join, tables.join_mask, out);
}

inline bool turn_columns(const float* in, int64_t columns, float* out, bool split) {
  switch (columns) {
    case 2:
      return turn_columns<2>(in, out, split), true;
    case 3:
      return turn_columns<3>(in, out, split), true;
    case 4:
      return turn_columns<4>(in, out, split), true;
    case 5:
      return turn_columns<5>(in, out, split), true;
    case 6:
      return turn_columns<6>(in, out, split), true;
    case 7:
      return turn_columns<7>(in, out, split), true;
    case 8:
      return turn_columns<8>(in, out, split), true;
    default:
      return false;
  }
}

#else

inline bool turn_columns(const float*, int64_t, float*, bool) { return false; }

#endif

inline bool turn_columns(const double*, int64_t, double*, bool) { return false; }

// out[k * V::width + i] = rows[i * columns + k]
template <class V>
inline void split_columns(const typename V::scalar* rows, int64_t columns, typename V::scalar* out) {
  if (turn_columns(rows, columns, out, true)) return;
  for (int64_t i = 0; i < V::width; ++i)
    for (int64_t k = 0; k < columns; ++k) out[k * V::width + i] = rows[i * columns + k];
}

// rows[i * columns + k] = in[k * V::width + i]
template <class V>
inline void join_columns(const typename V::scalar* in, int64_t columns, typename V::scalar* rows) {
  if (turn_columns(in, columns, rows, false)) return;
  for (int64_t i = 0; i < V::width; ++i)
    for (int64_t k = 0; k < columns; ++k) rows[i * columns + k] = in[k * V::width + i];
}

}  // namespace fastlvm::FASTLVM_ISA
