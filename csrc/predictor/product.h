// y = x Wᵀ over packed weights (network.h), one template for all precisions and instruction sets.
//
// A tile of rows × outputs stays in registers while the inputs go by. Lanes are outputs, so that a group of inputs is
// broadcast and nothing is summed across lanes; weights are read once, in the order they lie in. The sum of an output
// runs over the inputs in order: it does not depend on the rows beside it or on the number of threads.
//
// A Dot says how: Element (of an activation), Sum (of V::width outputs), Weights, Input, and
//   load(p)              the weights of V::width outputs for a group, 4 V::width bytes
//   broadcast(x)         the group of inputs at x, an Element each
//   add(sum, weights, input)
//   finish(sum, matrix, output, scale)   float32, without bias
//   rows, vectors        the largest tile that the registers hold; vectors of V::width outputs
#pragma once

#include "common/rows.h"
#include "predictor/network.h"

namespace fastlvm::FASTLVM_ISA::product {

constexpr int64_t slab = 64;                            // bytes of a block for one group of inputs
constexpr int64_t pieces = block_outputs / Vec::width;  // vectors in a block
constexpr int64_t piece_bytes = slab / pieces;

inline int64_t blocks_of(const Matrix& m) { return div_up(m.outputs, block_outputs); }
inline int64_t groups_of(const Matrix& m) { return div_up(m.inputs, group_of(m.precision)); }

template <class Dot, int Rows, int Vectors>
FASTLVM_INLINE void tile(const Matrix& m, const Activations& a, int64_t row, int64_t piece, float* y, int64_t stride,
                         bool add) {
  using Element = typename Dot::Element;
  const int64_t groups = groups_of(m), block_bytes = groups * slab;
  const uint8_t* w[Vectors];
  FASTLVM_UNROLL
  for (int v = 0; v < Vectors; ++v)
    w[v] = m.weight + (piece + v) / pieces * block_bytes + (piece + v) % pieces * piece_bytes;
  const uint8_t* x[Rows];
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) x[r] = a.data + (row + r) * a.stride;
  typename Dot::Sum sums[Rows][Vectors];
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTLVM_UNROLL
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Dot::zero();
  }
  constexpr int64_t input_bytes = Dot::group * static_cast<int64_t>(sizeof(Element));
  for (int64_t g = 0; g < groups; ++g) {
    typename Dot::Weights weights[Vectors];
    FASTLVM_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      weights[v] = Dot::load(w[v] + g * slab);
      if constexpr (pieces <= 2)  // the tile that comes next; narrower vectors have many pieces to a line
        prefetch(w[v] + g * slab + (Vectors + pieces - 1) / pieces * block_bytes);
    }
    FASTLVM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const auto in = Dot::broadcast(reinterpret_cast<const Element*>(x[r] + g * input_bytes));
      FASTLVM_UNROLL
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Dot::add(sums[r][v], weights[v], in);
    }
  }
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const float scale = Dot::scaled ? a.scale[(row + r) * a.scale_stride] : 1.0f;
    float* const out = y + (row + r) * stride;
    FASTLVM_UNROLL
    for (int v = 0; v < Vectors; ++v) {
      const int64_t output = (piece + v) * Vec::width;
      Vec value = Dot::finish(sums[r][v], m, output, scale) + Vec::load(m.bias + output);
      if (add) value = value + Vec::load(out + output);
      value.store(out + output);
    }
  }
}

template <class Dot, int Vectors>
inline void strip(const Matrix& m, const Activations& a, int64_t piece, float* y, int64_t stride, bool add) {
  for (int64_t row = 0; row < a.rows; row += Dot::rows)
    with_constant<Dot::rows>(smaller(a.rows - row, Dot::rows),
                             [&](auto rows) { tile<Dot, rows.value, Vectors>(m, a, row, piece, y, stride, add); });
}

template <class Dot>
inline void multiply(const Matrix& m, const Activations& a, int64_t begin, int64_t end, float* y, int64_t stride,
                     bool add) {
  int64_t piece = begin * pieces;
  for (; piece + Dot::vectors <= end * pieces; piece += Dot::vectors)
    strip<Dot, Dot::vectors>(m, a, piece, y, stride, add);
  for (; piece < end * pieces; ++piece) strip<Dot, 1>(m, a, piece, y, stride, add);
}

// Rows as int8 steps of max |x| / 127, written by `write(vector of whole numbers from -127 to 127, where to)`.
template <class Element, class Write>
inline void quantise(const float* x, int64_t x_stride, int64_t rows, int64_t inputs, uint8_t* data, int64_t stride,
                     float* scale, Element zero, Write write) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = x + r * x_stride;
    Element* const to = reinterpret_cast<Element*>(data + r * stride);
    float most = 0;
    Vec most_of = Vec::zero();
    int64_t i = 0;
    for (; i + Vec::width <= inputs; i += Vec::width) most_of = Vec::max(most_of, Vec::abs(Vec::load(from + i)));
    float lanes[Vec::width];
    most_of.store(lanes);
    for (int k = 0; k < Vec::width; ++k) most = lanes[k] > most ? lanes[k] : most;
    for (; i < inputs; ++i) {
      const float size = from[i] < 0 ? -from[i] : from[i];
      most = size > most ? size : most;
    }
    // A row of subnormal numbers counts as zeros: the inverse of its step is no number.
    const bool empty = !(most > 1e-30f);
    const Vec inverse = Vec::set1(empty ? 0.0f : 127.0f / most), limit = Vec::set1(127.0f);
    scale[r] = empty ? 0.0f : most / 127.0f;
    const auto steps = [&](Vec v) { return Vec::round(Vec::max(Vec::zero() - limit, Vec::min(limit, v * inverse))); };
    for (i = 0; i + Vec::width <= inputs; i += Vec::width) write(steps(Vec::load(from + i)), to + i);
    if (i < inputs) {
      Element rest[Vec::width];
      write(steps(Vec::load_first(from + i, static_cast<int>(inputs - i))), rest);
      for (int64_t k = 0; i + k < inputs; ++k) to[i + k] = rest[k];
    }
    for (i = inputs; i < round_up(inputs, 4); ++i) to[i] = zero;
  }
}

// Rows as bfloat16, the last pair filled up with a zero.
inline void narrow(const float* x, int64_t x_stride, int64_t rows, int64_t inputs, uint8_t* data, int64_t stride,
                   float*) {
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* const to = reinterpret_cast<uint16_t*>(data + r * stride);
    vectors<Vec>(inputs, [&](int64_t i, int n) { Vec::load_first(x + r * x_stride + i, n).store_bf16(to + i, n); });
    if (inputs % 2) to[inputs] = 0;
  }
}

inline Vec scaled(Vec sum, const Matrix& m, int64_t output, float scale) {
  return sum * (Vec::load(m.scale + output) * Vec::set1(scale));
}

}  // namespace fastlvm::FASTLVM_ISA::product
