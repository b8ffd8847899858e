// The gradients of the selective scan; ssm_scan.h says how the work is cut up.
#pragma once

#include "ops/old_scan.h"

namespace fastlvm::FASTLVM_ISA::ssm_old {

// The states of channel c (row `row` of the panel) over a chunk: h [length + 1, padded] from the h[0] given, and a =
// exp(δ A) [length, padded].
template <class V>
inline void scan_states(const Block<V>& block, int64_t c, int64_t row, typename V::scalar* h, typename V::scalar* a,
                        int64_t N, int64_t length, bool from_zero) {
  using T = typename V::scalar;
  const int64_t padded = block.padded();
  const T* const A = block.A(c);
  const T* B = block.B().row(c);
  for (int64_t t = 0; t < length; ++t, B += block.B().pitch, h += padded, a += padded) {
    const V delta = V::set1(block.delta()[row * length + t]), input = V::set1(block.input()[row * length + t]);
    for (int64_t n = 0; n < padded; n += V::width) {
      const int keep = static_cast<int>(smaller(V::width, N - n));
      const V in = input * V::load(B + n);
      Step<V> next{V::zero(), in};
      if (!from_zero || t > 0) next = step(delta * V::load(A + n), V::load(h + n), in);
      V::first(next.decay, keep).store(a + n);
      V::first(next.state, keep).store(h + padded + n);
    }
  }
}

// What the backward sweep of one channel reads and adds to; state rows are [padded], time rows [channels, length].
template <class T>
struct Sweep {
  const T *h, *a;  // from scan_states
  T* carry;        // gradient of the state after the chunk, then of the state before it
  T* dA;           // added to
  T *dB, *dC;      // added to: row t is dB + t * dB_pitch
  int64_t dB_pitch, dC_pitch;
  const T* grad_y;
  T *y, *along_B, *along_A;  // C·h, Σ_n g B, Σ_n g a h_{t-1} A
};

template <class V>
inline void sweep_channel(const Block<V>& block, int64_t c, int64_t row, const Sweep<typename V::scalar>& s, int64_t N,
                          int64_t length) {
  using T = typename V::scalar;
  const int64_t padded = block.padded();
  const T* const A = block.A(c);
  for (int64_t t = length - 1; t >= 0; --t) {
    const T* const B = block.B().row(c) + t * block.B().pitch;
    const T* const C = block.C().row(c) + t * block.C().pitch;
    const T *const before = s.h + t * padded, *const after = before + padded, *const decay = s.a + t * padded;
    T *const dB = s.dB + t * s.dB_pitch, *const dC = s.dC + t * s.dC_pitch;
    const int64_t at = row * length + t;
    const V grad_y = V::set1(s.grad_y[at]), delta = V::set1(block.delta()[at]), input = V::set1(block.input()[at]);
    V y = V::zero(), along_B = V::zero(), along_A = V::zero();
    for (int64_t n = 0; n < padded; n += V::width) {
      const V h = V::load(after + n), a = V::load(decay + n), c_t = V::load(C + n);
      V g = V::fma(grad_y, c_t, V::load(s.carry + n));
      g = V::first(g, static_cast<int>(smaller(V::width, N - n)));
      const V through = g * a;  // gradient of h_{t-1}
      const V slope = through * V::load(before + n);
      y = V::fma(c_t, h, y);
      along_B = V::fma(g, V::load(B + n), along_B);
      along_A = V::fma(slope, V::load(A + n), along_A);
      V::fma(grad_y, h, V::load(dC + n)).store(dC + n);
      V::fma(input, g, V::load(dB + n)).store(dB + n);
      V::fma(delta, slope, V::load(s.dA + n)).store(s.dA + n);
      through.store(s.carry + n);
    }
    s.y[at] = V::sum(y);
    s.along_B[at] = V::sum(along_B);
    s.along_A[at] = V::sum(along_A);
  }
}

template <class V>
class Backward {
 public:
  using T = typename V::scalar;

  explicit Backward(const SsmScanBwd& args)
      : args_(args),
        in_(args.forward),
        g_(cut(args.forward)),
        rows_(in_.batch * in_.dim),
        state_size_(rows_ * g_.padded) {
    share_ = rows_ * larger(1, in_.state) * in_.length > work_worth_sharing / 4;
    const int64_t per_step = 2 * g_.tasks(in_.batch) * larger(1, g_.padded);
    constexpr int64_t budget = 1 << 23;  // elements of the partial sums of dB and dC
    span_ = larger(1, smaller(in_.length, larger(1, budget / larger(1, per_step * g_.chunk)) * g_.chunk));
    spans_ = div_up(in_.length, span_);
  }

