// What the forward and the backward of the selective scan share: how a call is cut into tasks, and a task's inputs as
// the inner loops want them. ssm_scan.h describes the layout.
#pragma once

#include "common/tiles.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::ssm {

constexpr int64_t work_worth_sharing = 1 << 17;  // elements B·D·N·L: some 20 µs of one core

inline int64_t common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y) {
    const int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

inline bool per_channel(const TensorView& projection) { return projection.rank == 2; }  // [D, N], else [B, G, N, L]

inline int64_t groups_of(const TensorView& projection) { return per_channel(projection) ? 1 : projection.shape[1]; }

// A sequence: where it lies in the arrays of time, and how long it is.
struct Sequence {
  int64_t entry, begin, length;
};

inline Sequence sequence_of(const SsmScan& args, int64_t b) {
  if (!args.offsets) return {b, 0, args.length};
  return {0, args.offsets[b], args.offsets[b + 1] - args.offsets[b]};
}

// Steps [begin, begin + length) of a sequence.
struct Chunk {
  Sequence at;
  int64_t begin, length;
};

inline int64_t longest_sequence(const SsmScan& args) {
  if (!args.offsets) return args.length;
  int64_t longest = 0;
  for (int64_t b = 0; b < args.batch; ++b) longest = larger(longest, sequence_of(args, b).length);
  return longest;
}

// Batch entries of the arrays of time, steps of all sequences, and the place of a sequence's first one among them.
inline int64_t entries_of(const SsmScan& args) { return args.offsets ? 1 : args.batch; }
inline int64_t all_times(const SsmScan& args) { return entries_of(args) * args.length; }
inline int64_t first_time(const SsmScan& args, Sequence at) { return at.begin + at.entry * args.length; }

// The row of the states before a chunk of checkpoint_steps steps.
inline int64_t checkpoint_row(const SsmScan& args, int64_t b, const Chunk& chunk) {
  const int64_t before =
      args.offsets ? chunk.at.begin / checkpoint_steps + b : b * div_up(args.length, checkpoint_steps);
  return before + chunk.begin / checkpoint_steps;
}

// How one call is cut into tasks.
struct Cut {
  int64_t groups, channels;        // groups of channels that share both B and C, channels in each
  int64_t slice, slices;           // channels in a slice (whole blocks but for the last), slices in a group
  int64_t sequences, ranges;       // sequences in a range, ranges
  int64_t states = 0, shares = 1;  // states in a share, shares
  int64_t chunk;                   // steps of time worked on at once

  int64_t tasks() const { return groups * slices * ranges * shares; }
};

inline Cut cut_groups(const SsmScan& args) {
  Cut cut;
  cut.groups = common_multiple(groups_of(args.B), groups_of(args.C));
  cut.channels = larger(1, args.dim / cut.groups);
  cut.states = args.state;
  return cut;
}

// What a task works on.
struct Part {
  int64_t group, first, count;  // channels
  int64_t begin, end;           // sequences
  int64_t state, states;        // the share of the states
  int64_t share;
};

inline Part part_of(const Cut& cut, const SsmScan& args, int64_t task) {
  Part part;
  part.share = task % cut.shares;
  const int64_t slice = task / cut.shares % cut.slices, range = task / cut.shares / cut.slices % cut.ranges;
  part.group = task / cut.shares / cut.slices / cut.ranges;
  part.first = part.group * cut.channels + slice * cut.slice;
  part.count = smaller(cut.slice, cut.channels - slice * cut.slice);
  part.begin = range * cut.sequences;
  part.end = smaller(args.batch, part.begin + cut.sequences);
  part.state = part.share * cut.states;
  part.states = smaller(cut.states, args.state - part.state);
  return part;
}

// B or C of one block over a chunk: the same for all lanes at one time, or one for each lane at all times.
template <class V>
struct Broadcast {
  const typename V::scalar* p;
  int64_t state, time;
  typename V::scalar value(int64_t n, int64_t t) const { return p[n * state + t * time]; }
  V at(int64_t n, int64_t t) const { return V::set1(value(n, t)); }
};

template <class V>
struct PerLane {
  const typename V::scalar* p;
  V at(int64_t n, int64_t) const { return V::load(p + n * V::width); }
};

// The rows of a block over a chunk, [chunk, V::width] each, in memory of somebody else.
template <class V>
class Rows {
 public:
  using T = typename V::scalar;
  static constexpr int64_t count = 5;

  Rows(const SsmScan& args, T* memory, int64_t chunk)
      : args_(args), size_(chunk * V::width), u_(memory), delta_(memory + size_) {}

  // u, δ and δ u of channels [d, d + lanes) over a chunk; u and delta of the chunk that comes next are fetched into the
  // cache. `slope` gets dδ / d delta unless it is null. True if some δ is below zero.
  bool read(const Chunk& chunk, const Chunk& next, int64_t d, int lanes, T* slope = nullptr) const {
    const Steps<V> u = read_time(u_, args_.u, chunk, d, lanes), raws = read_time(delta_, args_.delta, chunk, d, lanes);
    const auto next_u = fetch_time(args_.u, next, d), next_delta = fetch_time(args_.delta, next, d);
    const V bias = lanes_of(args_.delta_bias, d, lanes);
    V least = V::zero();
    for (int64_t t = 0; t < chunk.length; ++t) {
      next_u.fetch(t), next_delta.fetch(t);
      const V raw = raws.at(t) + bias;
      const V step = args_.delta_softplus ? softplus(raw) : raw;
      step.store(delta() + t * V::width);
      (step * u.at(t)).store(input() + t * V::width);
      if (slope) (args_.delta_softplus ? softplus_slope(raw) : V::set1(1)).store(slope + t * V::width);
      least = V::min(least, step);
    }
    return V::any_greater(V::zero(), least);
  }

  void read_u(const Chunk& chunk, int64_t d, int lanes) const { read_time(u_, args_.u, chunk, d, lanes); }

  // After read() or read_u().
  Steps<V> u(const Chunk& chunk, int64_t d, int lanes) const { return steps_of(u_, args_.u, chunk, d, lanes); }

  // Channels [d, d + lanes) over a chunk, where they lie or else in `memory`.
  static Steps<V> read_time(T* memory, const TensorView& view, const Chunk& chunk, int64_t d, int lanes) {
    const TileAt at = time_tile(view, chunk, d);
    if (!is_tile<V>(view, at, lanes)) read_tile<V>(memory, view, at, lanes, chunk.length);
    return steps_of(memory, view, chunk, d, lanes);
  }

  // Channels from d on over a chunk that may be empty.
  static Fetch<V> fetch_time(const TensorView& view, const Chunk& chunk, int64_t d) {
    return given(view) && chunk.length ? Fetch<V>(view, time_tile(view, chunk, d), chunk.length) : Fetch<V>();
  }

  static TileAt time_tile(const TensorView& view, const Chunk& chunk, int64_t d) {
    return {offset_of(view, chunk.at.entry, d) + (chunk.at.begin + chunk.begin) * view.stride[2], view.stride[1],
            view.stride[2]};
  }

  // Elements [d, d + lanes) of a vector that may not be given.
  static V lanes_of(const TensorView& view, int64_t d, int lanes) {
    T values[V::width] = {};
    for (int i = 0; i < lanes; ++i) values[i] = optional_element<T>(view, d + i);
    return V::load(values);
  }

  T* delta() const { return delta_; }
  T* input() const { return delta_ + size_; }  // δ u
  T* y() const { return delta_ + 2 * size_; }
  T* z() const { return delta_ + 3 * size_; }

 private:
  static Steps<V> steps_of(const T* memory, const TensorView& view, const Chunk& chunk, int64_t d, int lanes) {
    const TileAt at = time_tile(view, chunk, d);
    if (is_tile<V>(view, at, lanes)) return {static_cast<const T*>(view.data) + at.offset, at.step};
    return {memory, V::width};
  }

  const SsmScan& args_;
  int64_t size_;
  T *u_, *delta_;
};

// B or C for a part: read where it lies if it is in the kernels' dtype, else converted a chunk at a time.
template <class V>
class Projection {
 public:
  using T = typename V::scalar;

  Projection(const TensorView& view, const Cut& cut, const Part& part)
      : view_(view), part_(part), group_(per_channel(view) ? 0 : part.group / (cut.groups / groups_of(view))) {
    if (per_channel(view))
      packed_.reset(div_up(part.count, V::width) * part.states * V::width);
    else if (view.dtype != dtype_of<T>)
      packed_.reset(part.states * cut.chunk);
    if (per_channel(view))
      for (int64_t c = 0; c < part.count; c += V::width)
        read_tile<V>(lanes_at(c), view, {offset_of(view, part.first + c, part.state), view.stride[0], view.stride[1]},
                     static_cast<int>(smaller(V::width, part.count - c)), part.states);
  }

  void read(const Chunk& chunk) {
    if (per_channel(view_)) return;
    const int64_t length = chunk.length;
    const int64_t state = view_.stride[2], time = view_.stride[3];
    const int64_t offset =
        offset_of(view_, chunk.at.entry, group_) + part_.state * state + (chunk.at.begin + chunk.begin) * time;
    if (!packed_.get()) {
      now_ = {static_cast<const T*>(view_.data) + offset, state, time};
    } else if (time == 1) {
      for (int64_t n = 0; n < part_.states; ++n)
        read_row<V>(packed_ + n * length, view_, offset + n * state, time, length);
      now_ = {packed_.get(), length, 1};
    } else {
      for (int64_t t = 0; t < length; ++t)
        read_row<V>(packed_ + t * part_.states, view_, offset + t * time, state, part_.states);
      now_ = {packed_.get(), 1, part_.states};
    }
  }

  Broadcast<V> broadcast() const { return now_; }
  PerLane<V> per_lane(int64_t c) const { return {lanes_at(c)}; }
  bool varies() const { return !per_channel(view_); }

 private:
  T* lanes_at(int64_t c) const { return packed_ + c * part_.states; }

  const TensorView& view_;
  const Part& part_;
  int64_t group_;
  Buffer<T> packed_;
  Broadcast<V> now_{};
};

// A as the kernels want it and the states of a part's channels, [blocks, states, V::width] each.
template <class V>
class States {
 public:
  using T = typename V::scalar;

  States(const SsmScan& args, const Part& part)
      : args_(args),
        part_(part),
        size_(part.states * V::width),
        A_(div_up(part.count, V::width) * size_),
        h_(div_up(part.count, V::width) * size_),
        grows_(div_up(part.count, V::width)) {
    for (int64_t c = 0; c < part.count; c += V::width) {
      read_tile<V>(A(c), args.A, {offset_of(args.A, part.first + c, part.state), args.A.stride[0], args.A.stride[1]},
                   lanes(c), part.states);
      V most = V::zero();
      for (int64_t i = 0; i < size_; i += V::width) {
        const V scaled = V::load(A(c) + i) * V::set1(static_cast<T>(log2e));
        scaled.store(A(c) + i);
        most = V::max(most, scaled);
      }
      grows_[c / V::width] = V::any_greater(most, V::zero());
    }
  }

  int lanes(int64_t c) const { return static_cast<int>(smaller(V::width, part_.count - c)); }
  int64_t size() const { return div_up(part_.count, V::width) * size_; }
  T* A(int64_t c) const { return A_ + c / V::width * size_; }
  T* h(int64_t c) const { return h_ + c / V::width * size_; }
  bool grows(int64_t c) const { return grows_[c / V::width]; }  // some A is above zero

  // The states before sequence b.
  void read_initial(int64_t b) const { read(args_.initial_state, b, h_.get()); }

  // From an array [B, D, N], zeros if it is not given.
  void read(const TensorView& from, int64_t b, T* tiles) const {
    if (!given(from)) return fill_zero(tiles, size());
    for (int64_t c = 0; c < part_.count; c += V::width)
      read_tile<V>(tiles + c / V::width * size_, from, tile_of(from, b, c), lanes(c), part_.states);
  }

  // To and from row `row` of the checkpoints.
  void write_checkpoint(int64_t row) const {
    each_checkpoint(row, [](T* state, T* checkpoint, int n) { V::load(state).store_first(checkpoint, n); });
  }
  void read_checkpoint(int64_t row, T* tiles) const {
    each_checkpoint(
        row, [&](T* state, T* checkpoint, int n) { V::load_first(checkpoint, n).store(tiles + (state - h_.get())); });
  }

  void write_final(int64_t b) const { write(args_.final_state, b, h_.get()); }

  // Tiles laid out as the states are, to an array [B, D, N].
  void write(const TensorView& to, int64_t b, const T* tiles) const {
    if (!given(to)) return;
    for (int64_t c = 0; c < part_.count; c += V::width)
      write_tile<V>(tiles + c / V::width * size_, to, tile_of(to, b, c), lanes(c), part_.states);
  }

  // f(state vector, where it lies among the checkpoints, lanes)
  template <class F>
  void each_checkpoint(int64_t row, F f) const {
    T* const rows = static_cast<T*>(args_.checkpoints.data) + row * args_.state * args_.dim + part_.first;
    for (int64_t c = 0; c < part_.count; c += V::width)
      for (int64_t n = 0; n < part_.states; ++n)
        f(h(c) + n * V::width, rows + (part_.state + n) * args_.dim + c, lanes(c));
  }

  // Of an array [B, D, N].
  TileAt tile_of(const TensorView& view, int64_t b, int64_t c) const {
    return {offset_of(view, b, part_.first + c) + part_.state * view.stride[2], view.stride[1], view.stride[2]};
  }

 private:
  const SsmScan& args_;
  const Part& part_;
  int64_t size_;
  Buffer<T> A_, h_;
  Buffer<bool> grows_;
};

}  // namespace fastlvm::FASTLVM_ISA::ssm
