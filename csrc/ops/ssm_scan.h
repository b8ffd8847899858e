// The selective scan of Mamba, forward; ssm_scan_bwd.h has the gradients.
//
// Vectors run over channels (a block is one vector of them), so that C·h needs no sum across lanes and B_t, C_t are
// scalars read where they lie. Within a block the states are taken a few at a time and time is the inner loop: a state
// stays in a register for a chunk of time. A is held transposed and times log2(e), as the exponentials want it.
// A task is a slice of the channels of one group for a range of sequences; where these are too few to keep a team of
// threads busy, the states are split as well, and their shares of the output are added afterwards. How work is cut up
// follows from the shapes alone: no bit of a result depends on the number of threads.
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

inline int64_t longest_sequence(const SsmScan& args) {
  if (!args.offsets) return args.length;
  int64_t longest = 0;
  for (int64_t b = 0; b < args.batch; ++b) longest = larger(longest, sequence_of(args, b).length);
  return longest;
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
  V at(int64_t n, int64_t t) const { return V::set1(p[n * state + t * time]); }
};

template <class V>
struct PerLane {
  const typename V::scalar* p;
  V at(int64_t n, int64_t) const { return V::load(p + n * V::width); }
};

// The rows of a block over a chunk, [chunk, V::width] each.
template <class V>
class Rows {
 public:
  using T = typename V::scalar;

  Rows(const SsmScan& args, int64_t chunk) : args_(args), size_(chunk * V::width), rows_(6 * size_) {}

  // u, delta + bias, δ and δ u of channels [d, d + lanes) at [begin, begin + length) of the sequence.
  void read(Sequence at, int64_t d, int lanes, int64_t begin, int64_t length) {
    read_time(u(), args_.u, at, d, lanes, begin, length);
    read_time(delta(), args_.delta, at, d, lanes, begin, length);
    const V bias = lanes_of(args_.delta_bias, d, lanes);
    V least = V::zero();
    for (int64_t i = 0; i < length * V::width; i += V::width) {
      const V raw = V::load(delta() + i) + bias;
      const V step = args_.delta_softplus ? softplus(raw) : raw;
      raw.store(raw_delta() + i);
      step.store(delta() + i);
      (step * V::load(u() + i)).store(input() + i);
      least = V::min(least, step);
    }
    negative_ = V::any_greater(V::zero(), least);
  }

  void read_time(T* to, const TensorView& view, Sequence at, int64_t d, int lanes, int64_t begin,
                 int64_t length) const {
    read_tile<V>(to, view, time_tile(view, at, d, begin), lanes, length);
  }

  static TileAt time_tile(const TensorView& view, Sequence at, int64_t d, int64_t begin) {
    return {offset_of(view, at.entry, d) + (at.begin + begin) * view.stride[2], view.stride[1], view.stride[2]};
  }

  // Elements [d, d + lanes) of a vector that may not be given.
  static V lanes_of(const TensorView& view, int64_t d, int lanes) {
    T values[V::width] = {};
    for (int i = 0; i < lanes; ++i) values[i] = optional_element<T>(view, d + i);
    return V::load(values);
  }

  bool negative() const { return negative_; }  // some δ is below zero
  T* u() const { return rows_.get(); }
  T* raw_delta() const { return rows_ + size_; }  // with the bias, before softplus
  T* delta() const { return rows_ + 2 * size_; }
  T* input() const { return rows_ + 3 * size_; }  // δ u
  T* y() const { return rows_ + 4 * size_; }
  T* z() const { return rows_ + 5 * size_; }

 private:
  const SsmScan& args_;
  int64_t size_;
  Buffer<T> rows_;
  bool negative_ = false;
};

// B or C for a part: read where it lies if it is in the kernels' dtype, else converted a chunk at a time.
template <class V>
class Projection {
 public:
  using T = typename V::scalar;