  void run() {
    Buffer<T> carry(state_size_, T(0)), dA(state_size_, T(0));
    Buffer<T> dB(per_channel(in_.B) ? state_size_ : 0, T(0)), dC(per_channel(in_.C) ? state_size_ : 0, T(0));
    Buffer<T> dB_slices(per_channel(in_.B) ? 0 : slices_size()), dC_slices(per_channel(in_.C) ? 0 : slices_size());
    Buffer<T> starts(larger(0, spans_ - 1) * state_size_);
    Buffer<double> dD(rows_, 0.0), ddelta_bias(rows_, 0.0);
    carry_ = carry.get(), dA_ = dA.get(), dB_ = dB.get(), dC_ = dC.get(), starts_ = starts.get();
    dB_slices_ = per_channel(in_.B) ? nullptr : dB_slices.get();
    dC_slices_ = per_channel(in_.C) ? nullptr : dC_slices.get();
    dD_ = dD.get(), ddelta_bias_ = ddelta_bias.get();

    read_final_gradient();
    if (spans_ > 1) parallel(g_.tasks(in_.batch), share_, [&](int64_t task) { find_starts(task); });
    for (int64_t span = spans_ - 1; span >= 0; --span) {
      parallel(g_.tasks(in_.batch), share_, [&](int64_t task) { run_span(task, span); });
      add_slices(args_.dB, in_.B, dB_slices_, span);
      add_slices(args_.dC, in_.C, dC_slices_, span);
    }
    add_batches(args_.dA, dA_);
    if (per_channel(in_.B)) add_batches(args_.dB, dB_);
    if (per_channel(in_.C)) add_batches(args_.dC, dC_);
    add_rows(args_.dD, dD_);
    add_rows(args_.ddelta_bias, ddelta_bias_);
    if (given(args_.dinitial_state))
      for (int64_t r = 0; r < rows_; ++r)
        copy(static_cast<T*>(args_.dinitial_state.data) + r * in_.state, carry_ + r * g_.padded, in_.state);
  }

 private:
  // A function of the shapes only: the slices decide in which order sums over channels are taken.
  static Geometry cut(const SsmScan& in) {
    Geometry g = geometry_of<V>(in);
    constexpr int64_t wanted_tasks = 64;
    const int64_t slices = smaller(div_up(wanted_tasks, larger(1, in.batch * g.groups)), div_up(g.channels, 8));
    g.slice = larger(1, div_up(g.channels, larger(1, slices)));
    g.slices = div_up(g.channels, g.slice);
    g.chunk = larger(1, smaller(in.length, larger(8, smaller(64, 8192 / larger(1, g.padded)))));
    return g;
  }

  int64_t slices_size() const { return g_.tasks(in_.batch) * span_ * g_.padded; }

  void read_final_gradient() {
    const TensorView& view = args_.grad_final_state;
    if (!given(view)) return;
    for (int64_t r = 0; r < rows_; ++r)
      read_row<V>(carry_ + r * g_.padded, view, offset_of(view, r / in_.dim, r % in_.dim), view.stride[2], in_.state);
  }

  // Row of channel 0 of the block in an array [B, D, padded].
  int64_t state_offset(const Block<V>& block) const { return (block.batch() * in_.dim + block.first()) * g_.padded; }

  // The states at the start of every span but the first.
  void find_starts(int64_t task) {
    Block<V> block(in_, g_, task);
    const int64_t size = block.count() * g_.padded;
    Buffer<T> states(size, T(0));
    if (given(in_.initial_state)) block.read_initial(states.get());
    const auto keep = [&](int64_t t) {
      if (t > 0 && t % span_ == 0)
        copy(starts_ + (t / span_ - 1) * state_size_ + state_offset(block), states.get(), size);
    };
    scan_block(in_, block, states.get(), 0, (spans_ - 1) * span_, keep, [](int64_t, int64_t, int64_t, int64_t) {});
    keep((spans_ - 1) * span_);
  }

