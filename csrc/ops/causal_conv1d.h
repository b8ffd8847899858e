// Depthwise causal convolution over time with an optional SiLU; its backward is in causal_conv1d_bwd.h.
//
// A block of channels is worked on in tiles of time. Scratch memory holds element (t, c) of a tile at t * lanes + c,
// after the W - 1 inputs before it. With lanes = V::width vectors run over channels, as suits short sequences and
// channel-last memory, and with lanes = 1 over time; the arithmetic of an element is the same. What lies in memory as
// the vectors want it is not copied.
#pragma once

#include "common/tiles.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::conv {

constexpr int64_t work_worth_sharing = 1 << 16;  // elements B·D·L
constexpr int64_t task_elements = 1 << 15;

// A batch entry, or with offsets a stretch of the only one.
struct Sequence {
  int64_t index, batch, begin, length;
};

inline Sequence sequence_of(const CausalConv1d& args, int64_t s) {
  if (!args.offsets) return {s, s, 0, args.length};
  return {s, 0, args.offsets[s], args.offsets[s + 1] - args.offsets[s]};
}

// The first sequence that ends after time t.
inline int64_t sequence_at(const CausalConv1d& args, int64_t t) {
  int64_t low = 0, high = args.batch;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    args.offsets[middle + 1] > t ? high = middle : low = middle + 1;
  }
  return low;
}

// Channels [d, d + n) of a sequence.
struct Block {
  Sequence sequence;
  int64_t d, n;
};

// `count` times of channels [d, d + n), from time t of entry i on, in an array [.., D, L].
struct Piece {
  int64_t i, d, n, t, count;
};

// Times [from, to) of a block in arrays of time.
inline Piece piece_of(const Block& block, int64_t from, int64_t to) {
  return {block.sequence.batch, block.d, block.n, block.sequence.begin + from, to - from};
}

// The same in arrays of states.
inline Piece state_of(const Block& block, int64_t from, int64_t to) {
  return {block.sequence.index, block.d, block.n, from, to - from};
}

inline int64_t start_of(const TensorView& view, const Piece& piece) {
  return offset_of(view, piece.i, piece.d) + piece.t * view.stride[2];
}

inline TileAt at_of(const TensorView& view, const Piece& piece) {
  return {start_of(view, piece), view.stride[1], view.stride[2]};
}

template <class V>
inline void read_piece(typename V::scalar* out, const TensorView& view, int64_t lanes, const Piece& piece) {
  if (lanes == 1) return read_row<V>(out, view, start_of(view, piece), view.stride[2], piece.count);
  read_tile<V>(out, view, at_of(view, piece), static_cast<int>(piece.n), piece.count);
}

template <class V>
inline void write_piece(const typename V::scalar* in, const TensorView& view, int64_t lanes, const Piece& piece) {
  if (lanes == 1) return write_row<V>(in, view, start_of(view, piece), view.stride[2], piece.count);
  write_tile<V>(in, view, at_of(view, piece), static_cast<int>(piece.n), piece.count);
}

// How vectors lie over the arrays of a call.
template <class V>
struct Layout {
  int64_t lanes;   // channels in a block
  int64_t tile;    // times in a tile
  int64_t before;  // W - 1

  explicit Layout(const CausalConv1d& args) : before(args.width - 1) {
    const int64_t length = args.offsets ? div_up(args.length, larger(1, args.batch)) : args.length;
    const int64_t over_time = args.dim * div_up(length, V::width) * (args.x.stride[2] == 1 ? 2 : 4);
    const int64_t over_channels = length * div_up(args.dim, V::width) * (args.x.stride[1] == 1 ? 2 : 3);
    lanes = over_channels < over_time ? V::width : 1;
    tile = larger(over_channels < over_time ? 32 : 512, before);
  }

  // Elements of `times` times of a block; vectors may run past the last.
  int64_t scratch(int64_t times) const { return times * lanes + V::width; }
};

