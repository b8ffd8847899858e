// The gradients of the selective scan; ssm_scan.h describes the layout.
//
// A task has the states at the start of every chunk from the forward, or else walks its sequence to find them. Then,
// from the last chunk to the first, it computes a few states of a chunk again and walks them backward, so that (B, D,
// L, N) is never in memory. dB and dC are sums over channels: each slice of channels has a partial sum of its own, kept
// in the lanes until a chunk is done, and the partial sums are added in a fixed order. No bit of a result depends on
// the number of threads.
#pragma once

#include "ops/ssm_scan.h"
#include "ops/ssm_steps_bwd.h"

namespace fastlvm::FASTLVM_ISA::ssm {

// Partial sums that are added once all tasks are done.
template <class T>
struct Partial {
  T *dA, *dB, *dC;           // dA [ranges, D, N]; dB, dC of a varying projection [groups, slices, entries, N, L]
  T *dB_lanes, *dC_lanes;    // of a projection per channel [ranges, D, N]
  double *dD, *ddelta_bias;  // [ranges, D]
};

// One task of the backward.
template <class V>
class BackwardPart {
 public:
  using T = typename V::scalar;
  static constexpr int W = V::width, at_once = V::states_at_once;

  BackwardPart(const SsmScanBwd& args, const Cut& cut, const Part& part, const Partial<T>& partial)
      : args_(args),
        in_(args.forward),
        cut_(cut),
        part_(part),
        partial_(partial),
        states_(in_, part_),
        B_(in_.B, cut, part_),
        C_(in_.C, cut, part_),
        blocks_(div_up(part.count, W)),
        rows_(blocks_ * GradRows<V>::count * cut.chunk * W),
        grows_(blocks_),
        start_(states_.size() * (given(in_.checkpoints) ? 1 : div_up(longest_sequence(in_), cut.chunk))),
        carry_(states_.size()),
        dA_(states_.size(), T(0)),
        dB_(B_.varies() ? 0 : states_.size(), T(0)),
        dC_(C_.varies() ? 0 : states_.size(), T(0)),
        want_y_(given(args.dz)) {}

  void run() {
    for (int64_t b = part_.begin; b < part_.end; ++b) run_sequence(b);
    const int64_t range = part_.begin / cut_.sequences;
    write_channels(partial_.dA, range, dA_.get());
    if (!B_.varies()) write_channels(partial_.dB_lanes, range, dB_.get());
    if (!C_.varies()) write_channels(partial_.dC_lanes, range, dC_.get());
  }

 private:
  void run_sequence(int64_t b) {
    const Sequence at = sequence_of(in_, b);
    const Chunk after = b + 1 < part_.end ? chunk_at(sequence_of(in_, b + 1), 0) : Chunk{};
    states_.read(args_.grad_final_state, b, carry_.get());
    const bool short_one = at.length <= longest_short && !given(in_.initial_state) && B_.varies() && C_.varies();
    if (short_one && at.length > 0 && run_short({at, 0, at.length}, after)) return;
    const int64_t chunks = div_up(at.length, cut_.chunk), size = states_.size();
    states_.read_initial(b);
    for (int64_t k = 0; k < chunks && !given(in_.checkpoints); ++k) {
      copy(start_ + k * size, states_.h(0), size);
      if (k + 1 < chunks) walk_chunk(chunk_at(at, k), chunk_at(at, k + 1));
    }
    for (int64_t k = chunks - 1; k >= 0; --k) {
      const Chunk chunk = chunk_at(at, k);
      const T* start = given(in_.checkpoints) ? states_.h(0) : start_ + k * size;
      if (given(in_.checkpoints) && k > 0) {
        states_.read_checkpoint(checkpoint_row(in_, b, chunk), start_.get());
        start = start_.get();
      }
      run_chunk(chunk, k > 0 ? chunk_at(at, k - 1) : after, start);
    }
    states_.write(args_.dinitial_state, b, carry_.get());
  }

  Chunk chunk_at(Sequence at, int64_t k) const {
    const int64_t begin = k * cut_.chunk;
    return {at, begin, smaller(cut_.chunk, at.length - begin)};
  }

  void walk_chunk(const Chunk& chunk, const Chunk& next) {
    B_.read(chunk);
    C_.read(chunk);
    for (int64_t c = 0; c < part_.count; c += W) {
      const GradRows<V> rows = rows_of(c);
      const bool negative = rows.read(chunk, next, part_.first + c, states_.lanes(c));
      run_block<V>(rows, states_, B_, C_, c, part_.states, chunk.length, chunk.length, negative || states_.grows(c));
    }
  }

