// The selective scan of Mamba, forward and backward.
//
// Vectors run over the state dimension N, padded with zeros to whole vectors (padded lanes are kept at zero), time is
// the inner loop of a channel, and B_t, C_t are packed as rows [L, N] for a chunk of time and a block of channels.
// The backward pass recomputes the states of a chunk from the state at its start, so memory grows with B·D·N·L/chunk at
// most. dB and dC are sums over channels: each slice of channels has its own partial sum, and the partial sums are
// added in a fixed order, so no bit of a result depends on the number of threads.
#pragma once

#include "common/rows.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::ssm_old {

constexpr int64_t work_worth_sharing = 1 << 17;  // elements B·D·N·L: about 0.1 ms of one core

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

// How the channels of one call are cut up.
struct Geometry {
  int64_t groups;         // of channels that share both B and C
  int64_t channels;       // in a group
  int64_t slice, slices;  // channels in a slice, slices in a group
  int64_t padded;         // N in whole vectors
  int64_t chunk;          // time steps worked on at once

  int64_t tasks(int64_t batch) const { return batch * groups * slices; }
};

// Channels of one batch entry and one group: the inputs as the kernels want them.
template <class V>
class Block {
 public:
  using T = typename V::scalar;

  // Channels whose rows over time are held at once, one after the other, so that elementwise work fills its vectors
  // however short the sequence is.
  static constexpr int64_t panel = 16;

  Block(const SsmScan& args, const Geometry& geometry, int64_t task)
      : args_(args),
        padded_(geometry.padded),
        batch_(task / (geometry.groups * geometry.slices)),
        group_(task / geometry.slices % geometry.groups),
        first_(group_ * geometry.channels + task % geometry.slices * geometry.slice),
        count_(smaller(geometry.slice, (group_ + 1) * geometry.channels - first_)),
        chunk_(geometry.chunk),
        A_packed_(readable_in_place(args.A, 1) ? 0 : count_ * padded_),
        B_(args.B, geometry, count_),
        C_(args.C, geometry, count_),
        rows_(6 * panel * chunk_) {
    if (readable_in_place(args.A, 1)) {
      A_ = static_cast<const T*>(args.A.data) + first_ * args.A.stride[0];
      A_pitch_ = args.A.stride[0];
    } else {
      for (int64_t c = 0; c < count_; ++c) read_state_row(A_packed_ + c * padded_, args.A, first_ + c, 0);
      A_ = A_packed_.get();
      A_pitch_ = padded_;
    }
    if (per_channel(args.B)) read_constant(B_, args.B);
    if (per_channel(args.C)) read_constant(C_, args.C);
  }

  int64_t batch() const { return batch_; }
  int64_t group() const { return group_; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t chunk() const { return chunk_; }
  int64_t padded() const { return padded_; }
  bool from_zero(int64_t t) const { return t == 0 && !given(args_.initial_state); }

  // B_t and C_t for t in [begin, begin + length).
  void read_projections(int64_t begin, int64_t length) {
    read_varying(B_, args_.B, begin, length);
    read_varying(C_, args_.C, begin, length);
  }

  // u, delta, δ and δ u of channels [c, c + channels), as rows [channels, length].
  void read_panel(int64_t c, int64_t channels, int64_t begin, int64_t length) {
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t d = first_ + c + i;
      T* const raw = raw_delta() + i * length;
      read_time_row(u() + i * length, args_.u, c + i, begin, length);
      read_time_row(raw, args_.delta, c + i, begin, length);
      const T bias = optional_element<T>(args_.delta_bias, d);
      for (int64_t t = 0; t < length; ++t) raw[t] += bias;
    }
    vectors<V>(channels * length, [&](int64_t i, int n) {
      const V raw = V::load_first(raw_delta() + i, n);
      const V step = args_.delta_softplus ? softplus(raw) : raw;
      step.store_first(delta() + i, n);
      (step * V::load_first(u() + i, n)).store_first(input() + i, n);
    });
  }

  // Rows [channels, length] of an array [B, D, L].
  void read_time_rows(T* out, const TensorView& view, int64_t c, int64_t channels, int64_t begin,
                      int64_t length) const {
    for (int64_t i = 0; i < channels; ++i) read_time_row(out + i * length, view, c + i, begin, length);
  }

  void read_time_row(T* out, const TensorView& view, int64_t c, int64_t begin, int64_t length) const {
    read_row<V>(out, view, offset_of(view, batch_, first_ + c) + begin * view.stride[2], view.stride[2], length);
  }

  // [N] at the end of [.., .., N], padded.
  void read_state_row(T* out, const TensorView& view, int64_t i, int64_t j) const {
    read_row<V>(out, view, offset_of(view, i, view.rank == 3 ? j : 0), view.stride[view.rank - 1], args_.state);
    for (int64_t n = args_.state; n < padded_; ++n) out[n] = T(0);
  }

