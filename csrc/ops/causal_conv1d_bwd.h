// The backward of the causal convolution. A task is a few channels with all their sequences: sums over batch and time
// are taken in float64, in an order that follows from the shapes alone.
#pragma once

#include "ops/causal_conv1d.h"

namespace fastlvm::FASTLVM_ISA::conv {

template <class V>
class Backward {
 public:
  explicit Backward(const CausalConv1dBwd& args) : args_(args), in_(args.forward), layout_(in_) {}

  void run() {
    const int64_t channels = layout_.lanes == 1 ? 8 : 64;
    const int64_t elements = (in_.offsets ? 1 : in_.batch) * in_.dim * in_.length;
    parallel(div_up(in_.dim, channels), elements > work_worth_sharing / 4,
             [&](int64_t task) { run_task(task * channels, smaller(channels, in_.dim - task * channels)); });
  }

 private:
  using T = typename V::scalar;

  struct Scratch {
    T *x, *g, *drow;  // [W - 1 + tile], [W - 1 + tile], [tile] of a block
  };

  void run_task(int64_t first, int64_t channels) {
    const int64_t row = (in_.width + 1) * V::width, size = layout_.scratch(layout_.before + layout_.tile);
    const int64_t blocks = div_up(channels, layout_.lanes);
    Buffer<T> memory(blocks * row + 3 * size, T(0));
    Buffer<double> sums(blocks * row, 0.0);  // of a block's W taps and its bias, as vectors
    T* const scratch_memory = memory + blocks * row;
    const Scratch scratch = {scratch_memory, scratch_memory + size, scratch_memory + 2 * size};
    read_filters<V>(in_, layout_, first, channels, memory.get());
    for (int64_t s = 0; s < in_.batch; ++s) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t d = first + b * layout_.lanes;
        run_block(scratch, memory + b * row, sums + b * row,
                  {sequence_of(in_, s), d, smaller(layout_.lanes, first + channels - d)});
      }
    }
    for (int64_t c = 0; c < channels; ++c) write_sums(sums + c / layout_.lanes * row, first + c, c % layout_.lanes);
  }

  // Row i of a block is x_{i - W + 1}; its gradient is Σ_k filter_k g_{i - k}, g being the gradient before the
  // activation, and the last W - 1 rows are the final state.
  void run_block(const Scratch& scratch, const T* filter, double* sums, const Block& block) {
    const int64_t lanes = layout_.lanes, before = layout_.before, length = block.sequence.length;
    const int64_t rows = length + before;
    fill_zero(scratch.g, before * lanes);
    for (int64_t i = 0; i < rows; i += layout_.tile) {
      const int64_t end = smaller(rows, i + layout_.tile), live = larger(0, smaller(end, length) - i);
      T* const g = scratch.g + before * lanes;
      if (live > 0) read_gradient(scratch, filter, block, i, live);
      fill_zero(g + live * lanes, (end - i - live) * lanes + V::width);
      with_taps(in_.width, [&](auto taps) {
        if (live > 0) add_sums(taps, scratch.x, g, live, sums);
        convolve<V>(taps, scratch.g, lanes, filter + before * V::width, -V::width, in_.width, V::zero(),
                    div_up((end - i) * lanes, V::width),
                    [&](V sum, int64_t v) { sum.store(scratch.drow + v * V::width); });
      });
      write_rows(scratch, block, i, end);
      if (end < rows) copy(scratch.g, scratch.g + (end - i) * lanes, before * lanes);
    }
  }

  // Times [t, t + count) of x, after the W - 1 before, and of g.
  void read_gradient(const Scratch& scratch, const T* filter, const Block& block, int64_t t, int64_t count) {
    const int64_t lanes = layout_.lanes, before = layout_.before;
    T* const g = scratch.g + before * lanes;
    read_inputs<V>(in_, layout_, block, t - before, t + count, scratch.x);
    fill_zero(scratch.x + (before + count) * lanes, V::width);
    read_piece<V>(g, args_.grad_out, lanes, piece_of(block, t, t + count));
    if (!in_.silu) return;
    const V bias = V::load(filter + in_.width * V::width);
    with_taps(in_.width, [&](auto taps) {
      convolve<V>(taps, scratch.x, lanes, filter, V::width, in_.width, bias, div_up(count * lanes, V::width),
                  [&](V sum, int64_t v) { (V::load(g + v * V::width) * silu_slope(sum)).store(g + v * V::width); });
    });
  }

  // sums[k] += Σ g_t x_{t - W + 1 + k}, and Σ g_t for the bias, each lane for itself.
  template <int N>
  void add_sums(Taps<N>, const T* x, const T* g, int64_t count, double* sums) const {
    const int64_t elements = round_up(count * layout_.lanes, V::width);
    if constexpr (N > 0) {
      typename V::Wide sum[N + 1];
      for (int k = 0; k <= N; ++k) sum[k] = V::Wide::load(sums + k * V::width);
      for (int64_t i = 0; i < elements; i += V::width) {
        const auto grad = V::Wide::from(V::load(g + i));
        for (int k = 0; k < N; ++k)
          sum[k] = V::Wide::fma(grad, V::Wide::from(V::load(x + i + k * layout_.lanes)), sum[k]);
        sum[N] = sum[N] + grad;
      }
      for (int k = 0; k <= N; ++k) sum[k].store(sums + k * V::width);
    } else {
      for (int64_t k = 0; k <= in_.width; ++k) {
        auto sum = V::Wide::load(sums + k * V::width);
        for (int64_t i = 0; i < elements; i += V::width) {
          const auto grad = V::Wide::from(V::load(g + i));
          sum = k < in_.width ? V::Wide::fma(grad, V::Wide::from(V::load(x + i + k * layout_.lanes)), sum) : sum + grad;
        }
        sum.store(sums + k * V::width);
      }
    }
  }

  // Gradients of rows [begin, end), which scratch.drow holds but for what comes through the final state.
  void write_rows(const Scratch& scratch, const Block& block, int64_t begin, int64_t end) {
    const int64_t lanes = layout_.lanes, before = layout_.before, length = block.sequence.length;
    if (end > length && given(args_.grad_final_state)) {
      const int64_t from = larger(begin, length);
      read_piece<V>(scratch.x, args_.grad_final_state, lanes, state_of(block, from - length, end - length));
      T* const to = scratch.drow + (from - begin) * lanes;
      for (int64_t j = 0; j < (end - from) * lanes; ++j) to[j] += scratch.x[j];
    }
    const int64_t split = larger(begin, smaller(end, before));
    if (begin < split && given(args_.dinitial_state))
      write_piece<V>(scratch.drow, args_.dinitial_state, lanes, state_of(block, begin, split));
    if (split < end && given(args_.dx))
      write_piece<V>(scratch.drow + (split - begin) * lanes, args_.dx, lanes,
                     piece_of(block, split - before, end - before));
  }

  void write_sums(const double* sums, int64_t d, int64_t lane) const {
    const auto total = [&](int64_t k) {
      if (layout_.lanes > 1) return sums[k * V::width + lane];
      double sum = 0;
      for (int c = 0; c < V::width; ++c) sum += sums[k * V::width + c];
      return sum;
    };
    if (given(args_.dweight))
      for (int64_t k = 0; k < in_.width; ++k)
        static_cast<T*>(args_.dweight.data)[d * in_.width + k] = static_cast<T>(total(k));
    if (given(args_.dbias)) static_cast<T*>(args_.dbias.data)[d] = static_cast<T>(total(in_.width));
  }

  const CausalConv1dBwd& args_;
  const CausalConv1d& in_;
  Layout<V> layout_;
};

}  // namespace fastlvm::FASTLVM_ISA::conv
