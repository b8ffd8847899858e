// One token of the causal convolution, in place on the last inputs. A panel of channels at a time: sums channel by
// channel for the widths that are common, else vectors over channels, one tap after the other.
#pragma once

#include "ops/step.h"

namespace fastlvm::FASTLVM_ISA::conv_one {

using namespace one_token;

constexpr int64_t work_worth_sharing = 1 << 15;  // channels b·D
constexpr int64_t channels = 256;                // in a panel

// y += weight · (the last inputs, x)
template <class V>
inline void sum_taps(const CausalConv1dStep& args, int64_t slot, int64_t first, int64_t count,
                     const typename V::scalar* x, typename V::scalar* y) {
  typename V::scalar taps[channels], weight[channels];
  const int64_t before = args.width - 1;
  for (int64_t k = 0; k < args.width; ++k) {
    read_row<V>(weight, args.weight, offset_of(args.weight, first, k), args.weight.stride[0], count);
    if (k < before) {
      const int64_t column = args.length - before + k;
      read_row<V>(taps, args.state, offset_of(args.state, slot, first) + column * args.state.stride[2],
                  args.state.stride[1], count);
    }
    const auto* const tap = k < before ? taps : x;
    vectors<V>(count, [&](int64_t c, int n) {
      V::fma(V::load_first(weight + c, n), V::load_first(tap + c, n), V::load_first(y + c, n)).store_first(y + c, n);
    });
  }
}

// Drops the oldest input of every channel and appends x.
template <class V, class Element>
inline void push(const CausalConv1dStep& args, Element* inputs, int64_t slot, int64_t first, int64_t count,
                 const typename V::scalar* x) {
  const TensorView& state = args.state;
  const int64_t along = state.stride[2];
  for (int64_t c = 0; c < count; ++c) {
    Element* const row = inputs + offset_of(state, slot, first + c);
    for (int64_t j = 1; j < args.length; ++j) row[(j - 1) * along] = row[j * along];
  }
  write_row<V>(x, state, offset_of(state, slot, first) + (args.length - 1) * along, state.stride[1], count);
}

// Both at once, for a state of W - 1 inputs and rows that are contiguous and of the type computed in.
template <class T, int W>
inline void sum_and_push(const CausalConv1dStep& args, int64_t slot, int64_t first, int64_t count, const T* x, T* y) {
  const T* weight = pointer<const T>(args.weight, first * args.weight.stride[0]);
  T* row = pointer<T>(args.state, offset_of(args.state, slot, first));
  for (int64_t c = 0; c < count; ++c, weight += args.weight.stride[0], row += args.state.stride[1]) {
    T sum = y[c];
    for (int k = 0; k < W - 1; ++k) sum += weight[k] * row[k];
    y[c] = sum + weight[W - 1] * x[c];
    for (int k = 0; k < W - 2; ++k) row[k] = row[k + 1];
    row[W - 2] = x[c];
  }
}

template <class V>
inline void advance_panel(const CausalConv1dStep& args, int64_t i, int64_t slot, int64_t first, int64_t count) {
  using T = typename V::scalar;
  T x[channels], y[channels];
  const auto write = [&] { write_row<V>(y, args.out, offset_of(args.out, i, first), args.out.stride[1], count); };
  if (slot < 0) {
    fill_zero(y, count);
    return write();
  }
  read_row<V>(x, args.x, offset_of(args.x, i, first), args.x.stride[1], count);
  read_row<V>(y, args.bias, first * args.bias.stride[0], args.bias.stride[0], count);  // zeros without a bias
  const bool plain = args.length == args.width - 1 && computed_in_place<T>(args.state, args.state.stride[2]) &&
                     computed_in_place<T>(args.weight, args.weight.stride[1]);
  if (plain && args.width == 2) {
    sum_and_push<T, 2>(args, slot, first, count, x, y);
  } else if (plain && args.width == 3) {
    sum_and_push<T, 3>(args, slot, first, count, x, y);
  } else if (plain && args.width == 4) {
    sum_and_push<T, 4>(args, slot, first, count, x, y);
  } else {
    sum_taps<V>(args, slot, first, count, x, y);
    if (args.length > 0)
      with_format<V>(args.state, [&](auto, auto* inputs) { push<V>(args, inputs, slot, first, count, x); });
  }
  if (args.silu) vectors<V>(count, [&](int64_t c, int n) { silu(V::load_first(y + c, n)).store_first(y + c, n); });
  write();
}

template <class V>
inline void forward(const CausalConv1dStep& args) {
  const int64_t panels = div_up(args.dim, channels);
  parallel(args.batch * panels, args.batch * args.dim > work_worth_sharing, [&](int64_t task) {
    const int64_t i = task / panels, first = task % panels * channels;
    advance_panel<V>(args, i, slot_of(args.indices, i), first, smaller(channels, args.dim - first));
  });
}

}  // namespace fastlvm::FASTLVM_ISA::conv_one