  // The initial states [count, padded].
  void read_initial(T* states) const {
    for (int64_t c = 0; c < count_; ++c) read_state_row(states + c * padded_, args_.initial_state, batch_, first_ + c);
  }

  T* u() const { return rows_.get(); }
  T* raw_delta() const { return rows_ + panel * chunk_; }  // with the bias, before softplus
  T* delta() const { return rows_ + 2 * panel * chunk_; }
  T* input() const { return rows_ + 3 * panel * chunk_; }  // δ u
  T* y() const { return rows_ + 4 * panel * chunk_; }
  T* z() const { return rows_ + 5 * panel * chunk_; }
  const T* A(int64_t c) const { return A_ + c * A_pitch_; }

  // Row t of a chunk is row(c) + t * pitch.
  struct Projection {
    Projection(const TensorView& view, const Geometry& geometry, int64_t count)
        : group_size(geometry.groups / groups_of(view)),
          rows((per_channel(view) ? count : geometry.chunk) * geometry.padded),
          scratch(geometry.chunk) {}
    const T* row(int64_t c) const { return start + c * channel_pitch; }

    int64_t group_size;
    Buffer<T> rows, scratch;
    const T* start = nullptr;
    int64_t pitch = 0, channel_pitch = 0;
  };
  const Projection& B() const { return B_; }
  const Projection& C() const { return C_; }

 private:
  void read_constant(Projection& to, const TensorView& view) {
    for (int64_t c = 0; c < count_; ++c) read_state_row(to.rows + c * padded_, view, first_ + c, 0);
    to.start = to.rows.get();
    to.channel_pitch = padded_;
  }

  // Rows over the state dimension (`axis`) that are what packing would make of them.
  bool readable_in_place(const TensorView& view, int axis) const {
    constexpr DType own = sizeof(T) == 4 ? DType::f32 : DType::f64;
    return view.dtype == own && view.stride[axis] == 1 && padded_ == args_.state;
  }

  void read_varying(Projection& to, const TensorView& view, int64_t begin, int64_t length) {
    if (per_channel(view)) return;
    const int64_t along_state = view.stride[2], along_time = view.stride[3];
    const int64_t offset = offset_of(view, batch_, group_ / to.group_size) + begin * along_time;
    if (readable_in_place(view, 2)) {
      to.start = static_cast<const T*>(view.data) + offset;
      to.pitch = along_time;
      return;
    }
    T* const rows = to.rows.get();
    if (along_time == 1) {
      for (int64_t n = 0; n < args_.state; ++n) {
        read_row<V>(to.scratch.get(), view, offset + n * along_state, 1, length);
        for (int64_t t = 0; t < length; ++t) rows[t * padded_ + n] = to.scratch[t];
      }
    } else {
      for (int64_t t = 0; t < length; ++t)
        read_row<V>(rows + t * padded_, view, offset + t * along_time, along_state, args_.state);
    }
    for (int64_t t = 0; t < length; ++t)
      for (int64_t n = args_.state; n < padded_; ++n) rows[t * padded_ + n] = T(0);
    to.start = rows;
    to.pitch = padded_;
  }

  const SsmScan& args_;
  int64_t padded_, batch_, group_, first_, count_, chunk_;
  Buffer<T> A_packed_;
  const T* A_ = nullptr;
  int64_t A_pitch_ = 0;
  Projection B_, C_;
  Buffer<T> rows_;
};

// One step of one channel: advances `state` [N, padded] and returns C · h. From_zero: the state before is zero,
// whatever `state` holds, and needs no exponentials.
template <class V, bool From_zero>
inline typename V::scalar advance(const typename V::scalar* A, const typename V::scalar* B, const typename V::scalar* C,
                                  typename V::scalar* state, int64_t N, typename V::scalar delta,
                                  typename V::scalar input) {
  const V d = V::set1(delta), u = V::set1(input);
  const auto next = [&](int64_t n) {
    const V in = u * V::load(B + n);
    if constexpr (From_zero) return in;
    return step(d * V::load(A + n), V::load(state + n), in).state;
  };
  V y = V::zero();
  int64_t n = 0;
  for (; n + V::width <= N; n += V::width) {
    const V h = next(n);
    h.store(state + n);
    y = V::fma(V::load(C + n), h, y);
  }
  if (n < N) {
    const V h = V::first(next(n), static_cast<int>(N - n));
    h.store(state + n);
    y = V::fma(V::load(C + n), h, y);
  }
  return V::sum(y);
}