  void run_chunk(const Chunk& chunk, const Chunk& next, const T* start) {
    read_chunk(chunk, next);
    run_general(chunk, start, chunk.begin == 0 && !given(in_.initial_state));
    for (int64_t c = 0; c < part_.count; c += W) finish_block(chunk, next, c);
  }

  // True if a factor may exceed one.
  bool read_chunk(const Chunk& chunk, const Chunk& next) {
    B_.read(chunk);
    C_.read(chunk);
    bool grows = false;
    for (int64_t c = 0; c < part_.count; c += W) grows |= read_block(chunk, next, c);
    return grows;
  }

  // A whole sequence from a zero state. False, and nothing is done, if a factor may exceed one.
  bool run_short(const Chunk& chunk, const Chunk& next) {
    if (read_chunk(chunk, next)) return false;
    run_short(chunk.at, chunk.length);
    for (int64_t c = 0; c < part_.count; c += W) finish_block(chunk, next, c);
    return true;
  }

  void run_short(Sequence at, int64_t length) {
    switch (length) {
      case 1:
        return run_short<1>(at);
      case 2:
        return run_short<2>(at);
      case 3:
        return run_short<3>(at);
      case 4:
        return run_short<4>(at);
      case 5:
        return run_short<5>(at);
      case 6:
        return run_short<6>(at);
      case 7:
        return run_short<7>(at);
      default:
        return run_short<8>(at);
    }
  }

  template <int Length>
  void run_short(Sequence at) {
    constexpr int64_t few =
        smaller(8, checkpoint_steps / longest_short * at_once);  // states whose sums the trail holds
    const int64_t blocks = blocks_, tile = part_.states * W;
    const bool want_y = want_y_;
    T *const dB_rows = trail_.dB(), *const dC_rows = trail_.dC();
    for (int64_t first = 0; first < part_.states; first += few) {
      const int64_t count = smaller(few, part_.states - first);
      for (int64_t n = first; n < first + count; ++n) {
        V dB[Length], dC[Length];
        T b[Length], c[Length];
        for (int t = 0; t < Length; ++t) {
          dB[t] = dC[t] = V::zero();
          b[t] = B_.broadcast().value(n, t), c[t] = C_.broadcast().value(n, t);
        }
        const T* A = states_.A(0) + n * W;
        const T* carry = carry_ + n * W;
        T* dA = dA_ + n * W;
        for (int64_t block = 0; block < blocks; ++block, A += tile, carry += tile, dA += tile) {
          V sum_A = V::load(dA);
          there_and_back_short<V, Length>(rows_of(block * W), V::load(A), V::load(carry), sum_A, dB, dC, b, c, want_y);
          sum_A.store(dA);
        }
        const int64_t row = (n - first) * Length;
        for (int t = 0; t < Length; ++t) dB[t].store(dB_rows + (row + t) * W), dC[t].store(dC_rows + (row + t) * W);
      }
      emit_short<Length>(at, first, count, dB_rows, partial_.dB);
      emit_short<Length>(at, first, count, dC_rows, partial_.dC);
    }
  }

  // Rows [count, Length, W] to the partial sums of states from n on.
  template <int Length>
  void emit_short(Sequence at, int64_t n, int64_t count, const T* rows, T* partial) const {
    T sums[checkpoint_steps * at_once];
    sum_lanes<V>(rows, sums, count * Length);
    for (int64_t i = 0; i < count; ++i) copy(partial + partial_at({at, 0, Length}, n + i), sums + i * Length, Length);
  }

  void run_general(const Chunk& chunk, const T* start, bool from_zero) {
    const auto go = [&](auto b, auto c) {
      int64_t n = 0;
      for (; n + at_once <= part_.states; n += at_once) run_states(trail_, chunk, b, c, n, start, from_zero);
      for (; n < part_.states; ++n) run_states(trail_one_, chunk, b, c, n, start, from_zero);
    };
    const auto B_now = [&](int64_t) { return B_.broadcast(); };
    const auto C_now = [&](int64_t) { return C_.broadcast(); };
    const auto B_of = [&](int64_t c) { return B_.per_lane(c); };
    const auto C_of = [&](int64_t c) { return C_.per_lane(c); };
    if (B_.varies())
      C_.varies() ? go(B_now, C_now) : go(B_now, C_of);
    else
      C_.varies() ? go(B_of, C_now) : go(B_of, C_of);
  }