// Filters of channels [first, first + count) as vectors, a block's W taps and its bias one after the other.
template <class V>
inline void read_filters(const CausalConv1d& args, const Layout<V>& layout, int64_t first, int64_t count,
                         typename V::scalar* out) {
  using T = typename V::scalar;
  TensorView weight = args.weight;  // as [1, D, W]
  weight.stride[2] = weight.stride[1], weight.stride[1] = weight.stride[0], weight.stride[0] = 0;
  for (int64_t d = first; d < first + count; d += layout.lanes, out += (args.width + 1) * V::width) {
    T* const bias = out + args.width * V::width;
    if (layout.lanes == 1) {
      for (int64_t k = 0; k < args.width; ++k)
        V::set1(element<T>(weight, d * weight.stride[1] + k * weight.stride[2])).store(out + k * V::width);
      V::set1(optional_element<T>(args.bias, d)).store(bias);
      continue;
    }
    const int64_t n = smaller(layout.lanes, first + count - d);
    read_piece<V>(out, weight, layout.lanes, {0, d, n, 0, args.width});
    V::zero().store(bias);
    if (given(args.bias)) read_row<V>(bias, args.bias, d * args.bias.stride[0], args.bias.stride[0], n);
  }
}

// Times [from, to) of a block's inputs; before time 0 is the initial state.
template <class V>
inline void read_inputs(const CausalConv1d& args, const Layout<V>& layout, const Block& block, int64_t from, int64_t to,
                        typename V::scalar* out) {
  const int64_t start = larger(from, smaller(to, 0));  // of those in x
  if (from < start && given(args.initial_state))
    read_piece<V>(out, args.initial_state, layout.lanes, state_of(block, layout.before + from, layout.before + start));
  else
    fill_zero(out, (start - from) * layout.lanes);
  if (start < to) read_piece<V>(out + (start - from) * layout.lanes, args.x, layout.lanes, piece_of(block, start, to));
}

constexpr int64_t max_fixed_taps = 4;

template <int N>
struct Taps {
  static constexpr int fixed = N;  // 0: any number
};

// A switch: GCC 12 keeps the inner loops of a chain of calls (with_constant) apart, at 10 % of their time.
template <class F>
inline void with_taps(int64_t width, F f) {
  switch (width) {
    case 1:
      return f(Taps<1>());
    case 2:
      return f(Taps<2>());
    case 3:
      return f(Taps<3>());
    case 4:
      return f(Taps<4>());
    default:
      return f(Taps<0>());
  }
}

// finish(bias + Σ_k filter_k x_{t - W + 1 + k}, v) for each vector v < count; `in` starts W - 1 times earlier, a time
// being `unit` elements.
template <class V, int N, class Finish>
inline void convolve(Taps<N>, const typename V::scalar* in, int64_t unit, const typename V::scalar* filter,
                     int64_t filter_step, int64_t width, V bias, int64_t count, Finish finish) {
  V fixed[N > 0 ? N : 1];
  for (int k = 0; k < N; ++k) fixed[k] = V::load(filter + k * filter_step);
  for (int64_t v = 0; v < count; ++v) {
    const typename V::scalar* const at = in + v * V::width;
    V sum = bias;
    if constexpr (N > 0)
      for (int k = 0; k < N; ++k) sum = V::fma(fixed[k], V::load(at + k * unit), sum);
    else
      for (int64_t k = 0; k < width; ++k) sum = V::fma(V::load(filter + k * filter_step), V::load(at + k * unit), sum);
    finish(sum, v);
  }
}

// The same where a vector is one time: the inputs before `in` are vectors one after the other, and each is read once.
template <class V, int N, class Finish>
inline void convolve_times(Taps<N>, const typename V::scalar* past, const typename V::scalar* in, int64_t step,
                           const typename V::scalar* filter, V bias, int64_t count, Finish finish) {
  V fixed[N], inputs[N];
  for (int k = 0; k < N; ++k) fixed[k] = V::load(filter + k * V::width);
  for (int k = 0; k < N - 1; ++k) inputs[k] = V::load(past + k * V::width);
  for (int64_t t = 0; t < count; ++t) {
    inputs[N - 1] = V::load(in + t * step);
    V sum = bias;
    for (int k = 0; k < N; ++k) sum = V::fma(fixed[k], inputs[k], sum);
    for (int k = 0; k < N - 1; ++k) inputs[k] = inputs[k + 1];
    finish(sum, t);
  }
}

