// The scan of Mamba-2 (state space duality), forward.
//
// Time is cut into chunks of Q tokens. Inside a chunk token t takes exp(Σ dt A) (C_t · B_i) dt_i x_i from every token
// i <= t; what came before the chunk arrives through the state alone. So the work is matrix products (common/product.h)
// of Q / 2 + 2 N multiply-adds per token and element of x, where the recurrence has 3 N multiplies and multiply-adds;
// C · Bᵀ is shared by the heads of a group. A state is 4 P N bytes (32 KB at P = 64, N = 128) and is read and written
// once per chunk: the bound is arithmetic. Exponentials are Q / 2 per token and head. A short sequence from a given
// state is better off with the recurrence: reading and writing the states is the bound, and they need no turning round.
//
// Decays over a span are exp of the sum of their logarithms over that span, never a quotient of products, so nothing
// overflows or loses digits however strong a decay is.
#pragma once

#include "common/product.h"
#include "common/tiles.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::ssd {

constexpr int64_t work_worth_sharing = 1 << 22;  // multiply-adds: about 0.1 ms of one core
constexpr int64_t usual_chunk = 64;
constexpr int64_t longest_chunk = 128;     // a sequence no longer than this is one chunk
constexpr int64_t longest_recurrence = 8;  // from a given state

inline int64_t chunk_of(int64_t length) { return length <= longest_chunk ? larger(1, length) : usual_chunk; }

inline bool worth_sharing(const SsdScan& in) {
  const int64_t tokens = in.offsets ? in.length : in.batch * in.length;
  return tokens * in.heads * in.dim * (2 * in.state + usual_chunk / 2) > work_worth_sharing;
}

// How the heads of one call are cut up.
struct Geometry {
  int64_t heads;          // in a group
  int64_t slice, slices;  // heads in a slice, slices in a group

  Geometry(const SsdScan& in, int64_t wanted_slices)
      : heads(in.heads / in.groups),
        slice(larger(1, div_up(heads, larger(1, wanted_slices)))),
        slices(div_up(heads, slice)) {}
  int64_t tasks(const SsdScan& in) const { return in.batch * in.groups * slices; }
};

// Some heads of one group over one sequence: the inputs of a chunk as the kernels want them, and scratch for one head.
// Rows over P and N are padded to whole vectors, rows over tokens of a chunk too. States are kept as [N, P].
template <class V>
class Block {
 public:
  using T = typename V::scalar;

  Block(const SsdScan& in, const Geometry& g, int64_t task)
      : in_(in),
        sequence_(task / (in.groups * g.slices)),
        group_(task / g.slices % in.groups),
        slice_(task % g.slices),
        first_(group_ * g.heads + slice_ * g.slice),
        count_(smaller(g.slice, (group_ + 1) * g.heads - first_)),
        entry_(in.offsets ? 0 : sequence_),
        begin_(in.offsets ? in.offsets[sequence_] : 0),
        length_(in.offsets ? in.offsets[sequence_ + 1] - begin_ : in.length),
        chunk_(chunk_of(length_)),
        p_(round_up(in.dim, V::width)),
        n_(round_up(in.state, V::width)),
        q_(round_up(chunk_, V::width)),
        B_(chunk_ * n_),
        C_(chunk_ * n_),
        B_across_(in.state * q_),
        scores_(chunk_ * q_),
        weights_(chunk_ * q_),
        steps_(6 * q_, T(0)),
        rows_(5 * chunk_ * p_),
        skip_(p_),
        turned_(in.dim * n_) {}