  // `Count` states of all blocks; b_of(c) and c_of(c) are a block's projections.
  template <int Count, class B, class C>
  void run_states(const Trail<V, Count>& trail, const Chunk& chunk, B b_of, C c_of, int64_t n, const T* start,
                  bool from_zero) {
    const int64_t length = chunk.length;
    for (int j = 0; j < 2 * Count; ++j) fill_zero(trail.dB() + j * trail.size, length * W);
    for (int64_t c = 0; c < part_.count; c += W) {
      const int64_t block = c / W, tile = block * part_.states * W;
      const auto go = grows_[block] ? there_and_back<V, Count, true, decltype(b_of(c)), decltype(c_of(c))>
                                    : there_and_back<V, Count, false, decltype(b_of(c)), decltype(c_of(c))>;
      go(rows_of(c), trail, states_.A(c), start + tile, carry_ + tile, dA_ + tile, b_of(c), c_of(c), n, length,
         from_zero, want_y_);
      if (!B_.varies()) add_over_time<Count>(trail.dB(), dB_ + tile, n, length);
      if (!C_.varies()) add_over_time<Count>(trail.dC(), dC_ + tile, n, length);
    }
    for (int j = 0; j < Count; ++j) {
      const int64_t row = partial_at(chunk, n + j);
      if (B_.varies()) sum_lanes<V>(trail.dB() + j * trail.size, partial_.dB + row, length);
      if (C_.varies()) sum_lanes<V>(trail.dC() + j * trail.size, partial_.dC + row, length);
    }
  }

  // State n of this slice in the partial sums of dB and dC, from the chunk's first step on.
  int64_t partial_at(const Chunk& chunk, int64_t n) const {
    const int64_t slice = (part_.first - part_.group * cut_.channels) / cut_.slice;
    const int64_t entry = (part_.group * cut_.slices + slice) * entries_of(in_) + chunk.at.entry;
    return (entry * in_.state + n) * in_.length + chunk.at.begin + chunk.begin;
  }

  // For a projection per channel: sums over time, which begin anew with the next block.
  template <int Count>
  static void add_over_time(T* rows, T* sums, int64_t n, int64_t length) {
    for (int j = 0; j < Count; ++j, rows += Trail<V, Count>::size) {
      V sum = V::load(sums + (n + j) * W);
      for (int64_t t = 0; t < length; ++t) sum = sum + V::load(rows + t * W);
      sum.store(sums + (n + j) * W);
      fill_zero(rows, length * W);
    }
  }

  GradRows<V> rows_of(int64_t c) const {
    return {in_, rows_ + c / W * GradRows<V>::count * cut_.chunk * W, cut_.chunk};
  }

  // True if a factor may exceed one.
  bool read_block(const Chunk& chunk, const Chunk& next, int64_t c) {
    const GradRows<V> rows = rows_of(c);
    const int64_t d = part_.first + c, size = chunk.length * W;
    const int lanes = states_.lanes(c);
    grows_[c / W] = rows.read(chunk, next, d, lanes, rows.slope()) || states_.grows(c);
    read_grad(rows, chunk, next, d, lanes);
    fill_zero(rows.y(), size);
    fill_zero(rows.along_A(), size);
    fill_zero(rows.along_B(), size);
    return grows_[c / W];
  }

  // The gradient of y and what dz is y times.
  void read_grad(const GradRows<V>& rows, const Chunk& chunk, const Chunk& next, int64_t d, int lanes) {
    T* const grad_y = rows.grad_y();
    if (!given(args_.grad_out)) {
      fill_zero(grad_y, chunk.length * W);
      return fill_zero(rows.z(), chunk.length * W);
    }
    const Steps<V> grads = rows.read_time(grad_y, args_.grad_out, chunk, d, lanes);
    const auto next_grad = Rows<V>::fetch_time(args_.grad_out, next, d);
    if (!given(in_.z)) {
      for (int64_t t = 0; t < chunk.length; ++t) next_grad.fetch(t), grads.at(t).store(grad_y + t * W);
      return;
    }
    const Steps<V> gates = rows.read_time(rows.z(), in_.z, chunk, d, lanes);
    const auto next_z = Rows<V>::fetch_time(in_.z, next, d);
    for (int64_t t = 0; t < chunk.length; ++t) {
      next_grad.fetch(t), next_z.fetch(t);
      const V grad = grads.at(t), gate = gates.at(t);
      (grad * silu(gate)).store(grad_y + t * W);
      (grad * silu_slope(gate)).store(rows.z() + t * W);
    }
  }