template <class V>
class Forward {
 public:
  explicit Forward(const CausalConv1d& args)
      : args_(args), layout_(args), entries_(args.offsets ? 1 : args.batch), axis_(layout_.lanes == 1 ? 2 : 1) {
    share_ = entries_ * args.dim * args.length > work_worth_sharing;
    if (!share_) {
      channels_ = args.dim, times_ = args.length, group_ = entries_;
    } else if (layout_.lanes > 1) {
      channels_ = smaller(args.dim, 256), times_ = smaller(args.length, larger(64, task_elements / channels_));
      group_ = div_up(task_elements, channels_ * times_);
    } else {
      times_ = smaller(args.length, 8192), channels_ = smaller(args.dim, div_up(task_elements, times_));
      group_ = div_up(task_elements, channels_ * times_);
    }
    keep_states_ = given(args.final_state) && layout_.before > 0;
    in_place_ =
        computed_in_place<T>(args.x, args.x.stride[axis_]) && computed_in_place<T>(args.out, args.out.stride[axis_]);
  }

  void run() {
    if (args_.dim == 0) return;
    keep_states_of_empty_sequences();
    if (entries_ == 0 || args_.length == 0) return;
    const int64_t parts = div_up(args_.dim, channels_), spans = div_up(args_.length, times_);
    parallel(div_up(entries_, group_) * spans * parts, share_,
             [&](int64_t task) { run_task(task / (spans * parts), task / parts % spans, task % parts); });
  }

 private:
  using T = typename V::scalar;

  struct Scratch {
    T *filters, *in, *out;
  };

  void run_task(int64_t group, int64_t span, int64_t part) {
    const int64_t first = part * channels_, channels = smaller(channels_, args_.dim - first);
    const int64_t filters = div_up(channels, layout_.lanes) * (args_.width + 1) * V::width;
    const int64_t in = layout_.scratch(layout_.before + layout_.tile);
    Buffer<T> memory(filters + in + layout_.scratch(layout_.tile));
    const Scratch scratch = {memory.get(), memory + filters, memory + filters + in};
    fill_zero(scratch.in, in);
    read_filters<V>(args_, layout_, first, channels, scratch.filters);
    const int64_t begin = span * times_, end = smaller(args_.length, begin + times_);
    if (args_.offsets) {
      for (int64_t s = sequence_at(args_, begin); s < args_.batch && args_.offsets[s] < end; ++s)
        run_sequence(scratch, sequence_of(args_, s), first, channels, begin, end);
    } else {
      for (int64_t s = group * group_; s < smaller(entries_, (group + 1) * group_); ++s)
        run_sequence(scratch, sequence_of(args_, s), first, channels, begin, end);
    }
  }

  // The part of a sequence in [begin, end) of its arrays' time.
  void run_sequence(const Scratch& scratch, const Sequence& sequence, int64_t first, int64_t channels, int64_t begin,
                    int64_t end) {
    const int64_t to = smaller(sequence.length, end - sequence.begin);
    for (int64_t t = larger(0, begin - sequence.begin); t < to; t += layout_.tile) {
      const T* filter = scratch.filters;
      for (int64_t d = first; d < first + channels; d += layout_.lanes, filter += (args_.width + 1) * V::width)
        run_tile(scratch, filter, {sequence, d, smaller(layout_.lanes, first + channels - d)}, t,
                 smaller(to, t + layout_.tile));
    }
  }

  void run_tile(const Scratch& scratch, const T* filter, const Block& block, int64_t from, int64_t to) {
    if (layout_.lanes > 1 && args_.width <= max_fixed_taps)
      run_vectors_of_channels(scratch, filter, block, from, to);
    else if (layout_.lanes == 1 && in_place_)
      run_row(scratch, filter, block, from, to);
    else
      run_copied(scratch, filter, block, from, to);
    if (to == block.sequence.length && keep_states_) keep_final_state(scratch, block, from, to);
  }

  // The last W - 1 inputs; scratch.in may hold them, after a tile that was not worked on in place.
  void keep_final_state(const Scratch& scratch, const Block& block, int64_t from, int64_t to) {
    const bool copied = !in_place_ || block.n < layout_.lanes;
    T* const rows = copied ? scratch.in + (to - from) * layout_.lanes : scratch.in;
    if (!copied) read_inputs<V>(args_, layout_, block, to - layout_.before, to, rows);
    write_piece<V>(rows, args_.final_state, layout_.lanes, state_of(block, 0, layout_.before));
  }

