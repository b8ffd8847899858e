// Tiles of a few steps whose rows fill memory: whole vectors are read and written where V::transpose by itself would
// have masked ones. Up to 8 steps AVX-512 turns them by N² / 2 permutations instead of the 64 of V::transpose.
#pragma once

#include "common/rows.h"

namespace fastlvm::FASTLVM_ISA {

template <class V>
constexpr int max_columns = V::width == 16 ? 8 : V::width;

#if defined(FASTLVM_VECTOR_AVX512)

// Element (row, k) of [16, N] is lane (row * N + k) % 16 of the vector (row * N + k) / 16. Operands go in pairs: bit 4
// of an index says which of the two, and a mask the lanes that come from the pair.
template <int N>
struct ColumnTables {
  struct Table {
    alignas(64) int32_t lanes[N][16];
    uint16_t masks[N][N];
  };
  Table split, join;

  constexpr ColumnTables() : split(), join() {
    for (int i = 0; i < N; ++i) {
      for (int lane = 0; lane < 16; ++lane) {
        const int to = lane * N + i, from = i * 16 + lane;
        split.lanes[i][lane] = to % 32;
        join.lanes[i][lane] = from / N + from % N % 2 * 16;
        uint16_t &to_mask = split.masks[i][to / 32], &from_mask = join.masks[i][from % N / 2];
        to_mask = static_cast<uint16_t>(to_mask | 1 << lane);
        from_mask = static_cast<uint16_t>(from_mask | 1 << lane);
      }
    }
  }
};

template <int N>
inline constexpr ColumnTables<N> column_tables{};

// store(i, vector i of the result), from vectors load(j)
template <int N, class Load, class Store>
FASTLVM_INLINE void permute_columns(const typename ColumnTables<N>::Table& table, Load load, Store store) {
  __m512 operands[N + 1];
  FASTLVM_UNROLL
  for (int j = 0; j < N; ++j) operands[j] = load(j).v;
  operands[N] = operands[N - 1];
  for (int i = 0; i < N; ++i) {
    const __m512i index = _mm512_load_si512(table.lanes[i]);
    __m512 result = _mm512_permutex2var_ps(operands[0], index, operands[1]);
    for (int j = 2; j < N; j += 2) {
      const __m512 more = _mm512_permutex2var_ps(operands[j], index, operands[j + 1]);
      result = _mm512_mask_mov_ps(result, table.masks[i][j / 2], more);
    }
    store(i, Vec{result});
  }
}

#endif

// tile[k * pitch + i] = p[i * N + k] for i < V::width and k < N
template <class V, int N, class Format>
inline void split_columns(Format format, typename V::scalar* tile, const typename Format::Element* p, int64_t pitch) {
  constexpr int W = V::width;
#if defined(FASTLVM_VECTOR_AVX512)
  if constexpr (W == 16)
    return permute_columns<N>(
        column_tables<N>.split, [&](int k) { return format.load(p + k * W, W); },
        [&](int k, V column) { column.store(tile + k * pitch); });
#endif
  V rows[W];
  for (int i = 0; i < W; ++i) rows[i] = format.load(p + i * N, i * N + W <= W * N ? W : N);
  V::transpose(rows);
  for (int k = 0; k < N; ++k) rows[k].store(tile + k * pitch);
}

// The reverse. A row is written with what follows it, which the next row then overwrites.
template <class V, int N, class Format>
inline void join_columns(Format format, const typename V::scalar* tile, typename Format::Element* p, int64_t pitch) {
  constexpr int W = V::width;
#if defined(FASTLVM_VECTOR_AVX512)
  if constexpr (W == 16)
    return permute_columns<N>(
        column_tables<N>.join, [&](int k) { return V::load(tile + k * pitch); },
        [&](int k, V rows) { format.store(p + k * W, W, rows); });
#endif
  V rows[W];
  for (int k = 0; k < W; ++k) rows[k] = V::load(tile + (k < N ? k : 0) * pitch);
  V::transpose(rows);
  for (int i = 0; i < W; ++i) format.store(p + i * N, i * N + W <= W * N ? W : N, rows[i]);
}

}  // namespace fastlvm::FASTLVM_ISA
