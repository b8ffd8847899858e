// Products as in product.h with the matrix instructions of Armv8.6, which multiply 2 rows by 2 outputs over two groups
// of inputs at once. A vector of weights (4 outputs) of one group and of the next are interleaved to two pairs of
// outputs; of rows without a partner every sum is made twice. All rows go this way, however many there are, so that an
// output's bits do not depend on the rows beside it.
//
// A Dot says how: Sum (row 0 by outputs 0 and 1, then row 1), add(sum, rows, outputs), floats(sum); scaled, rows and
// vectors as in product.h.
#pragma once

#include "predictor/product.h"

namespace fastlvm::FASTLVM_ISA::product {

constexpr int64_t group_bytes = 4;  // of one output, and of one row

template <bool Whole>
FASTLVM_INLINE uint8x8_t two_groups(const uint8_t* x) {
  if constexpr (Whole) return vld1_u8(x);
  uint32_t one;
  memcpy(&one, x, sizeof one);
  return vreinterpret_u8_u32(vset_lane_u32(one, vdup_n_u32(0), 0));
}

// Groups g and, of a whole step, g + 1.
template <class Dot, bool Whole, int Pairs, int Vectors>
FASTLVM_INLINE void paired_step(const uint8_t* const (&x)[2 * Pairs], const uint8_t* const (&w)[Vectors], int64_t g,
                                typename Dot::Sum (&sums)[Pairs][Vectors][2]) {
  uint8x16_t in[Pairs];
  FASTLVM_UNROLL
  for (int p = 0; p < Pairs; ++p)
    in[p] =
        vcombine_u8(two_groups<Whole>(x[2 * p] + g * group_bytes), two_groups<Whole>(x[2 * p + 1] + g * group_bytes));
  FASTLVM_UNROLL
  for (int v = 0; v < Vectors; ++v) {
    const uint32x4_t first = vreinterpretq_u32_u8(vld1q_u8(w[v] + g * slab));
    uint32x4_t second = vdupq_n_u32(0);
    if constexpr (Whole) second = vreinterpretq_u32_u8(vld1q_u8(w[v] + (g + 1) * slab));
    const uint8x16_t low = vreinterpretq_u8_u32(vzip1q_u32(first, second)),
                     high = vreinterpretq_u8_u32(vzip2q_u32(first, second));
    FASTLVM_UNROLL
    for (int p = 0; p < Pairs; ++p) {
      sums[p][v][0] = Dot::add(sums[p][v][0], in[p], low);
      sums[p][v][1] = Dot::add(sums[p][v][1], in[p], high);
    }
  }
}

template <class Dot, int Rows, int Vectors>
FASTLVM_INLINE void paired_tile(const Matrix& m, const Activations& a, int64_t row, int64_t piece, float* y,
                                int64_t stride, bool add) {
  constexpr int pairs = (Rows + 1) / 2;
  const int64_t groups = groups_of(m), block_bytes = groups * slab;
  const uint8_t* w[Vectors];
  FASTLVM_UNROLL
  for (int v = 0; v < Vectors; ++v)
    w[v] = m.weight + (piece + v) / pieces * block_bytes + (piece + v) % pieces * piece_bytes;
  const uint8_t* x[2 * pairs];
  FASTLVM_UNROLL
  for (int r = 0; r < 2 * pairs; ++r) x[r] = a.data + (row + (r < Rows ? r : Rows - 1)) * a.stride;
  typename Dot::Sum sums[pairs][Vectors][2];
  FASTLVM_UNROLL
  for (int p = 0; p < pairs; ++p) {
    FASTLVM_UNROLL
    for (int v = 0; v < Vectors; ++v) sums[p][v][0] = sums[p][v][1] = Dot::zero();
  }
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2) paired_step<Dot, true, pairs, Vectors>(x, w, g, sums);
  if (g < groups) paired_step<Dot, false, pairs, Vectors>(x, w, g, sums);
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    float* const out = y + (row + r) * stride;
    FASTLVM_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      const float32x4_t low = Dot::floats(sums[r / 2][v][0]), high = Dot::floats(sums[r / 2][v][1]);
      const int64_t output = (piece + v) * Vec::width;
      Vec value = {r % 2 ? vcombine_f32(vget_high_f32(low), vget_high_f32(high))
                         : vcombine_f32(vget_low_f32(low), vget_low_f32(high))};
      if constexpr (Dot::scaled) value = scaled(value, m, output, a.scale[(row + r) * a.scale_stride]);
      value = value + Vec::load(m.bias + output);
      if (add) value = value + Vec::load(out + output);
      value.store(out + output);
    }
  }
}

template <class Dot>
inline void multiply_pairs(const Matrix& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
                           bool add) {
  static_assert(pieces % Dot::vectors == 0);
  for (int64_t piece = begin * pieces; piece < end * pieces; piece += Dot::vectors)
    for (int64_t row = 0; row < a.rows; row += Dot::rows)
      with_constant<Dot::rows>(smaller(a.rows - row, Dot::rows), [&](auto rows) {
        paired_tile<Dot, rows.value, Dot::vectors>(m, a, row, piece, y, stride, add);
      });
}

}  // namespace fastlvm::FASTLVM_ISA::product