  void run_vectors_of_channels(const Scratch& scratch, const T* filter, const Block& block, int64_t from, int64_t to) {
    const bool in_place = in_place_ && block.n == layout_.lanes;
    const Piece x = piece_of(block, from, to);
    T* const copied = scratch.in + layout_.before * layout_.lanes;
    read_inputs<V>(args_, layout_, block, from - layout_.before, from, scratch.in);
    if (!in_place) read_piece<V>(copied, args_.x, layout_.lanes, x);
    const T* const in = in_place ? pointer<const T>(args_.x, start_of(args_.x, x)) : copied;
    T* const out = in_place ? pointer<T>(args_.out, start_of(args_.out, x)) : scratch.out;
    const int64_t in_step = in_place ? args_.x.stride[2] : V::width, step = in_place ? args_.out.stride[2] : V::width;
    with_taps(args_.width, [&](auto taps) {
      if constexpr (taps.fixed > 0) {
        const V bias = V::load(filter + taps.fixed * V::width);
        if (args_.silu)
          convolve_times<V>(taps, scratch.in, in, in_step, filter, bias, to - from,
                            [&](V sum, int64_t t) { silu(sum).store(out + t * step); });
        else
          convolve_times<V>(taps, scratch.in, in, in_step, filter, bias, to - from,
                            [&](V sum, int64_t t) { sum.store(out + t * step); });
      }
    });
    if (!in_place) write_piece<V>(scratch.out, args_.out, layout_.lanes, x);
  }

  // Whole vectors that have all their inputs in x are worked on in place.
  void run_row(const Scratch& scratch, const T* filter, const Block& block, int64_t from, int64_t to) {
    const int64_t head = smaller(to, larger(from, round_up(layout_.before, V::width)));
    const int64_t tail = head + (to - head) / V::width * V::width;
    if (from < head) run_copied(scratch, filter, block, from, head);
    if (head < tail) {
      const Piece whole = piece_of(block, head, tail);
      apply(filter, pointer<const T>(args_.x, start_of(args_.x, whole) - layout_.before),
            pointer<T>(args_.out, start_of(args_.out, whole)), (tail - head) / V::width);
    }
    if (tail < to) run_copied(scratch, filter, block, tail, to);
  }

  void run_copied(const Scratch& scratch, const T* filter, const Block& block, int64_t from, int64_t to) {
    read_inputs<V>(args_, layout_, block, from - layout_.before, to, scratch.in);
    apply(filter, scratch.in, scratch.out, div_up((to - from) * layout_.lanes, V::width));
    write_piece<V>(scratch.out, args_.out, layout_.lanes, piece_of(block, from, to));
  }

  void apply(const T* filter, const T* in, T* out, int64_t count) const {
    const V bias = V::load(filter + args_.width * V::width);
    with_taps(args_.width, [&](auto taps) {
      if (args_.silu)
        convolve<V>(taps, in, layout_.lanes, filter, V::width, args_.width, bias, count,
                    [&](V sum, int64_t v) { silu(sum).store(out + v * V::width); });
      else
        convolve<V>(taps, in, layout_.lanes, filter, V::width, args_.width, bias, count,
                    [&](V sum, int64_t v) { sum.store(out + v * V::width); });
    });
  }

  // They have no tile.
  void keep_states_of_empty_sequences() {
    if (!keep_states_) return;
    Buffer<T> rows(layout_.scratch(layout_.before));
    for (int64_t s = 0; s < args_.batch; ++s) {
      const Sequence sequence = sequence_of(args_, s);
      for (int64_t d = 0; sequence.length == 0 && d < args_.dim; d += layout_.lanes) {
        const Block block = {sequence, d, smaller(layout_.lanes, args_.dim - d)};
        read_inputs<V>(args_, layout_, block, -layout_.before, 0, rows.get());
        write_piece<V>(rows.get(), args_.final_state, layout_.lanes, state_of(block, 0, layout_.before));
      }
    }
  }

  const CausalConv1d& args_;
  Layout<V> layout_;
  int64_t entries_;                   // of arrays of time
  int axis_;                          // of x that vectors run over
  int64_t channels_, times_, group_;  // of a task: channels, times and entries
  bool share_, in_place_, keep_states_;
};

}  // namespace fastlvm::FASTLVM_ISA::conv