  // du, ddelta, dz and the sums over time of a chunk.
  void finish_block(const Chunk& chunk, const Chunk& next, int64_t c) {
    const GradRows<V> rows = rows_of(c);
    const int64_t d = part_.first + c;
    const int lanes = states_.lanes(c);
    const V skip = Rows<V>::lanes_of(in_.D, d, lanes), ln2 = V::set1(static_cast<T>(0.6931471805599453));
    T *const ddelta = rows.along_A(), *const du = rows.along_B(), *const dz = rows.y();
    const Steps<V> us = rows.u(chunk, d, lanes);
    const auto next_du = Rows<V>::fetch_time(args_.du, next, d);
    const auto next_ddelta = Rows<V>::fetch_time(args_.ddelta, next, d);
    const auto next_dz = Rows<V>::fetch_time(args_.dz, next, d);
    V sum_D = V::zero(), sum_delta = V::zero();
    for (int64_t t = 0; t < chunk.length; ++t) {
      next_du.fetch(t), next_ddelta.fetch(t), next_dz.fetch(t);
      const int64_t i = t * W;
      const V u = us.at(t), along_B = V::load(rows.along_B() + i), grad_y = V::load(rows.grad_y() + i);
      const V slope = V::load(rows.slope() + i) * V::fma(u, along_B, ln2 * V::load(rows.along_A() + i));
      sum_delta = sum_delta + slope;
      sum_D = V::fma(grad_y, u, sum_D);
      slope.store(ddelta + i);
      V::fma(V::load(rows.delta() + i), along_B, skip * grad_y).store(du + i);
      if (want_y_) (V::load(rows.z() + i) * V::fma(skip, u, V::load(rows.y() + i))).store(dz + i);
    }
    write_time(args_.du, chunk, d, lanes, du);
    write_time(args_.ddelta, chunk, d, lanes, ddelta);
    write_time(args_.dz, chunk, d, lanes, dz);
    T values[2 * W];
    sum_D.store(values), sum_delta.store(values + W);
    const int64_t row = part_.begin / cut_.sequences * in_.dim + d;
    for (int i = 0; i < lanes; ++i) {
      partial_.dD[row + i] += static_cast<double>(values[i]);
      partial_.ddelta_bias[row + i] += static_cast<double>(values[W + i]);
    }
  }

  static void write_time(const TensorView& view, const Chunk& chunk, int64_t d, int lanes, const T* rows) {
    if (given(view)) write_tile<V>(rows, view, Rows<V>::time_tile(view, chunk, d), lanes, chunk.length);
  }

  // [blocks, N, W] to rows [D, N] of a range.
  void write_channels(T* to, int64_t range, const T* tiles) const {
    TensorView view;
    view.data = to + range * in_.dim * in_.state;
    view.dtype = dtype_of<T>;
    view.rank = 3;
    view.stride[1] = in_.state, view.stride[2] = 1;
    states_.write(view, 0, tiles);
  }

  const SsmScanBwd& args_;
  const SsmScan& in_;
  const Cut& cut_;
  const Part part_;
  const Partial<T>& partial_;
  States<V> states_;
  Projection<V> B_, C_;
  int64_t blocks_;
  Buffer<T> rows_;
  Buffer<bool> grows_;
  Buffer<T> start_;       // [chunks, blocks, N, W]: the states before each chunk
  Buffer<T> carry_, dA_;  // [blocks, N, W]
  Buffer<T> dB_, dC_;     // the same, of a projection per channel
  Trail<V, at_once> trail_;
  Trail<V, 1> trail_one_;
  bool want_y_;
};

// One backward call.
template <class V>
class Backward {
 public:
  using T = typename V::scalar;

  explicit Backward(const SsmScanBwd& args)
      : args_(args), in_(args.forward), cut_(cut_up(in_)), empty_(in_.batch == 0 || in_.dim == 0) {
    share_ = in_.dim * larger(1, in_.state) * all_times(in_) > work_worth_sharing / 4;
  }