  Projection(const TensorView& view, const Cut& cut, const Part& part)
      : view_(view), part_(part), group_(per_channel(view) ? 0 : part.group / (cut.groups / groups_of(view))) {
    constexpr DType own = sizeof(T) == 4 ? DType::f32 : DType::f64;
    if (per_channel(view))
      packed_.reset(div_up(part.count, V::width) * part.states * V::width);
    else if (view.dtype != own)
      packed_.reset(part.states * cut.chunk);
    if (per_channel(view))
      for (int64_t c = 0; c < part.count; c += V::width)
        read_tile<V>(lanes_at(c), view, {offset_of(view, part.first + c, part.state), view.stride[0], view.stride[1]},
                     static_cast<int>(smaller(V::width, part.count - c)), part.states);
  }

  void read(Sequence at, int64_t begin, int64_t length) {
    if (per_channel(view_)) return;
    const int64_t state = view_.stride[2], time = view_.stride[3];
    const int64_t offset = offset_of(view_, at.entry, group_) + part_.state * state + (at.begin + begin) * time;
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
        const V scaled = V::load(A(c) + i) * V::set1(static_cast<T>(1.4426950408889634));
        scaled.store(A(c) + i);
        most = V::max(most, scaled);
      }
      grows_[c / V::width] = V::any_greater(most, V::zero());
    }
  }

  int lanes(int64_t c) const { return static_cast<int>(smaller(V::width, part_.count - c)); }
  T* A(int64_t c) const { return A_ + c / V::width * size_; }
  T* h(int64_t c) const { return h_ + c / V::width * size_; }
  bool grows(int64_t c) const { return grows_[c / V::width]; }  // some A is above zero

  // The states before sequence b.
  void read_initial(int64_t b) const {
    for (int64_t c = 0; c < part_.count; c += V::width) {
      if (given(args_.initial_state))
        read_tile<V>(h(c), args_.initial_state, tile_of(args_.initial_state, b, c), lanes(c), part_.states);
      else
        fill_zero(h(c), size_);
    }
  }

  void write_final(int64_t b) const {
    if (!given(args_.final_state)) return;
    for (int64_t c = 0; c < part_.count; c += V::width)
      write_tile<V>(h(c), args_.final_state, tile_of(args_.final_state, b, c), lanes(c), part_.states);
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

// `Count` states from n on through `length` steps; y [length, V::width] is added to from step `wanted` on.
template <class V, int Count, bool Grows, class B, class C>
inline void walk(const Rows<V>& rows, const typename V::scalar* A, typename V::scalar* h, B b, C c, int64_t n,
                 int64_t length, int64_t wanted) {
  constexpr int W = V::width;
  V state[Count], a[Count];
  for (int j = 0; j < Count; ++j) state[j] = V::load(h + (n + j) * W), a[j] = V::load(A + (n + j) * W);
  const auto step = [&](int64_t t) {
    const V delta = V::load(rows.delta() + t * W), input = V::load(rows.input() + t * W);
    for (int j = 0; j < Count; ++j) {
      const V x = delta * a[j];
      state[j] = V::fma(input, b.at(n + j, t), Grows ? times_any_exp2(state[j], x) : times_exp2(state[j], x));
    }
  };
  int64_t t = 0;
  for (; t < wanted; ++t) step(t);
  for (; t < length; ++t) {
    step(t);
    V y = V::load(rows.y() + t * W);
    for (int j = 0; j < Count; ++j) y = V::fma(state[j], c.at(n + j, t), y);
    y.store(rows.y() + t * W);
  }
  for (int j = 0; j < Count; ++j) state[j].store(h + (n + j) * W);
}

template <class V, bool Grows, class B, class C>
inline void walk_all(const Rows<V>& rows, const typename V::scalar* A, typename V::scalar* h, B b, C c, int64_t states,
                     int64_t length, int64_t wanted) {
  constexpr int at_once = V::states_at_once;
  int64_t n = 0;
  for (; n + at_once <= states; n += at_once) walk<V, at_once, Grows>(rows, A, h, b, c, n, length, wanted);
  for (; n < states; ++n) walk<V, 1, Grows>(rows, A, h, b, c, n, length, wanted);
}

// A whole sequence of `Length` steps from a zero state, its rows in registers. Short, so that the plain product with
// the factor is exact enough.
template <class V, int Length, bool Only_last>
inline void walk_short(const Rows<V>& rows, const typename V::scalar* A, typename V::scalar* h, Broadcast<V> b,
                       Broadcast<V> c, int64_t states) {
  constexpr int W = V::width, from = Only_last ? Length - 1 : 0;
  V delta[Length], input[Length], y[Length];
  for (int t = 0; t < Length; ++t) {
    delta[t] = V::load(rows.delta() + t * W), input[t] = V::load(rows.input() + t * W);
    y[t] = V::zero();
  }
  for (int64_t n = 0; n < states; ++n) {
    const V a = V::load(A + n * W);
    V state = input[0] * b.at(n, 0);
    if (from == 0) y[0] = V::fma(state, c.at(n, 0), y[0]);
    for (int t = 1; t < Length; ++t) {
      state = V::fma(exp2(delta[t] * a), state, input[t] * b.at(n, t));
      if (t >= from) y[t] = V::fma(state, c.at(n, t), y[t]);
    }
    if (h) state.store(h + n * W);
  }
  for (int t = 0; t < Length; ++t) y[t].store(rows.y() + t * W);
}

template <class V, bool Only_last>
inline void walk_short(const Rows<V>& rows, const typename V::scalar* A, typename V::scalar* h, Broadcast<V> b,
                       Broadcast<V> c, int64_t states, int64_t length) {
  switch (length) {
    case 1:
      return walk_short<V, 1, Only_last>(rows, A, h, b, c, states);
    case 2:
      return walk_short<V, 2, Only_last>(rows, A, h, b, c, states);
    case 3:
      return walk_short<V, 3, Only_last>(rows, A, h, b, c, states);
    case 4:
      return walk_short<V, 4, Only_last>(rows, A, h, b, c, states);
    case 5:
      return walk_short<V, 5, Only_last>(rows, A, h, b, c, states);
    case 6:
      return walk_short<V, 6, Only_last>(rows, A, h, b, c, states);
    case 7:
      return walk_short<V, 7, Only_last>(rows, A, h, b, c, states);
    default:
      return walk_short<V, 8, Only_last>(rows, A, h, b, c, states);
  }
}

constexpr int64_t longest_short = 8;

// The rows over a chunk through the block's states: y becomes C·h from step `wanted` on.
template <class V>
inline void run_block(const Rows<V>& rows, const States<V>& states, const Projection<V>& B, const Projection<V>& C,
                      int64_t c, int64_t count, int64_t length, int64_t wanted) {
  fill_zero(rows.y(), length * V::width);
  const auto go = [&](auto b, auto c_t) {
    if (rows.negative() || states.grows(c))
      walk_all<V, true>(rows, states.A(c), states.h(c), b, c_t, count, length, wanted);
    else
      walk_all<V, false>(rows, states.A(c), states.h(c), b, c_t, count, length, wanted);
  };
  if (B.varies() && C.varies()) return go(B.broadcast(), C.broadcast());
  if (B.varies()) return go(B.broadcast(), C.per_lane(c));
  if (C.varies()) return go(B.per_lane(c), C.broadcast());
  go(B.per_lane(c), C.per_lane(c));
}

// One forward call.
template <class V>
class Forward {
 public:
  using T = typename V::scalar;
  static constexpr int W = V::width;

  explicit Forward(const SsmScan& args) : args_(args), cut_(cut_up(args)) {
    skipped_ = args.length - args.out.shape[2];
    share_ =
        args.dim * larger(1, args.state) * (args.offsets ? args.length : args.batch * args.length) > work_worth_sharing;
    times_ = args.offsets ? args.length : args.batch * args.length;
  }

  void run() {
    if (args_.batch == 0 || args_.dim == 0) return;
    Buffer<T> shares(cut_.shares > 1 ? cut_.shares * blocks() * times_ * W : 0);
    shares_ = shares.get();
    parallel(cut_.tasks(), share_, [&](int64_t task) { run_part(part_of(cut_, args_, task)); });
    if (cut_.shares == 1) return;
    Cut whole = cut_;
    whole.shares = 1;
    parallel(whole.tasks(), share_, [&](int64_t task) { add_shares(part_of(whole, args_, task)); });
  }

 private:
  static Cut cut_up(const SsmScan& args) {
    Cut cut;
    const int64_t batch = larger(1, args.batch), dim = larger(1, args.dim);
    cut.groups = common_multiple(groups_of(args.B), groups_of(args.C));
    cut.channels = dim / cut.groups;
    cut.chunk = larger(1, smaller(longest_sequence(args), 64));
    const int64_t state_bytes = larger(1, args.state) * static_cast<int64_t>(sizeof(T));
    const int64_t fitting = (1 << 16) / state_bytes;  // A and the states stay in the cache
    const int64_t wanted = div_up(batch * dim, 32);
    cut.slice = larger(W, smaller(fitting, larger(64, smaller(256, wanted))) / W * W);
    cut.slices = div_up(cut.channels, cut.slice);
    // A is transposed once for a range of sequences.
    const int64_t wanted_ranges = div_up(64, cut.groups * cut.slices);
    cut.sequences = div_up(batch, smaller(batch, wanted_ranges));
    cut.ranges = div_up(batch, cut.sequences);
    cut.states = args.state;
    const int64_t tasks = cut.tasks();
    if (tasks < 8 && args.state >= 16) {
      cut.states = round_up(div_up(args.state, smaller(args.state / 8, 8 / tasks)), 4);
      cut.shares = div_up(args.state, cut.states);
    }
    return cut;
  }

  void run_part(const Part& part) {
    Rows<V> rows(args_, cut_.chunk);
    States<V> states(args_, part);
    Projection<V> B(args_.B, cut_, part), C(args_.C, cut_, part);
    for (int64_t b = part.begin; b < part.end; ++b) {
      const Sequence at = sequence_of(args_, b);
      if (is_short(at, B, C)) {
        run_short(part, rows, states, B, C, at);
      } else {
        states.read_initial(b);
        for (int64_t t = 0; t < at.length; t += cut_.chunk)
          run_chunk(part, rows, states, B, C, at, t, smaller(cut_.chunk, at.length - t));
      }
      states.write_final(b);
    }
  }

  bool is_short(Sequence at, const Projection<V>& B, const Projection<V>& C) const {
    const int64_t outputs = at.length - skipped_;
    return at.length > 0 && at.length <= longest_short && !given(args_.initial_state) && B.varies() && C.varies() &&
           (skipped_ == 0 || outputs == 1);
  }

  void run_short(const Part& part, Rows<V>& rows, const States<V>& states, Projection<V>& B, Projection<V>& C,
                 Sequence at) {
    const bool only_last = skipped_ > 0, keep = given(args_.final_state);
    B.read(at, 0, at.length);
    C.read(at, 0, at.length);
    for (int64_t c = 0; c < part.count; c += W) {
      rows.read(at, part.first + c, states.lanes(c), 0, at.length);
      T* const h = states.h(c);
      if (rows.negative() || states.grows(c)) {
        fill_zero(h, part.states * W);
        run_block(rows, states, B, C, c, part.states, at.length, skipped_);
      } else if (only_last) {
        walk_short<V, true>(rows, states.A(c), keep ? h : nullptr, B.broadcast(), C.broadcast(), part.states,
                            at.length);
      } else {
        walk_short<V, false>(rows, states.A(c), keep ? h : nullptr, B.broadcast(), C.broadcast(), part.states,
                             at.length);
      }
      emit(part, rows, at, c, 0, at.length);
    }
  }

  void run_chunk(const Part& part, Rows<V>& rows, const States<V>& states, Projection<V>& B, Projection<V>& C,
                 Sequence at, int64_t begin, int64_t length) {
    B.read(at, begin, length);
    C.read(at, begin, length);
    const int64_t wanted = smaller(length, larger(0, skipped_ - begin));
    for (int64_t c = 0; c < part.count; c += W) {
      rows.read(at, part.first + c, states.lanes(c), begin, length);
      run_block(rows, states, B, C, c, part.states, length, wanted);
      emit(part, rows, at, c, begin, length);
    }
  }

  // The rows' y is the output, or a share of it to be kept.
  void emit(const Part& part, const Rows<V>& rows, Sequence at, int64_t c, int64_t begin, int64_t length) {
    if (cut_.shares == 1) return finish(rows, at, part.first + c, begin, length);
    copy(share_at(part.share, at, part.first + c, begin), rows.y(), length * W);
  }

  int64_t blocks() const { return cut_.groups * div_up(cut_.channels, W); }

  // [shares, blocks, times, W]
  T* share_at(int64_t share, Sequence at, int64_t d, int64_t begin) const {
    const int64_t block = d / cut_.channels * div_up(cut_.channels, W) + d % cut_.channels / W;
    const int64_t time = (args_.offsets ? 0 : at.entry * args_.length) + at.begin + begin;
    return shares_ + ((share * blocks() + block) * times_ + time) * W;
  }

  void add_shares(const Part& part) {
    Rows<V> rows(args_, cut_.chunk);
    for (int64_t b = part.begin; b < part.end; ++b) {
      const Sequence at = sequence_of(args_, b);
      for (int64_t t = 0; t < at.length; t += cut_.chunk) {
        const int64_t length = smaller(cut_.chunk, at.length - t);
        for (int64_t c = 0; c < part.count; c += W) {
          const int64_t d = part.first + c;
          rows.read_time(rows.u(), args_.u, at, d, lanes(d), t, length);
          for (int64_t i = 0; i < length * W; i += W) {
            V sum = V::load(share_at(0, at, d, t) + i);
            for (int64_t s = 1; s < cut_.shares; ++s) sum = sum + V::load(share_at(s, at, d, t) + i);
            sum.store(rows.y() + i);
          }
          finish(rows, at, d, t, length);
        }
      }
    }
  }

  int lanes(int64_t d) const {
    const int64_t end = (d / cut_.channels + 1) * cut_.channels;
    return static_cast<int>(smaller(W, end - d));
  }

  // out = (y + D u) silu(z) of a block, from y.
  void finish(const Rows<V>& rows, Sequence at, int64_t d, int64_t begin, int64_t length) {
    const int64_t wanted = smaller(length, larger(0, skipped_ - begin));
    if (wanted == length) return;
    const int lanes = this->lanes(d);
    T* const y = rows.y();
    if (given(args_.D)) {
      const V skip = Rows<V>::lanes_of(args_.D, d, lanes);
      for (int64_t i = wanted * W; i < length * W; i += W)
        V::fma(skip, V::load(rows.u() + i), V::load(y + i)).store(y + i);
    }
    if (given(args_.z)) {
      rows.read_time(rows.z() + wanted * W, args_.z, at, d, lanes, begin + wanted, length - wanted);
      for (int64_t i = wanted * W; i < length * W; i += W) (V::load(y + i) * silu(V::load(rows.z() + i))).store(y + i);
    }
    write_tile<V>(y + wanted * W, args_.out, Rows<V>::time_tile(args_.out, at, d, begin + wanted - skipped_), lanes,
                  length - wanted);
  }

  const SsmScan& args_;
  Cut cut_;
  int64_t skipped_;  // outputs nobody asked for, at the beginning
  int64_t times_;    // steps of all sequences
  bool share_;
  T* shares_ = nullptr;
};

}  // namespace fastlvm::FASTLVM_ISA::ssm
