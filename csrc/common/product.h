// Products of small matrices that lie in the caches, a tile of the result in registers at a time.
#pragma once

#include "common/rows.h"

namespace fastlvm::FASTLVM_ISA {

constexpr int tile_rows = 4;
template <class V>
constexpr int tile_columns = sizeof(V) == 32 ? 2 : 4;  // in vectors: AVX2 has 16 registers, the others 32

// The left factor, read one element at a time: element (r, k) is data[r * row + k * depth].
template <class T>
struct Left {
  const T* data;
  int64_t row, depth;
};

// The right factor: rows of whole vectors.
template <class T>
struct Right {
  const T* data;
  int64_t pitch;
};

// The result: out = scale[row] · product, or factor · out + scale[row] · product where `keep` is set.
template <class T>
struct Result {
  T* data;
  int64_t pitch;
  bool keep = false;
  T factor = T(1);
  const T* scale = nullptr;  // 1 if null
};

// Which terms k of row r are summed. Those left out are not read, so that a NaN in them stays where it is.
enum class Terms { all, up_to_row, from_row };

template <class V, int Rows, int Columns>
struct Tile {
  using T = typename V::scalar;
  V sums[Rows][Columns];

  // Rows [begin, end) take one more term; both are known when this is compiled.
  FASTLVM_INLINE void add(int begin, int end, const T* a, int64_t a_row, const T* b) {
    V in[Columns];
    FASTLVM_UNROLL
    for (int c = 0; c < Columns; ++c) in[c] = V::load(b + c * V::width);
    FASTLVM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      if (r < begin || r >= end) continue;
      const V weight = V::set1(a[r * a_row]);
      FASTLVM_UNROLL
      for (int c = 0; c < Columns; ++c) sums[r][c] = V::fma(weight, in[c], sums[r][c]);
    }
  }

  FASTLVM_INLINE void write(const Result<T>& out, int64_t row, int64_t column) const {
    FASTLVM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      T* const to = out.data + (row + r) * out.pitch + column;
      const V scale = V::set1(out.scale ? out.scale[row + r] : T(1)), factor = V::set1(out.factor);
      FASTLVM_UNROLL
      for (int c = 0; c < Columns; ++c) {
        V sum = scale * sums[r][c];
        if (out.keep) sum = V::fma(factor, V::load(to + c * V::width), sum);
        sum.store(to + c * V::width);
      }
    }
  }
};

template <class V, Terms terms, int Rows, int Columns>
inline void multiply_tile(int64_t row, int64_t column, int64_t depth, Left<typename V::scalar> a,
                          Right<typename V::scalar> b, const Result<typename V::scalar>& out) {
  Tile<V, Rows, Columns> tile;
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTLVM_UNROLL
    for (int c = 0; c < Columns; ++c) tile.sums[r][c] = V::zero();
  }
  a.data += row * a.row;
  b.data += column;
  const int64_t begin = terms == Terms::from_row ? row + Rows - 1 : 0;
  const int64_t end = terms == Terms::up_to_row ? row + 1 : depth;
  if constexpr (terms == Terms::from_row) {
    FASTLVM_UNROLL
    for (int k = 0; k < Rows - 1; ++k)
      tile.add(0, k + 1, a.data + (row + k) * a.depth, a.row, b.data + (row + k) * b.pitch);
  }
  for (int64_t k = begin; k < end; ++k) tile.add(0, Rows, a.data + k * a.depth, a.row, b.data + k * b.pitch);
  if constexpr (terms == Terms::up_to_row) {
    FASTLVM_UNROLL
    for (int k = 1; k < Rows; ++k) tile.add(k, Rows, a.data + (row + k) * a.depth, a.row, b.data + (row + k) * b.pitch);
  }
  tile.write(out, row, column);
}

template <class V, Terms terms, int Columns>
inline void multiply_columns(int64_t rows, int64_t column, int64_t depth, Left<typename V::scalar> a,
                             Right<typename V::scalar> b, const Result<typename V::scalar>& out) {
  int64_t row = 0;
  for (; row + tile_rows <= rows; row += tile_rows)
    multiply_tile<V, terms, tile_rows, Columns>(row, column, depth, a, b, out);
  if (row < rows)
    with_constant<tile_rows - 1>(
        rows - row, [&](auto count) { multiply_tile<V, terms, count.value, Columns>(row, column, depth, a, b, out); });
}

// `columns` counts elements in whole vectors; a triangular product is square, rows == depth.
template <class V, Terms terms = Terms::all>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Left<typename V::scalar> a,
                     Right<typename V::scalar> b, const Result<typename V::scalar>& out) {
  int64_t column = 0;
  for (; column + tile_columns<V> * V::width <= columns; column += tile_columns<V> * V::width)
    multiply_columns<V, terms, tile_columns<V>>(rows, column, depth, a, b, out);
  for (; column < columns; column += V::width) multiply_columns<V, terms, 1>(rows, column, depth, a, b, out);
}

}  // namespace fastlvm::FASTLVM_ISA