  void run() {
    const bool B_varies = !per_channel(in_.B), C_varies = !per_channel(in_.C);
    const int64_t channels = cut_.ranges * in_.dim, steps = cut_.groups * cut_.slices * in_.state * all_times(in_);
    const int64_t lanes = channels * in_.state, B_size = B_varies ? steps : lanes, C_size = C_varies ? steps : lanes;
    Buffer<T> memory(lanes + B_size + C_size);  // one piece, which malloc keeps where it would give three back
    T *const dA = memory.get(), *const dB = dA + lanes, *const dC = dB + B_size;
    Buffer<double> dD(channels, 0.0), ddelta_bias(channels, 0.0);
    const Partial<T> partial{dA, dB, dC, dB, dC, dD.get(), ddelta_bias.get()};
    parallel(empty_ ? 0 : cut_.tasks(), share_,
             [&](int64_t task) { BackwardPart<V>(args_, cut_, part_of(cut_, in_, task), partial).run(); });
    add_ranges(args_.dA, dA);
    B_varies ? add_slices(args_.dB, in_.B, dB) : add_ranges(args_.dB, dB);
    C_varies ? add_slices(args_.dC, in_.C, dC) : add_ranges(args_.dC, dC);
    add_rows(args_.dD, dD.get());
    add_rows(args_.ddelta_bias, ddelta_bias.get());
  }

 private:
  // A function of the shapes only: the slices decide in which order sums over channels are taken.
  static Cut cut_up(const SsmScan& in) {
    Cut cut = cut_groups(in);
    const int64_t batch = larger(1, in.batch);
    cut.chunk = larger(1, smaller(longest_sequence(in), checkpoint_steps));
    // Narrow slices leave partial sums of dB and dC larger than u, wide ones outgrow the cache and are few tasks.
    const int64_t wanted = round_up(div_up(cut.channels, div_up(12, cut.groups)), V::width);
    cut.slice = smaller(larger(64, wanted), larger(128, in.state / 2 / V::width * V::width));
    cut.slices = div_up(cut.channels, cut.slice);
    const int64_t wanted_ranges = div_up(64, cut.groups * cut.slices);
    cut.sequences = div_up(batch, smaller(batch, wanted_ranges));
    cut.ranges = div_up(batch, cut.sequences);
    return cut;
  }

  // [entries, G, N, L] from [groups, slices, entries, N, L], where several of the groups may share a projection's
  // group.
  void add_slices(const TensorView& out, const TensorView& projection, const T* partial) {
    if (!given(out)) return;
    const int64_t groups = projection.shape[1], parts = empty_ ? 0 : cut_.groups / groups * cut_.slices;
    const int64_t entries = entries_of(in_), size = in_.state * in_.length, pieces = div_up(size, piece);
    parallel(entries * groups * pieces, share_, [&](int64_t task) {
      const int64_t begin = task % pieces * piece, group = task / pieces % groups, entry = task / pieces / groups;
      T* const to = static_cast<T*>(out.data) + (entry * groups + group) * size + begin;
      const T* const from = partial + (group * parts * entries + entry) * size + begin;
      vectors<V>(smaller(piece, size - begin), [&](int64_t i, int count) {
        V sum = V::zero();
        for (int64_t p = 0; p < parts; ++p) sum = sum + V::load_first(from + p * entries * size + i, count);
        sum.store_first(to + i, count);
      });
    });
  }
  static constexpr int64_t piece = 2048;

  // [D, N] from [ranges, D, N].
  void add_ranges(const TensorView& out, const T* partial) {
    if (!given(out)) return;
    const int64_t size = in_.dim * in_.state, ranges = empty_ ? 0 : cut_.ranges;
    parallel(in_.dim, share_, [&](int64_t d) {
      vectors<V>(in_.state, [&](int64_t n, int count) {
        const int64_t i = d * in_.state + n;
        V sum = V::zero();
        for (int64_t r = 0; r < ranges; ++r) sum = sum + V::load_first(partial + r * size + i, count);
        sum.store_first(static_cast<T*>(out.data) + i, count);
      });
    });
  }

  // [D] from [ranges, D].
  void add_rows(const TensorView& out, const double* partial) {
    if (!given(out)) return;
    for (int64_t d = 0; d < in_.dim; ++d) {
      double sum = 0;
      for (int64_t r = 0; r < cut_.ranges; ++r) sum += partial[r * in_.dim + d];
      static_cast<T*>(out.data)[d] = static_cast<T>(sum);
    }
  }

  const SsmScanBwd& args_;
  const SsmScan& in_;
  Cut cut_;
  bool empty_;  // no sequences or no channels: every sum is zero
  bool share_;
};

}  // namespace fastlvm::FASTLVM_ISA::ssm
