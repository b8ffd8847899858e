// Products of matrices that do not fit the caches: the right factor is packed into panels, a tile of the result stays
// in registers while a panel goes by, and callers cut depth and rows so that panels stay in the second cache.
//
// The sum of an element runs over the depth in order and goes on from what is in memory where `keep` is set: no bit
// depends on how the depth is cut, or on who computes a tile. common/product.h is for factors that lie as they are.
#pragma once

#include "common/rows.h"
#include "common/tiles.h"

namespace fastlvm::FASTLVM_ISA {

// AVX-512 and NEON have 32 registers: 24 sums, 4 of a panel, one number spread over the lanes. The others have 16.
template <class V>
constexpr int panel_vectors = V::width == 8 ? 2 : 4;
template <class V>
constexpr int panel_rows = V::width == 1 ? 3 : 6;
template <class V>
constexpr int64_t panel_width = panel_vectors<V> * V::width;

// The left factor, read one element at a time: element (r, k) is data[r * row + k % run * depth + k / run * hop].
template <class T>
struct Spread {
  const T* data;
  int64_t row, depth;
  int64_t run = INT64_MAX, hop = 0;
};

template <class T>
struct PanelResult {
  T* data;
  int64_t pitch, columns;  // columns of this panel that there are
  bool keep;               // adds to what is there
};

template <class V, int Rows>
FASTLVM_INLINE void panel_tile(int64_t depth, Spread<typename V::scalar> a, const typename V::scalar* b,
                               const PanelResult<typename V::scalar>& out) {
  using T = typename V::scalar;
  constexpr int W = V::width, N = panel_vectors<V>;
  V sums[Rows][N];
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTLVM_UNROLL
    for (int c = 0; c < N; ++c) {
      const int64_t left = out.columns - c * W;
      const T* const from = out.data + r * out.pitch + c * W;
      sums[r][c] = !out.keep || left <= 0 ? V::zero()
                   : left >= W            ? V::load(from)
                                          : V::load_first(from, static_cast<int>(left));
    }
  }
  for (int64_t k = 0; k < depth; a.data += a.hop) {
    const T* weight = a.data;
    for (const int64_t end = k + smaller(a.run, depth - k); k < end; ++k, weight += a.depth, b += panel_width<V>) {
      V in[N];
      FASTLVM_UNROLL
      for (int c = 0; c < N; ++c) in[c] = V::load(b + c * W);
      FASTLVM_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const V spread = V::set1(weight[r * a.row]);
        FASTLVM_UNROLL
        for (int c = 0; c < N; ++c) sums[r][c] = V::fma(spread, in[c], sums[r][c]);
      }
    }
  }
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTLVM_UNROLL
    for (int c = 0; c < N; ++c) {
      const int64_t left = out.columns - c * W;
      T* const to = out.data + r * out.pitch + c * W;
      if (left >= W)
        sums[r][c].store(to);
      else if (left > 0)
        sums[r][c].store_first(to, static_cast<int>(left));
    }
  }
}

// out [rows, panel] (+)= a [rows, depth] · b [depth, panel_width]
template <class V>
inline void multiply_panel(int64_t rows, int64_t depth, Spread<typename V::scalar> a, const typename V::scalar* b,
                           PanelResult<typename V::scalar> out) {
  constexpr int most = panel_rows<V>;
  for (; rows >= most; rows -= most, a.data += most * a.row, out.data += most * out.pitch)
    panel_tile<V, most>(depth, a, b, out);
  if (rows > 0) with_constant<most - 1>(rows, [&](auto count) { panel_tile<V, count.value>(depth, a, b, out); });
}

// Panels [panels, rows, panel_width] of columns [column, column + columns) of rows [row, row + rows) of a matrix, the
// last one filled up with zeros; a panel of the result has room for `room` rows.
template <class V>
inline void pack_panels(typename V::scalar* out, int64_t room, const TensorView& view, int64_t row, int64_t rows,
                        int64_t column, int64_t columns) {
  constexpr int64_t N = panel_width<V>;
  const auto rest_of = [&](int64_t c, auto* to) { fill_zero(to + columns - c, N - (columns - c)); };
  if (view.stride[1] == 1)
    return with_format<V>(view, [&](auto format, const auto* data) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* const from = data + offset_of(view, row + r, column);
        auto* to = out + r * N;
        int64_t c = 0;
        for (; c + N <= columns; c += N, to += room * N) {
          FASTLVM_UNROLL
          for (int v = 0; v < panel_vectors<V>; ++v)
            format.load(from + c + v * V::width, V::width).store(to + v * V::width);
        }
        if (c == columns) continue;
        read_row<V>(format, to, from + c, columns - c);
        rest_of(c, to);
      }
    });
  for (int64_t r = 0; r < rows; ++r) {
    auto* to = out + r * N;
    for (int64_t c = 0; c < columns; c += N, to += room * N) {
      read_row<V>(to, view, offset_of(view, row + r, column + c), view.stride[1], smaller(N, columns - c));
      if (columns - c < N) rest_of(c, to);
    }
  }
}

}  // namespace fastlvm::FASTLVM_ISA
