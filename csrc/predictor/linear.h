// y = x Wᵀ for the few rows of a prediction: float32, one output per row of W, the weights read once in order.
//
// A tile of rows × outputs stays in registers while vectors run over the inputs. A sum's order depends on the number of
// inputs alone, never on the number of rows or threads.
#pragma once

#include "common/rows.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::linear {

constexpr int64_t work_worth_sharing = 1 << 20;  // multiply-adds: some 40 µs of one core
constexpr int64_t outputs_per_task = 32;
constexpr int max_rows = 5;                             // of a tile: one context of the default length
constexpr int tile_outputs = Vec::width >= 16 ? 4 : 2;  // accumulators, weights and an input fit the registers

// sums[r][o] += x_r · w_o over one vector of inputs, which `load` reads. The same place of the tile that comes next is
// fetched: rows are too short for the processor to foresee.
template <int Rows, int Outputs, class Load>
FASTLVM_INLINE void step(Vec (&sums)[Rows][Outputs], const float* x, const float* w, int64_t inputs, Load load) {
  Vec weights[Outputs];
  FASTLVM_UNROLL
  for (int o = 0; o < Outputs; ++o) {
    weights[o] = load(w + o * inputs);
    if constexpr (Vec::width >= 8) FASTLVM_PREFETCH(w + (Outputs + o) * inputs);  // narrower: many to a line
  }
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const Vec in = load(x + r * inputs);
    FASTLVM_UNROLL
    for (int o = 0; o < Outputs; ++o) sums[r][o] = Vec::fma(in, weights[o], sums[r][o]);
  }
}

template <int Rows, int Outputs>
inline void tile(const Linear& args, int64_t row, int64_t output) {
  const int64_t inputs = args.inputs;
  const float* const x = args.x + row * inputs;
  const float* const w = args.weight + output * inputs;
  Vec sums[Rows][Outputs];
  FASTLVM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FASTLVM_UNROLL
    for (int o = 0; o < Outputs; ++o) sums[r][o] = Vec::zero();
  }
  int64_t i = 0;
  for (; i + Vec::width <= inputs; i += Vec::width)
    step(sums, x + i, w + i, inputs, [](const float* p) { return Vec::load(p); });
  if (const int left = static_cast<int>(inputs - i); left > 0)
    step(sums, x + i, w + i, inputs, [left](const float* p) { return Vec::load_first(p, left); });
  for (int r = 0; r < Rows; ++r)
    for (int o = 0; o < Outputs; ++o) args.y[(row + r) * args.outputs + output + o] = Vec::sum(sums[r][o]);
}

template <int Rows>
inline void strip(const Linear& args, int64_t row, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + tile_outputs <= end; output += tile_outputs) tile<Rows, tile_outputs>(args, row, output);
  for (; output < end; ++output) tile<Rows, 1>(args, row, output);
}

inline void forward(const Linear& args) {
  const bool share = args.rows * args.inputs * args.outputs > work_worth_sharing;
  parallel(div_up(args.outputs, outputs_per_task), share, [&](int64_t task) {
    const int64_t begin = task * outputs_per_task, end = smaller(begin + outputs_per_task, args.outputs);
    for (int64_t row = 0; row < args.rows; row += max_rows) {
      with_constant<max_rows>(smaller(args.rows - row, max_rows),
                              [&](auto rows) { strip<rows.value>(args, row, begin, end); });
    }
  });
}

}  // namespace fastlvm::FASTLVM_ISA::linear