  void run_span(int64_t task, int64_t span) {
    Block<V> block(in_, g_, task);
    const int64_t begin = span * span_, end = smaller(in_.length, begin + span_);
    const int64_t chunks = div_up(end - begin, g_.chunk), size = block.count() * g_.padded;
    Buffer<T> states(size, T(0)), checkpoints(chunks * size);
    if (span > 0)
      copy(states.get(), starts_ + (span - 1) * state_size_ + state_offset(block), size);
    else if (given(in_.initial_state))
      block.read_initial(states.get());
    const auto keep = [&](int64_t t) { copy(checkpoints + (t - begin) / g_.chunk * size, states.get(), size); };
    scan_block(in_, block, states.get(), begin, begin + (chunks - 1) * g_.chunk, keep,
               [](int64_t, int64_t, int64_t, int64_t) {});
    keep(begin + (chunks - 1) * g_.chunk);

    Scratch scratch(g_);
    for (int64_t k = chunks - 1; k >= 0; --k) {
      const int64_t t = begin + k * g_.chunk, length = smaller(g_.chunk, end - t);
      block.read_projections(t, length);
      T* const dB = slice_rows(dB_slices_, task, t - begin, length);
      T* const dC = slice_rows(dC_slices_, task, t - begin, length);
      for (int64_t c = 0; c < block.count(); c += block.panel) {
        const int64_t channels = smaller(block.panel, block.count() - c);
        block.read_panel(c, channels, t, length);
        read_gradient(block, scratch, c, channels, t, length);
        for (int64_t i = 0; i < channels; ++i) {
          copy(scratch.h.get(), checkpoints + k * size + (c + i) * g_.padded, g_.padded);
          run_channel(block, scratch, c + i, i, t, length, dB, dC);
        }
        finish_panel(block, scratch, c, channels, t, length);
      }
    }
  }

  struct Scratch {
    static constexpr int64_t panel = Block<V>::panel;
    Buffer<T> h, a, sums;                              // [chunk + 1, padded], [chunk, padded], [3, padded]
    Buffer<T> grad_y, grad_out, along_B, along_A, du;  // [panel, chunk]

    explicit Scratch(const Geometry& g)
        : h((g.chunk + 1) * g.padded),
          a(g.chunk * g.padded),
          sums(3 * g.padded),
          grad_y(panel * g.chunk),
          grad_out(panel * g.chunk),
          along_B(panel * g.chunk),
          along_A(panel * g.chunk),
          du(panel * g.chunk) {}
  };

  // dB and dC are rows of the slice's partial sums, or null for a projection per channel.
  void run_channel(const Block<V>& block, const Scratch& scratch, int64_t c, int64_t row, int64_t t, int64_t length,
                   T* dB, T* dC) {
    const int64_t at = state_offset(block) + c * g_.padded;
    T *const dA = scratch.sums.get(), *const dB_c = dA + g_.padded, *const dC_c = dB_c + g_.padded;
    fill_zero(dA, 3 * g_.padded);
    Sweep<T> s;
    s.h = scratch.h.get(), s.a = scratch.a.get(), s.carry = carry_ + at, s.dA = dA;
    s.dB = dB ? dB : dB_c, s.dB_pitch = dB ? g_.padded : 0;
    s.dC = dC ? dC : dC_c, s.dC_pitch = dC ? g_.padded : 0;
    s.grad_y = scratch.grad_y.get(), s.y = block.y(), s.along_B = scratch.along_B.get();
    s.along_A = scratch.along_A.get();
    scan_states(block, c, row, scratch.h.get(), scratch.a.get(), in_.state, length, block.from_zero(t));
    sweep_channel(block, c, row, s, in_.state, length);
    add(dA_ + at, dA);
    if (!dB) add(dB_ + at, dB_c);
    if (!dC) add(dC_ + at, dC_c);
  }

  // The rows of a task in a partial sum [tasks, span, padded], set to zero; null for a projection per channel.
  T* slice_rows(T* slices, int64_t task, int64_t t, int64_t length) const {
    if (!slices) return nullptr;
    T* const rows = slices + (task * span_ + t) * g_.padded;
    fill_zero(rows, length * g_.padded);
    return rows;
  }

  void add(T* to, const T* from) const {
    for (int64_t n = 0; n < g_.padded; n += V::width) (V::load(to + n) + V::load(from + n)).store(to + n);
  }

  // The gradients of the result and of the result before the gate.
  void read_gradient(const Block<V>& block, const Scratch& scratch, int64_t c, int64_t channels, int64_t t,
                     int64_t length) {
    block.read_time_rows(scratch.grad_out.get(), args_.grad_out, c, channels, t, length);
    if (!given(in_.z)) return copy(scratch.grad_y.get(), scratch.grad_out.get(), channels * length);
    block.read_time_rows(block.z(), in_.z, c, channels, t, length);
    vectors<V>(channels * length, [&](int64_t i, int n) {
      const V grad_y = V::load_first(scratch.grad_out + i, n) * silu(V::load_first(block.z() + i, n));
      grad_y.store_first(scratch.grad_y + i, n);
    });
  }

