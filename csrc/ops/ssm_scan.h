// The selective scan of Mamba, forward; ssm_scan_bwd.h has the gradients.
//
// Vectors run over channels (a block is one vector of them), so that C·h needs no sum across lanes and B_t, C_t are
// scalars read where they lie. Within a block the states are taken a few at a time and time is the inner loop: a state
// stays in a register for a chunk of time. A is held transposed and times log2(e), as the exponentials want it.
// A task is a slice of the channels of one group for a range of sequences; where these are too few to keep a team of
// threads busy, the states are split as well, and their shares of the output are added afterwards. No bit of a result
// depends on the number of threads: channels do not meet, and the shares follow from the shapes alone.
#pragma once

#include "ops/ssm_parts.h"

namespace fastlvm::FASTLVM_ISA::ssm {

// `Count` states h of the states from n on, through steps [begin, end). Output: their share of C·h is added to y.
template <class V, int Count, bool Grows, bool Output, class R, class B, class C>
FASTLVM_INLINE void walk_steps(const R& rows, V (&h)[Count], const V (&a)[Count], B b, C c, int64_t n, int64_t begin,
                               int64_t end) {
  using T = typename V::scalar;
  constexpr int W = V::width;
  const T *const deltas = rows.delta(), *const inputs = rows.input();
  T* const ys = rows.y();
  for (int64_t t = begin; t < end; ++t) {
    const V delta = V::load(deltas + t * W), input = V::load(inputs + t * W);
    V y = Output ? V::load(ys + t * W) : V::zero();
    for (int j = 0; j < Count; ++j) {
      const V x = delta * a[j];
      h[j] = V::fma(input, b.at(n + j, t), Grows ? times_any_exp2(h[j], x) : times_exp2(h[j], x));
      if (Output) y = V::fma(h[j], c.at(n + j, t), y);
    }
    if (Output) y.store(ys + t * W);
  }
}

// A of a vector of channels, the next state's `pitch` elements on.
template <class V>
struct Columns {
  const typename V::scalar* p;
  int64_t pitch;
  V at(int64_t n) const { return V::load(p + n * pitch); }
};

// `Count` states from n on through `length` steps; y [length, V::width] is added to from step `wanted` on. Here and
// below h holds a vector of channels every `pitch` elements.
template <class V, int Count, bool Grows, class R, class A, class B, class C>
inline void walk(const R& rows, A coefficients, typename V::scalar* h, int64_t pitch, B b, C c, int64_t n,
                 int64_t length, int64_t wanted) {
  V state[Count], a[Count];
  for (int j = 0; j < Count; ++j) state[j] = V::load(h + (n + j) * pitch), a[j] = coefficients.at(n + j);
  walk_steps<V, Count, Grows, false>(rows, state, a, b, c, n, 0, wanted);
  walk_steps<V, Count, Grows, true>(rows, state, a, b, c, n, wanted, length);
  for (int j = 0; j < Count; ++j) state[j].store(h + (n + j) * pitch);
}

template <class V, bool Grows, class R, class A, class B, class C>
inline void walk_all(const R& rows, A a, typename V::scalar* h, int64_t pitch, B b, C c, int64_t states, int64_t length,
                     int64_t wanted) {
  constexpr int at_once = V::states_at_once;
  int64_t n = 0;
  for (; n + at_once <= states; n += at_once) walk<V, at_once, Grows>(rows, a, h, pitch, b, c, n, length, wanted);
  for (; n < states; ++n) walk<V, 1, Grows>(rows, a, h, pitch, b, c, n, length, wanted);
}

// A whole sequence of `Length` steps from a zero state, its rows in registers. Short, so that the plain product with
// the factor is exact enough.
template <class V, int Length, bool Only_last, class R, class A, class Fetch>
inline void walk_short(const R& rows, A coefficients, typename V::scalar* h, int64_t pitch, Broadcast<V> b,
                       Broadcast<V> c, int64_t states, Fetch fetch) {
  constexpr int W = V::width, from = Only_last ? Length - 1 : 0;
  V delta[Length], input[Length], y[Length];
  for (int t = 0; t < Length; ++t) {
    delta[t] = V::load(rows.delta() + t * W), input[t] = V::load(rows.input() + t * W);
    y[t] = V::zero();
  }
  for (int64_t n = 0; n < states; ++n) {
    const V a = coefficients.at(n);
    fetch(n);
    V state = input[0] * b.at(n, 0);
    if (from == 0) y[0] = V::fma(state, c.at(n, 0), y[0]);
    for (int t = 1; t < Length; ++t) {
      state = V::fma(exp2(delta[t] * a), state, input[t] * b.at(n, t));
      if (t >= from) y[t] = V::fma(state, c.at(n, t), y[t]);
    }
    if (h) state.store(h + n * pitch);
  }
  for (int t = 0; t < Length; ++t) y[t].store(rows.y() + t * W);
}

// `fetch(n)` is called at every state, for whoever has something to fetch into the cache meanwhile.
template <class V, bool Only_last, class R, class A, class Fetch>
inline void walk_short(const R& rows, A a, typename V::scalar* h, int64_t pitch, Broadcast<V> b, Broadcast<V> c,
                       int64_t states, int64_t length, Fetch fetch) {
  switch (length) {
    case 1:
      return walk_short<V, 1, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    case 2:
      return walk_short<V, 2, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    case 3:
      return walk_short<V, 3, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    case 4:
      return walk_short<V, 4, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    case 5:
      return walk_short<V, 5, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    case 6:
      return walk_short<V, 6, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    case 7:
      return walk_short<V, 7, Only_last>(rows, a, h, pitch, b, c, states, fetch);
    default:
      return walk_short<V, 8, Only_last>(rows, a, h, pitch, b, c, states, fetch);
  }
}

constexpr int64_t longest_short = 8;

// The rows over a chunk through the block's states: y becomes C·h from step `wanted` on. Grows: a factor may exceed
// one.
template <class V>
inline void run_block(const Rows<V>& rows, const States<V>& states, const Projection<V>& B, const Projection<V>& C,
                      int64_t c, int64_t count, int64_t length, int64_t wanted, bool grows) {
  fill_zero(rows.y(), length * V::width);
  const Columns<V> a = {states.A(c), V::width};
  const auto go = [&](auto b, auto c_t) {
    if (grows)
      walk_all<V, true>(rows, a, states.h(c), V::width, b, c_t, count, length, wanted);
    else
      walk_all<V, false>(rows, a, states.h(c), V::width, b, c_t, count, length, wanted);
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
    times_ = all_times(args);
    share_ = args.dim * larger(1, args.state) * times_ > work_worth_sharing;
  }

  void run() {
    if (args_.batch == 0 || args_.dim == 0) return;
    Buffer<T> shares(cut_.shares > 1 ? cut_.shares * blocks() * times_ * W : 0);
    shares_ = shares.get();
    parallel(cut_.tasks(), share_, [&](int64_t task) {
      const FlushSubnormals<V> flush;
      run_part(part_of(cut_, args_, task));
    });
    if (cut_.shares == 1) return;
    Cut whole = cut_;
    whole.shares = 1;
    parallel(whole.tasks(), share_, [&](int64_t task) { add_shares(part_of(whole, args_, task)); });
  }

 private:
  static Cut cut_up(const SsmScan& args) {
    Cut cut = cut_groups(args);
    const int64_t batch = larger(1, args.batch), dim = larger(1, args.dim);
    cut.chunk = larger(1, smaller(longest_sequence(args), given(args.checkpoints) ? checkpoint_steps : 64));
    // Wide slices: rows of a channel-last array are then read in long pieces. A and the states stay in the cache.
    const int64_t wanted_tasks = 4 * get_num_threads();
    const int64_t fitting = (1 << 16) / (larger(1, args.state) * static_cast<int64_t>(sizeof(T)));
    cut.slice = larger(W, smaller(smaller(fitting, 256), div_up(batch * dim, wanted_tasks)) / W * W);
    cut.slices = div_up(cut.channels, cut.slice);
    // A is transposed once for a range of sequences.
    cut.sequences = div_up(batch, smaller(batch, div_up(wanted_tasks, cut.groups * cut.slices)));
    cut.ranges = div_up(batch, cut.sequences);
    // The shares decide in which order y is summed: they follow from the shapes alone, as the rest need not.
    const int64_t blocks = batch * cut.groups * div_up(cut.channels, W);
    if (blocks < 8 && args.state >= 16) {
      cut.states = round_up(div_up(args.state, smaller(args.state / 8, div_up(8, blocks))), 4);
      cut.shares = div_up(args.state, cut.states);
    }
    return cut;
  }

  void run_part(const Part& part) {
    Buffer<T> memory(Rows<V>::count * cut_.chunk * W);
    const Rows<V> rows(args_, memory.get(), cut_.chunk);
    const States<V> states(args_, part);
    Projection<V> B(args_.B, cut_, part), C(args_.C, cut_, part);
    for (int64_t b = part.begin; b < part.end; ++b) {
      const Sequence at = sequence_of(args_, b);
      if (is_short(at, B, C)) {
        if (given(args_.checkpoints)) {
          states.read_initial(b);
          states.write_checkpoint(checkpoint_row(args_, b, chunk_at(at, 0)));
        }
        run_short(part, rows, states, B, C, at, next_of(part, b, 0, at.length));
      } else {
        states.read_initial(b);
        for (int64_t t = 0; t < at.length; t += cut_.chunk) {
          const Chunk chunk = chunk_at(at, t);
          if (given(args_.checkpoints)) states.write_checkpoint(checkpoint_row(args_, b, chunk));
          run_chunk(part, rows, states, B, C, chunk, next_of(part, b, t, chunk.length));
        }
      }
      states.write_final(b);
    }
  }

  Chunk chunk_at(Sequence at, int64_t begin) const { return {at, begin, smaller(cut_.chunk, at.length - begin)}; }

  // The chunk that a part works on after [begin, begin + length) of sequence b; none has the length 0.
  Chunk next_of(const Part& part, int64_t b, int64_t begin, int64_t length) const {
    const Sequence at = sequence_of(args_, b);
    if (begin + length < at.length) return chunk_at(at, begin + length);
    return b + 1 < part.end ? chunk_at(sequence_of(args_, b + 1), 0) : Chunk{};
  }

  bool is_short(Sequence at, const Projection<V>& B, const Projection<V>& C) const {
    const int64_t outputs = at.length - skipped_;
    return at.length > 0 && at.length <= longest_short && !given(args_.initial_state) && B.varies() && C.varies() &&
           (skipped_ == 0 || outputs == 1);
  }

  void run_short(const Part& part, const Rows<V>& rows, const States<V>& states, Projection<V>& B, Projection<V>& C,
                 Sequence at, const Chunk& next) {
    const bool only_last = skipped_ > 0, keep = given(args_.final_state);
    const Chunk chunk = {at, 0, at.length};
    B.read(chunk);
    C.read(chunk);
    for (int64_t c = 0; c < part.count; c += W) {
      const bool negative = rows.read(chunk, next, part.first + c, states.lanes(c));
      T* const h = states.h(c);
      const Columns<V> a = {states.A(c), W};
      const auto none = [](int64_t) {};
      if (negative || states.grows(c)) {
        fill_zero(h, part.states * W);
        run_block(rows, states, B, C, c, part.states, at.length, skipped_, true);
      } else if (only_last) {
        walk_short<V, true>(rows, a, keep ? h : nullptr, W, B.broadcast(), C.broadcast(), part.states, at.length, none);
      } else {
        walk_short<V, false>(rows, a, keep ? h : nullptr, W, B.broadcast(), C.broadcast(), part.states, at.length,
                             none);
      }
      emit(part, rows, chunk, next, c);
    }
  }

  void run_chunk(const Part& part, const Rows<V>& rows, const States<V>& states, Projection<V>& B, Projection<V>& C,
                 const Chunk& chunk, const Chunk& next) {
    B.read(chunk);
    C.read(chunk);
    for (int64_t c = 0; c < part.count; c += W) {
      const bool negative = rows.read(chunk, next, part.first + c, states.lanes(c));
      run_block(rows, states, B, C, c, part.states, chunk.length, skipped_in(chunk), negative || states.grows(c));
      emit(part, rows, chunk, next, c);
    }
  }

  // Steps of a chunk that nobody asked for.
  int64_t skipped_in(const Chunk& chunk) const { return smaller(chunk.length, larger(0, skipped_ - chunk.begin)); }

  // The rows' y is the output, or a share of it to be kept.
  void emit(const Part& part, const Rows<V>& rows, const Chunk& chunk, const Chunk& next, int64_t c) {
    if (cut_.shares == 1) return finish(rows, chunk, next, part.first + c);
    copy(share_at(part.share, chunk, part.first + c), rows.y(), chunk.length * W);
  }

  int64_t blocks() const { return cut_.groups * div_up(cut_.channels, W); }

  // [shares, blocks, times, W]
  T* share_at(int64_t share, const Chunk& chunk, int64_t d) const {
    const int64_t block = d / cut_.channels * div_up(cut_.channels, W) + d % cut_.channels / W;
    return shares_ + ((share * blocks() + block) * times_ + first_time(args_, chunk.at) + chunk.begin) * W;
  }

  void add_shares(const Part& part) {
    Buffer<T> memory(Rows<V>::count * cut_.chunk * W);
    const Rows<V> rows(args_, memory.get(), cut_.chunk);
    for (int64_t b = part.begin; b < part.end; ++b) {
      const Sequence at = sequence_of(args_, b);
      for (int64_t t = 0; t < at.length; t += cut_.chunk) {
        const Chunk chunk = chunk_at(at, t);
        for (int64_t c = 0; c < part.count; c += W) {
          const int64_t d = part.first + c;
          rows.read_u(chunk, d, lanes(d));
          for (int64_t i = 0; i < chunk.length * W; i += W) {
            V sum = V::load(share_at(0, chunk, d) + i);
            for (int64_t s = 1; s < cut_.shares; ++s) sum = sum + V::load(share_at(s, chunk, d) + i);
            sum.store(rows.y() + i);
          }
          finish(rows, chunk, {}, d);
        }
      }
    }
  }

  int lanes(int64_t d) const {
    const int64_t end = (d / cut_.channels + 1) * cut_.channels;
    return static_cast<int>(smaller(W, end - d));
  }

  // out = (y + D u) silu(z) of a block, from y.
  void finish(const Rows<V>& rows, const Chunk& chunk, const Chunk& next, int64_t d) {
    const int64_t skipped = skipped_in(chunk), end = chunk.length;
    if (skipped == end) return;
    const Chunk wanted = {chunk.at, chunk.begin + skipped, end - skipped};
    const int lanes = this->lanes(d);
    T* const y = rows.y();
    if (given(args_.D)) {
      const V skip = Rows<V>::lanes_of(args_.D, d, lanes);
      const Steps<V> u = rows.u(chunk, d, lanes);
      for (int64_t t = skipped; t < end; ++t) V::fma(skip, u.at(t), V::load(y + t * W)).store(y + t * W);
    }
    if (given(args_.z)) {
      const Steps<V> z = rows.read_time(rows.z(), args_.z, wanted, d, lanes);
      const auto next_z = Rows<V>::fetch_time(args_.z, next, d);
      for (int64_t t = skipped; t < end; ++t) {
        next_z.fetch(t);
        (V::load(y + t * W) * silu(z.at(t - skipped))).store(y + t * W);
      }
    }
    const Chunk out = {chunk.at, wanted.begin - skipped_, wanted.length};
    write_tile<V>(y + skipped * W, args_.out, Rows<V>::time_tile(args_.out, out, d), lanes, out.length);
  }

  const SsmScan& args_;
  Cut cut_;
  int64_t skipped_;  // outputs nobody asked for, at the beginning
  int64_t times_;    // steps of all sequences
  bool share_;
  T* shares_ = nullptr;
};

}  // namespace fastlvm::FASTLVM_ISA::ssm
