// Depthwise causal convolution over time with an optional SiLU, forward and backward.
//
// A task is a channel (forward: of one batch entry). Its inputs are laid out as one row, the W - 1 inputs before x
// first, and vectors run over time. Sums over batch and time are taken in one fixed order per channel, in double.
#pragma once

#include "common/rows.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::conv {

constexpr int64_t work_worth_sharing = 1 << 16;  // elements B·D·L

template <class V>
class Channel {
 public:
  using T = typename V::scalar;

  explicit Channel(const CausalConv1d& args)
      : args_(args), before_(args.width - 1), row_(before_ + args.length), weight_(args.width) {}

  void read(int64_t b, int64_t d) {
    if (given(args_.initial_state))
      read_row<V>(row_.get(), args_.initial_state, offset_of(args_.initial_state, b, d), args_.initial_state.stride[2],
                  before_);
    else
      for (int64_t i = 0; i < before_; ++i) row_[i] = T(0);
    read_row<V>(row_ + before_, args_.x, offset_of(args_.x, b, d), args_.x.stride[2], args_.length);
    read_row<V>(weight_.get(), args_.weight, d * args_.weight.stride[0], args_.weight.stride[1], args_.width);
    bias_ = given(args_.bias) ? element<T>(args_.bias, d * args_.bias.stride[0]) : T(0);
  }

  // The result before the activation at [t, t + n).
  V apply(int64_t t, int n) const {
    V sum = V::set1(bias_);
    for (int64_t k = 0; k < args_.width; ++k) sum = V::fma(V::set1(weight_[k]), V::load_first(row_ + t + k, n), sum);
    return sum;
  }

  T* row() const { return row_.get(); }  // [W - 1 + L]: x_t is row[W - 1 + t]
  T weight(int64_t k) const { return weight_[k]; }

 private:
  const CausalConv1d& args_;
  int64_t before_;
  Buffer<T> row_, weight_;
  T bias_ = T(0);
};

template <class V>
inline void forward(const CausalConv1d& args) {
  using T = typename V::scalar;
  const int64_t rows = args.batch * args.dim;
  constexpr int64_t rows_per_task = 32;
  parallel(div_up(rows, rows_per_task), rows * args.length > work_worth_sharing, [&](int64_t task) {
    Channel<V> channel(args);
    Buffer<T> out(args.length);
    for (int64_t r = task * rows_per_task; r < smaller(rows, (task + 1) * rows_per_task); ++r) {
      const int64_t b = r / args.dim, d = r % args.dim;
      channel.read(b, d);
      for (int64_t t = 0; t < args.length; t += V::width) {
        const int n = static_cast<int>(smaller(V::width, args.length - t));
        const V sum = channel.apply(t, n);
        (args.silu ? silu(sum) : sum).store_first(out + t, n);
      }
      write_row(out.get(), args.out, offset_of(args.out, b, d), args.out.stride[2], args.length);
      if (given(args.final_state))
        write_row(channel.row() + args.length, args.final_state, offset_of(args.final_state, b, d),
                  args.final_state.stride[2], args.width - 1);
    }
  });
}

// g: gradient before the activation [L]; drow: gradient of the channel's row [W - 1 + L].
template <class V>
inline void backward_row(const CausalConv1dBwd& args, const Channel<V>& channel, int64_t b, int64_t d,
                         typename V::scalar* g, typename V::scalar* drow) {
  using T = typename V::scalar;
  const CausalConv1d& in = args.forward;
  const int64_t L = in.length, before = in.width - 1;
  read_row<V>(g, args.grad_out, offset_of(args.grad_out, b, d), args.grad_out.stride[2], L);
  if (in.silu) {
    for (int64_t t = 0; t < L; t += V::width) {
      const int n = static_cast<int>(smaller(V::width, L - t));
      (V::load_first(g + t, n) * silu_slope(channel.apply(t, n))).store_first(g + t, n);
    }
  }
  for (int64_t i = 0; i < L; ++i) drow[i] = T(0);
  read_row<V>(drow + L, args.grad_final_state, offset_of(args.grad_final_state, b, d), args.grad_final_state.stride[2],
              before);
  for (int64_t k = 0; k < in.width; ++k) {
    const V weight = V::set1(channel.weight(k));
    for (int64_t t = 0; t < L; t += V::width) {
      const int n = static_cast<int>(smaller(V::width, L - t));
      V::fma(weight, V::load_first(g + t, n), V::load_first(drow + t + k, n)).store_first(drow + t + k, n);
    }
  }
}

template <class V>
inline void backward(const CausalConv1dBwd& args) {
  using T = typename V::scalar;
  const CausalConv1d& in = args.forward;
  const int64_t L = in.length, W = in.width;
  constexpr int64_t channels_per_task = 8;
  parallel(div_up(in.dim, channels_per_task), in.batch * in.dim * L > work_worth_sharing / 4, [&](int64_t task) {
    Channel<V> channel(in);
    Buffer<T> g(L), drow(L + W - 1);
    Buffer<double> dweight(W);
    for (int64_t d = task * channels_per_task; d < smaller(in.dim, (task + 1) * channels_per_task); ++d) {
      double dbias = 0;
      for (int64_t k = 0; k < W; ++k) dweight[k] = 0;
      for (int64_t b = 0; b < in.batch; ++b) {
        channel.read(b, d);
        backward_row(args, channel, b, d, g.get(), drow.get());
        for (int64_t t = 0; t < L; ++t) dbias += static_cast<double>(g[t]);
        for (int64_t k = 0; k < W; ++k) {
          double sum = 0;
          for (int64_t t = 0; t < L; ++t) sum += static_cast<double>(g[t]) * static_cast<double>(channel.row()[t + k]);
          dweight[k] += sum;
        }
        const int64_t row = b * in.dim + d;
        if (given(args.dx)) write_row(drow + (W - 1), args.dx, row * L, 1, L);
        if (given(args.dinitial_state)) write_row(drow.get(), args.dinitial_state, row * (W - 1), 1, W - 1);
      }
      if (given(args.dweight))
        for (int64_t k = 0; k < W; ++k) static_cast<T*>(args.dweight.data)[d * W + k] = static_cast<T>(dweight[k]);
      if (given(args.dbias)) static_cast<T*>(args.dbias.data)[d] = static_cast<T>(dbias);
    }
  });
}

}  // namespace fastlvm::FASTLVM_ISA::conv