  // du, ddelta, dz and the sums over time of this chunk.
  void finish_panel(const Block<V>& block, const Scratch& scratch, int64_t c, int64_t channels, int64_t t,
                    int64_t length) {
    T* const ddelta = scratch.along_A.get();
    T* const du = scratch.du.get();
    T* const dz = block.y();
    vectors<V>(channels * length, [&](int64_t i, int n) {
      const V raw = V::load_first(block.raw_delta() + i, n), along_B = V::load_first(scratch.along_B + i, n);
      V grad = V::fma(V::load_first(block.u() + i, n), along_B, V::load_first(ddelta + i, n));
      if (in_.delta_softplus) grad = grad * V::if_greater(raw, V::set1(T(20)), V::set1(T(1)), sigmoid(raw));
      grad.store_first(ddelta + i, n);
      (V::load_first(block.delta() + i, n) * along_B).store_first(du + i, n);
    });
    add_skip(in_, block, c, channels, length);
    if (given(args_.dz)) {
      vectors<V>(channels * length, [&](int64_t i, int n) {
        const V slope = silu_slope(V::load_first(block.z() + i, n));
        (V::load_first(scratch.grad_out + i, n) * V::load_first(dz + i, n) * slope).store_first(dz + i, n);
      });
    }
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t d = block.first() + c + i, row = block.batch() * in_.dim + d, at = i * length;
      const T skip = optional_element<T>(in_.D, d);
      double sum_D = 0, sum_delta = 0;
      for (int64_t s = at; s < at + length; ++s) {
        du[s] += skip * scratch.grad_y[s];
        sum_D += static_cast<double>(scratch.grad_y[s]) * static_cast<double>(block.u()[s]);
        sum_delta += static_cast<double>(ddelta[s]);
      }
      dD_[row] += sum_D;
      ddelta_bias_[row] += sum_delta;
      write_time_row(args_.du, row, t, du + at, length);
      write_time_row(args_.ddelta, row, t, ddelta + at, length);
      write_time_row(args_.dz, row, t, dz + at, length);
    }
  }

  void write_time_row(const TensorView& view, int64_t row, int64_t t, const T* from, int64_t length) const {
    if (given(view)) copy(static_cast<T*>(view.data) + row * in_.length + t, from, length);
  }

  // [B, G, N, L] of one span, from the partial sums of the slices of the group.
  void add_slices(const TensorView& out, const TensorView& projection, const T* slices, int64_t span) {
    if (per_channel(projection) || !given(out)) return;
    const int64_t groups = projection.shape[1], parts = g_.groups / groups * g_.slices;
    const int64_t begin = span * span_, length = smaller(span_, in_.length - begin), task_size = span_ * g_.padded;
    parallel(in_.batch * groups, share_, [&](int64_t bg) {
      Buffer<T> sum(g_.padded);
      for (int64_t t = 0; t < length; ++t) {
        const T* const part = slices + bg * parts * task_size + t * g_.padded;
        fill_zero(sum.get(), g_.padded);
        for (int64_t p = 0; p < parts; ++p) add(sum.get(), part + p * task_size);
        T* const to = static_cast<T*>(out.data) + bg * in_.state * in_.length + begin + t;
        for (int64_t n = 0; n < in_.state; ++n) to[n * in_.length] = sum[n];
      }
    });
  }

  // [D, N] from [B, D, padded].
  void add_batches(const TensorView& out, const T* parts) {
    if (!given(out)) return;
    parallel(in_.dim, share_ && in_.batch > 1, [&](int64_t d) {
      T* const to = static_cast<T*>(out.data) + d * in_.state;
      for (int64_t n = 0; n < in_.state; ++n) {
        T sum(0);
        for (int64_t b = 0; b < in_.batch; ++b) sum += parts[(b * in_.dim + d) * g_.padded + n];
        to[n] = sum;
      }
    });
  }

  // [D] from [B, D].
  void add_rows(const TensorView& out, const double* parts) {
    if (!given(out)) return;
    for (int64_t d = 0; d < in_.dim; ++d) {
      double sum = 0;
      for (int64_t b = 0; b < in_.batch; ++b) sum += parts[b * in_.dim + d];
      static_cast<T*>(out.data)[d] = static_cast<T>(sum);
    }
  }

  const SsmScanBwd& args_;
  const SsmScan& in_;
  Geometry g_;
  int64_t rows_, state_size_;  // B·D, B·D·padded
  bool share_;
  int64_t span_, spans_;  // time is worked on in spans, so that the partial sums of dB and dC stay bounded

  T *carry_, *dA_, *dB_, *dC_;  // [B, D, padded]
  T* starts_;                   // [spans - 1, B, D, padded]
  T *dB_slices_, *dC_slices_;   // [tasks, span, padded]
  double *dD_, *ddelta_bias_;   // [B, D]
};

}  // namespace fastlvm::FASTLVM_ISA::ssm_old