  int64_t sequence() const { return sequence_; }
  int64_t entry() const { return entry_; }  // of arrays of time
  int64_t begin() const { return begin_; }  // in arrays of time
  int64_t length() const { return length_; }
  int64_t group() const { return group_; }
  int64_t slice() const { return slice_; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t chunk() const { return chunk_; }
  int64_t tokens(int64_t t) const { return smaller(chunk_, length_ - t); }  // of the chunk that begins at t
  int64_t p() const { return p_; }
  int64_t n() const { return n_; }
  int64_t q() const { return q_; }
  int64_t state_size() const { return in_.state * p_; }

  T* B() const { return B_.get(); }  // [Q, N]
  T* C() const { return C_.get(); }
  T* scores() const { return scores_.get(); }    // [Q, Q]: C_t · B_i for i <= t
  T* weights() const { return weights_.get(); }  // [Q, Q]: scores times decays
  T* raw_dt() const { return steps_.get(); }     // [Q]: with the bias, before softplus
  T* dt() const { return steps_ + q_; }
  T* log_decay() const { return steps_ + 2 * q_; }     // dt A
  T* from_start() const { return steps_ + 3 * q_; }    // the decay from the chunk's start through token t
  T* to_end() const { return steps_ + 4 * q_; }        // the decay after token t to the chunk's end
  T* x() const { return rows_.get(); }                 // [Q, P]
  T* input() const { return rows_ + chunk_ * p_; }     // dt x
  T* kept() const { return rows_ + 2 * chunk_ * p_; }  // dt x decayed to the chunk's end
  T* y() const { return rows_ + 3 * chunk_ * p_; }
  T* z() const { return rows_ + 4 * chunk_ * p_; }
  T* skip() const { return skip_.get(); }  // D of one head [P]

  void read_projections(int64_t t, int64_t tokens) {
    read_rows(B_.get(), n_, in_.B, group_, t, tokens, in_.state);
    read_rows(C_.get(), n_, in_.C, group_, t, tokens, in_.state);
  }

  void score(int64_t tokens) {
    transpose<V>(B_across_.get(), q_, B(), n_, tokens, in_.state);
    lower_product(scores(), C(), n_, B_across_.get(), in_.state, tokens);
  }

  // out[t, i] for i <= t, and some beyond: rows a [tokens, depth] times b [depth, q].
  void lower_product(T* out, const T* a, int64_t a_pitch, const T* b, int64_t depth, int64_t tokens) const {
    constexpr int64_t strip = 4 * tile_rows;
    for (int64_t t = 0; t < tokens; t += strip) {
      const int64_t rows = smaller(strip, tokens - t);
      multiply<V>(rows, round_up(t + rows, V::width), depth, {a + t * a_pitch, a_pitch, 1}, {b, q_},
                  {out + t * q_, q_});
    }
  }

  void read_steps(int64_t head, int64_t t, int64_t tokens) {
    const TensorView& view = in_.dt;
    read_row<V>(raw_dt(), view, offset_of(view, entry_, begin_ + t) + head * view.stride[2], view.stride[1], tokens);
    const T bias = optional_element<T>(in_.dt_bias, head), A = optional_element<T>(in_.A, head);
    for (int64_t i = 0; i < tokens; ++i) raw_dt()[i] += bias;
    vectors<V>(tokens, [&](int64_t i, int) {
      const V raw = V::load(raw_dt() + i), step = in_.dt_softplus ? softplus(raw) : raw;
      step.store(dt() + i);
      (step * V::set1(A)).store(log_decay() + i);
    });
    T past(0), ahead(0);
    for (int64_t i = 0; i < tokens; ++i) from_start()[i] = past += log_decay()[i];
    for (int64_t i = tokens - 1; i >= 0; --i) {
      to_end()[i] = ahead;
      ahead += log_decay()[i];
    }
    vectors<V>(tokens, [&](int64_t i, int) {
      exp(V::load(from_start() + i)).store(from_start() + i);
      exp(V::load(to_end() + i)).store(to_end() + i);
    });
  }

  void read_inputs(int64_t head, int64_t t, int64_t tokens) {
    read_rows(x(), p_, in_.x, head, t, tokens, in_.dim);
    scale_rows(input(), x(), dt(), tokens);
  }

  // Rows [tokens, count] of an array [B, L, .., ..], padded with zeros.
  void read_rows(T* out, int64_t pitch, const TensorView& view, int64_t i, int64_t t, int64_t tokens,
                 int64_t count) const {
    const int64_t offset = offset_of(view, entry_, begin_ + t) + i * view.stride[2];
    for (int64_t s = 0; s < tokens; ++s, out += pitch) {
      read_row<V>(out, view, offset + s * view.stride[1], view.stride[3], count);
      fill_zero(out + count, pitch - count);
    }
  }

  // out[t] = scale[t] in[t], rows over P.
  void scale_rows(T* out, const T* in, const T* scale, int64_t tokens) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const V factor = V::set1(scale[t]);
      for (int64_t i = t * p_; i < (t + 1) * p_; i += V::width) (factor * V::load(in + i)).store(out + i);
    }
  }

  // weights[t, i] = scores[t, i] exp(Σ_{i < j <= t} log_decay_j) for i <= t, else 0; the exponentials go to `decays`
  // too if it is not null.
  void weigh(int64_t tokens, T* decays = nullptr) {
    T* const sums = steps_ + 5 * q_;
    fill_zero(sums, q_);
    for (int64_t t = 0; t < tokens; ++t) {
      const V step = V::set1(log_decay()[t]);
      for (int64_t i = 0; i <= t; i += V::width) {
        const int before = static_cast<int>(smaller(V::width, t - i)),
                  upto = static_cast<int>(smaller(V::width, t - i + 1));
        const V sum = V::load(sums + i) + V::first(step, before);
        sum.store(sums + i);
        const V decay = exp(sum);
        V::first(decay * V::load(scores() + t * q_ + i), upto).store(weights() + t * q_ + i);
        if (decays) V::first(decay, upto).store(decays + t * q_ + i);
      }
    }
  }

  // y = C H decayed from the chunk's start + what the chunk's own tokens add; without a state H is zero.
  void attend(const T* state, int64_t tokens) {
    if (state) multiply<V>(tokens, p_, in_.state, {C(), n_, 1}, {state, p_}, {y(), p_, false, T(1), from_start()});
    multiply<V, Terms::up_to_row>(tokens, p_, tokens, {weights(), q_, 1}, {input(), p_}, {y(), p_, state != nullptr});
  }

  // The state after the chunk, from the one before it, if there was any.
  void advance(T* state, bool from_zero, int64_t tokens) {
    scale_rows(kept(), input(), to_end(), tokens);
    multiply<V>(in_.state, p_, tokens, {B(), 1, n_}, {kept(), p_}, {state, p_, !from_zero, from_start()[tokens - 1]});
  }

  // y += D x
  void add_skip(int64_t head, int64_t tokens) {
    if (!read_skip(head)) return;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < p_; i += V::width) {
        T* const to = y() + t * p_ + i;
        V::fma(V::load(skip() + i), V::load(x() + t * p_ + i), V::load(to)).store(to);
      }
  }

  bool read_skip(int64_t head) {
    if (!given(in_.D)) return false;
    read_row<V>(skip(), in_.D, head * in_.D.stride[0], in_.D.rank == 2 ? in_.D.stride[1] : 0, in_.dim);
    fill_zero(skip() + in_.dim, p_ - in_.dim);
    return true;
  }

  void write_output(int64_t head, int64_t t, int64_t tokens) {
    add_skip(head, tokens);
    if (given(in_.z)) {
      read_rows(z(), p_, in_.z, head, t, tokens, in_.dim);
      for (int64_t i = 0; i < tokens * p_; i += V::width) (V::load(y() + i) * silu(V::load(z() + i))).store(y() + i);
    }
    const TensorView& out = in_.out;
    const int64_t offset = offset_of(out, entry_, begin_ + t) + head * out.stride[2];
    for (int64_t s = 0; s < tokens; ++s)
      write_row<V>(y() + s * p_, out, offset + s * out.stride[1], out.stride[3], in_.dim);
  }

  // States [count, N, P] from [B, H, P, N].
  void read_states(T* states, const TensorView& view) {
    for (int64_t h = 0; h < count_; ++h, states += state_size()) {
      vectors<V>(in_.dim, [&](int64_t i, int lanes) {
        read_tile<V>(states + i, view, state_at(view, h, i), lanes, in_.state, p_);
      });
    }
  }

  // The reverse.
  void write_states(const TensorView& view, const T* states) const {
    if (!given(view)) return;
    for (int64_t h = 0; h < count_; ++h, states += state_size())
      vectors<V>(in_.dim, [&](int64_t i, int lanes) {
        write_tile<V>(states + i, view, state_at(view, h, i), lanes, in_.state, p_);
      });
  }

  // A state [N, P] as [P, N], in scratch; its padding is zero.
  const T* turned(const T* state) const {
    transpose<V>(turned_.get(), n_, state, p_, in_.state, in_.dim);
    return turned_.get();
  }

 private:
  // Rows from i on of a head's state in an array [B, H, P, N].
  TileAt state_at(const TensorView& view, int64_t head, int64_t i) const {
    return {offset_of(view, sequence_, first_ + head) + i * view.stride[2], view.stride[2], view.stride[3]};
  }

  const SsdScan& in_;
  int64_t sequence_, group_, slice_, first_, count_, entry_, begin_, length_, chunk_;
  int64_t p_, n_, q_;  // P, N and Q in whole vectors
  Buffer<T> B_, C_, B_across_, scores_, weights_, steps_, rows_, skip_, turned_;
};

