// Products of InfoNCE where queries and keys are bfloat16 and the processor multiplies tiles of such numbers (AMX; dot
// products of pairs, AVX512-BF16, gain nothing over float32 here). Sums are float32; gradients of logits are rounded to
// bfloat16 before they meet queries and keys.
//
// Keys are read as they lie for the logits, and packed in pairs of rows for the gradient of the queries; which wants
// the gradients of the logits with the keys side by side, so that they are turned chunk by chunk, in the place of the
// logits.
#pragma once

#include "common/rows.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::nce {

template <class V, bool = sizeof(typename V::scalar) == sizeof(float)>
class Halves {
 public:
  static constexpr int64_t lanes = block_outputs;

  static bool usable(const InfoNce& in) {
    const auto rows_of_halves = [](const TensorView& view) { return view.dtype == DType::bf16 && view.stride[1] == 1; };
    return in.bf16 && in.dim % lanes == 0 && in.dim > 0 && rows_of_halves(in.queries) && rows_of_halves(in.keys);
  }

  // block: most queries at once; chunk: most keys; to_keys: whether their gradient is wanted.
  Halves(const InfoNce& in, int64_t block, int64_t chunk, int64_t seats, bool to_keys)
      : in_(in),
        product_(usable(in) ? in.bf16 : nullptr),
        to_keys_(to_keys),
        block_(block),
        pairs_(div_up(chunk, 2)),
        queries_(used() ? block * in.dim / 2 : 0),
        joined_queries_(used() && to_keys ? block * in.dim / 2 : 0),
        keys_(used() ? seats * pairs_ * in.dim : 0),
        turned_(used() ? seats * 2 * pairs_ * block : 0),
        zeros_(used() ? larger(block, in.dim) : 0, 0.0f) {}

  bool used() const { return product_ != nullptr; }

  // Places [begin, end) of a block that has `rows` queries from `first` on; what is beyond them is zero.
  void read_queries(int64_t begin, int64_t end, int64_t first, int64_t rows) const {
    for (int64_t i = begin; i < end; ++i) {
      uint32_t* to = queries_ + (i / lanes * in_.dim / 2) * lanes + i % lanes;
      for (int64_t d = 0; d < in_.dim; d += 2, to += lanes) {
        *to = 0;
        if (i < rows) memcpy(to, row_of(in_.queries, first + i) + d, sizeof *to);
      }
    }
    if (!to_keys_) return;
    for (int64_t i = begin; i < smaller(end, rows); i += 2)
      join_rows(joined_queries_ + i / 2 * lanes, div_up(rows, 2), in_.queries, first + i, rows - i, 0, in_.dim);
  }