// One channel, of row `row` in the block's panel, over `length` steps: advances `state` and leaves C_t · h_t in
// block.y().
template <class V>
inline void scan_channel(const Block<V>& block, int64_t c, int64_t row, typename V::scalar* state, int64_t N,
                         int64_t length, bool from_zero) {
  using T = typename V::scalar;
  const T* const A = block.A(c);
  const T* B = block.B().row(c);
  const T* C = block.C().row(c);
  const T *const delta = block.delta() + row * length, *const input = block.input() + row * length;
  T* const y = block.y() + row * length;
  for (int64_t t = 0; t < length; ++t, B += block.B().pitch, C += block.C().pitch) {
    y[t] = from_zero && t == 0 ? advance<V, true>(A, B, C, state, N, delta[t], input[t])
                               : advance<V, false>(A, B, C, state, N, delta[t], input[t]);
  }
}

// A block over [begin, end): before_chunk(t) with the states so far, then emit(c, channels, t, length) with the rows of
// the panel that begins at channel c in place.
template <class V, class BeforeChunk, class Emit>
inline void scan_block(const SsmScan& args, Block<V>& block, typename V::scalar* states, int64_t begin, int64_t end,
                       BeforeChunk before_chunk, Emit emit) {
  for (int64_t t = begin; t < end; t += block.chunk()) {
    const int64_t length = smaller(block.chunk(), end - t);
    before_chunk(t);
    block.read_projections(t, length);
    for (int64_t c = 0; c < block.count(); c += block.panel) {
      const int64_t channels = smaller(block.panel, block.count() - c);
      block.read_panel(c, channels, t, length);
      for (int64_t i = 0; i < channels; ++i)
        scan_channel(block, c + i, i, states + (c + i) * block.padded(), args.state, length, block.from_zero(t));
      emit(c, channels, t, length);
    }
  }
}

// y += D u for a panel.
template <class V>
inline void add_skip(const SsmScan& args, const Block<V>& block, int64_t c, int64_t channels, int64_t length) {
  if (!given(args.D)) return;
  for (int64_t i = 0; i < channels; ++i) {
    const auto skip = optional_element<typename V::scalar>(args.D, block.first() + c + i);
    for (int64_t t = i * length; t < (i + 1) * length; ++t) block.y()[t] += skip * block.u()[t];
  }
}

template <class V>
inline void finish_panel(const SsmScan& args, const Block<V>& block, int64_t c, int64_t channels, int64_t begin,
                         int64_t length) {
  add_skip(args, block, c, channels, length);
  if (given(args.z)) {
    block.read_time_rows(block.z(), args.z, c, channels, begin, length);
    vectors<V>(channels * length, [&](int64_t i, int n) {
      (V::load_first(block.y() + i, n) * silu(V::load_first(block.z() + i, n))).store_first(block.y() + i, n);
    });
  }
  const int64_t along_time = args.out.stride[2];
  for (int64_t i = 0; i < channels; ++i)
    write_row(block.y() + i * length, args.out,
              offset_of(args.out, block.batch(), block.first() + c + i) + begin * along_time, along_time, length);
}

template <class V>
inline Geometry geometry_of(const SsmScan& args) {
  Geometry g;
  g.groups = common_multiple(groups_of(args.B), groups_of(args.C));
  g.channels = args.dim / g.groups;
  g.padded = round_up(args.state, V::width);
  g.slice = g.channels;
  g.slices = 1;
  g.chunk = 1;
  return g;
}

template <class V>
inline void forward(const SsmScan& args) {
  using T = typename V::scalar;
  if (args.batch == 0 || args.dim == 0) return;
  Geometry g = geometry_of<V>(args);
  // Large slices, because each packs B and C for itself; enough of them to keep all threads busy to the end.
  const int64_t threads = get_num_threads(), wanted_tasks = threads == 1 ? 1 : 4 * threads;
  g.slice = smaller(g.channels, larger(8, smaller(256, div_up(args.batch * args.dim, wanted_tasks))));
  g.slices = div_up(g.channels, g.slice);
  g.chunk = larger(1, smaller(args.length, larger(8, smaller(64, 16384 / larger(1, g.padded)))));
  const bool share = args.batch * args.dim * larger(1, args.state) * args.length > work_worth_sharing;
  parallel(g.tasks(args.batch), share, [&](int64_t task) {
    Block<V> block(args, g, task);
    Buffer<T> states(block.count() * g.padded);  // the first step writes them if it starts from zero
    if (given(args.initial_state))
      block.read_initial(states.get());
    else if (args.length == 0)
      fill_zero(states.get(), block.count() * g.padded);
    scan_block(
        args, block, states.get(), 0, args.length, [](int64_t) {},
        [&](int64_t c, int64_t channels, int64_t t, int64_t length) {
          finish_panel(args, block, c, channels, t, length);
        });
    if (!given(args.final_state)) return;
    T* out = static_cast<T*>(args.final_state.data) + (block.batch() * args.dim + block.first()) * args.state;
    for (int64_t c = 0; c < block.count(); ++c, out += args.state) copy(out, states + c * g.padded, args.state);
  });
}

}  // namespace fastlvm::FASTLVM_ISA::ssm_old