// Some tokens of one row of a state, h = decay h + input B, and y = C · h.
template <class V, int Tokens>
inline void recur(typename V::scalar* h, const typename V::scalar* B, const typename V::scalar* C, int64_t n,
                  const typename V::scalar* decay, const typename V::scalar* input, typename V::scalar* y, int64_t p) {
  V sums[Tokens];
  FASTLVM_UNROLL
  for (int t = 0; t < Tokens; ++t) sums[t] = V::zero();
  for (int64_t k = 0; k < n; k += V::width) {
    V state = V::load(h + k);
    FASTLVM_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      state = V::fma(V::set1(input[t * p]), V::load(B + t * n + k), V::set1(decay[t]) * state);
      sums[t] = V::fma(V::load(C + t * n + k), state, sums[t]);
    }
    state.store(h + k);
  }
  FASTLVM_UNROLL
  for (int t = 0; t < Tokens; ++t) y[t * p] = V::sum(sums[t]);
}

// A whole short sequence from a given state, with the states as they lie in memory.
template <class V>
inline void forward_by_recurrence(const SsdScan& in, Block<V>& block) {
  using T = typename V::scalar;
  const int64_t tokens = block.length(), n = block.n(), p = block.p();
  const TensorView& first = in.initial_state;
  Buffer<T> state(n), decay(block.q());
  block.read_projections(0, tokens);
  for (int64_t head = block.first(); head < block.first() + block.count(); ++head) {
    const int64_t begin = offset_of(first, block.sequence(), head);
    T* last = given(in.final_state) ? static_cast<T*>(in.final_state.data) : nullptr;
    if (last) last += (block.sequence() * in.heads + head) * in.dim * in.state;
    block.read_steps(head, 0, tokens);
    block.read_inputs(head, 0, tokens);
    vectors<V>(tokens, [&](int64_t i, int) { exp(V::load(block.log_decay() + i)).store(decay + i); });
    for (int64_t i = 0; i < in.dim; ++i) {
      T* const h = state.get();
      read_row<V>(h, first, begin + i * first.stride[2], first.stride[3], in.state);
      fill_zero(h + in.state, n - in.state);
      for (int64_t t = 0; t < tokens; t += 4) {
        const T *const B = block.B() + t * n, *const C = block.C() + t * n, *const input = block.input() + t * p + i;
        T* const y = block.y() + t * p + i;
        with_constant<4>(smaller(4, tokens - t),
                         [&](auto count) { recur<V, count.value>(h, B, C, n, decay + t, input, y, p); });
      }
      if (last) copy(last + i * in.state, h, in.state);
    }
    for (int64_t t = 0; t < tokens; ++t) fill_zero(block.y() + t * p + in.dim, p - in.dim);
    block.write_output(head, 0, tokens);
  }
}