  // Logits [count, pitch] of the keys from `key` on and of `rows` queries.
  void score(float* out, int64_t pitch, int64_t key, int64_t count, int64_t rows) const {
    const Activations keys = {count, in_.keys.stride[0] * 2, reinterpret_cast<const uint8_t*>(row_of(in_.keys, key)),
                              nullptr, 0};
    multiply(queries_.get(), in_.dim, rows, keys, out, pitch, false);
    const V scale = V::set1(static_cast<float>(in_.scale * log2e));
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < rows; i += V::width) (scale * V::load(out + j * pitch + i)).store(out + j * pitch + i);
  }

  // dkeys [count, D] (+)= gradients of their logits [count, pitch] · queries
  void add_to_keys(float* dkeys, const float* dlogits, int64_t pitch, int64_t count, int64_t rows, bool keep,
                   int64_t seat) const {
    uint16_t* const rounded = turned_ + seat * 2 * pairs_ * block_;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < rows; i += V::width)
        V::load(dlogits + j * pitch + i).store_bf16(rounded + j * block_ + i, V::width);
    const Activations weights = {count, block_ * 2, reinterpret_cast<const uint8_t*>(rounded), nullptr, 0};
    multiply(joined_queries_.get(), rows, in_.dim, weights, dkeys, in_.dim, keep);
  }

  // Gradients of logits [count, pitch] become [queries, count] of bfloat16, rows of whole pairs, in their place.
  void turn(float* dlogits, int64_t pitch, int64_t count, int64_t rows, int64_t seat) const {
    constexpr int W = V::width;
    const int64_t length = round_up(count, 2);
    uint16_t* const to = turned_ + seat * 2 * pairs_ * block_;
    for (int64_t i = 0; i < rows; i += W)
      for (int64_t j = 0; j < length; j += W) {
        V tile[W];
        for (int r = 0; r < W; ++r) tile[r] = j + r < count ? V::load(dlogits + (j + r) * pitch + i) : V::zero();
        V::transpose(tile);
        const int n = static_cast<int>(smaller(W, length - j));
        for (int r = 0; r < W; ++r) tile[r].store_bf16(to + (i + r) * length + j, n);
      }
    memcpy(dlogits, to, static_cast<size_t>(round_up(rows, W) * length) * sizeof *to);
  }

  // Columns [column, column + columns) of dqueries [rows, D] (+)= what `turn` left of a chunk · its keys
  void add_to_queries(float* dqueries, const float* turned, int64_t key, int64_t count, int64_t rows, int64_t column,
                      int64_t columns, bool keep, int64_t seat) const {
    uint32_t* const keys = keys_ + seat * pairs_ * in_.dim;
    for (int64_t j = 0; j < count; j += 2)
      join_rows(keys + j / 2 * lanes, div_up(count, 2), in_.keys, key + j, count - j, column, columns);
    const Activations weights = {rows, round_up(count, 2) * 2, reinterpret_cast<const uint8_t*>(turned), nullptr, 0};
    multiply(keys, count, columns, weights, dqueries + column, in_.dim, keep);
  }

 private:
  static const uint16_t* row_of(const TensorView& view, int64_t row) {
    return static_cast<const uint16_t*>(view.data) + row * view.stride[0];
  }

  // Columns of rows `row` and `row + 1`, of zeros where but one is left, as a group of out [columns / 16, groups, 16].
  static void join_rows(uint32_t* out, int64_t groups, const TensorView& view, int64_t row, int64_t left,
                        int64_t column, int64_t columns) {
    const uint16_t* const first = row_of(view, row) + column;
    const uint16_t* const second = first + view.stride[0];
    for (int64_t c = 0; c < columns; c += lanes, out += groups * lanes)
      if (left > 1)
        for (int64_t i = 0; i < lanes; ++i) out[i] = first[c + i] | static_cast<uint32_t>(second[c + i]) << 16;
      else
        for (int64_t i = 0; i < lanes; ++i) out[i] = first[c + i];
  }

  // y [rows, outputs] (+)= rows [rows, inputs] · weights [outputs / 16, inputs / 2, 16]
  void multiply(const uint32_t* weights, int64_t inputs, int64_t outputs, const Activations& rows, float* y,
                int64_t pitch, bool add) const {
    Matrix matrix{};
    matrix.precision = Precision::bf16, matrix.inputs = inputs, matrix.outputs = outputs;
    matrix.weight = reinterpret_cast<const uint8_t*>(weights), matrix.bias = zeros_.get();
    product_->multiply(matrix, rows, 0, div_up(outputs, lanes), y, pitch, add);
  }

  const InfoNce& in_;
  const Product* const product_;
  const bool to_keys_;
  const int64_t block_, pairs_;      // of a chunk
  Buffer<uint32_t> queries_;         // [block / 16, D / 2, 16]: pairs along D
  Buffer<uint32_t> joined_queries_;  // [D / 16, pairs of the block, 16]: pairs of queries
  Buffer<uint32_t> keys_;            // [seats, D / 16, pairs, 16]: pairs of keys
  Buffer<uint16_t> turned_;          // [seats, block · chunk]
  Buffer<float> zeros_;              // no bias
};

// Sums in float64 have no such products.
template <class V>
class Halves<V, false> {
 public:
  template <class... Args>
  explicit Halves(const Args&...) {}
  static constexpr bool usable(const InfoNce&) { return false; }
  static constexpr bool used() { return false; }
  template <class... Args>
  void read_queries(const Args&...) const {}
  template <class... Args>
  void score(const Args&...) const {}
  template <class... Args>
  void add_to_keys(const Args&...) const {}
  template <class... Args>
  void turn(const Args&...) const {}
  template <class... Args>
  void add_to_queries(const Args&...) const {}
};

}  // namespace fastlvm::FASTLVM_ISA::nce