template <class V>
inline void forward(const SsdScan& in) {
  using T = typename V::scalar;
  if (in.batch == 0 || in.heads == 0 || in.dim == 0) return;
  // Every slice of a group scores the group's tokens for itself.
  const int64_t threads = get_num_threads(), wanted_tasks = threads == 1 ? 1 : 4 * threads;
  const Geometry g(in, div_up(wanted_tasks, in.batch * in.groups));
  parallel(g.tasks(in), worth_sharing(in), [&](int64_t task) {
    Block<V> block(in, g, task);
    const int64_t size = block.state_size();
    const bool from_zero = !given(in.initial_state);
    if (!from_zero && block.length() <= longest_recurrence) return forward_by_recurrence(in, block);
    Buffer<T> states(block.count() * size);
    if (!from_zero)
      block.read_states(states.get(), in.initial_state);
    else if (block.length() == 0)
      fill_zero(states.get(), block.count() * size);
    for (int64_t t = 0; t < block.length(); t += block.chunk()) {
      const int64_t tokens = block.tokens(t);
      const bool goes_on = t + tokens < block.length() || given(in.final_state);
      block.read_projections(t, tokens);
      block.score(tokens);
      for (int64_t h = 0; h < block.count(); ++h) {
        T* const state = states + h * size;
        block.read_steps(block.first() + h, t, tokens);
        block.read_inputs(block.first() + h, t, tokens);
        block.weigh(tokens);
        block.attend(from_zero && t == 0 ? nullptr : state, tokens);
        block.write_output(block.first() + h, t, tokens);
        if (goes_on) block.advance(state, from_zero && t == 0, tokens);
      }
    }
    block.write_states(in.final_state, states.get());
  });
}

}  // namespace fastlvm::FASTLVM_ISA::ssd
