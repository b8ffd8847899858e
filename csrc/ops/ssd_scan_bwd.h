// The gradients of the scan of Mamba-2; ssd_scan.h says how the work is cut up.
//
// A first pass leaves the state before every chunk, a second walks the chunks backwards with the gradient of the state
// after them. Gradients of B and C are sums over the heads of a group: a slice of heads adds up its own, slices are
// added in order, and how many there are depends on the shapes alone, so no bit of a result depends on the threads.
#pragma once

#include "ops/ssd_scan.h"

namespace fastlvm::FASTLVM_ISA::ssd {

template <class V>
class Backward {
 public:
  using T = typename V::scalar;

  explicit Backward(const SsdScanBwd& args)
      : args_(args),
        in_(args.forward),
        g_(in_, wanted_slices(in_)),
        rows_(in_.batch * in_.heads),
        projections_(count(in_.B)),
        share_(worth_sharing(in_)) {}

  void run() {
    if (rows_ == 0 || in_.dim == 0) return fill_zero_all();
    Buffer<T> dB(given(args_.dB) ? (g_.slices - 1) * projections_ : 0);
    Buffer<T> dC(given(args_.dC) ? (g_.slices - 1) * projections_ : 0);
    Buffer<double> dA(rows_), ddt_bias(rows_), dD(given(args_.dD) ? rows_ * in_.dim : 0);
    dB_ = dB.get(), dC_ = dC.get(), dA_ = dA.get(), ddt_bias_ = ddt_bias.get(),
    dD_ = given(args_.dD) ? dD.get() : nullptr;
    parallel(g_.tasks(in_), share_, [&](int64_t task) { run_task(task); });
    add_slices(args_.dB, dB_);
    add_slices(args_.dC, dC_);
    add_sequences(args_.dA, dA_, 1);
    add_sequences(args_.ddt_bias, ddt_bias_, 1);
    add_sequences(args_.dD, dD_, in_.dim);
  }

 private:
  static int64_t wanted_slices(const SsdScan& in) {
    constexpr int64_t wanted_tasks = 16, heads = 4;  // at least, in a slice: each scores the tokens for itself
    return smaller(div_up(wanted_tasks, larger(1, in.batch * in.groups)), div_up(in.heads / in.groups, heads));
  }

  static int64_t count(const TensorView& view) {
    int64_t product = 1;
    for (int i = 0; i < view.rank; ++i) product *= view.shape[i];
    return product;
  }

  void fill_zero_all() const {
    const TensorView* const all[] = {&args_.dx, &args_.ddt,      &args_.dA,
                                     &args_.dB, &args_.dC,       &args_.dD,
                                     &args_.dz, &args_.ddt_bias, &args_.dinitial_state};
    for (const TensorView* view : all)
      if (given(*view)) fill_zero(static_cast<T*>(view->data), count(*view));
  }

  // Rows [Q, ..] of one head, in the pitches of the block; those over Q and Q·Q last.
  struct Scratch {
    Buffer<T> grad_out, grad_y, grad_decayed, du, dC_head;
    Buffer<T> dB, dC, decays, products, dscores, across, steps;

    explicit Scratch(const Block<V>& b)
        : grad_out(b.chunk() * b.p()),
          grad_y(b.chunk() * b.p()),
          grad_decayed(b.chunk() * b.p()),  // grad_y decayed from the chunk's start
          du(b.chunk() * b.p()),            // of dt x
          dC_head(b.chunk() * b.n()),
          dB(b.chunk() * b.n()),  // of all heads of the slice
          dC(b.chunk() * b.n()),
          decays(b.chunk() * b.q()),
          products(b.chunk() * b.q()),  // grad_y_t · x_i
          dscores(b.chunk() * b.q()),   // of all heads of the slice
          across(b.p() * b.q()),        // x as [P, Q]
          steps(4 * b.q(), T(0)) {}
  };

  void run_task(int64_t task) {
    Block<V> block(in_, g_, task);
    const int64_t chunks = div_up(block.length(), block.chunk()), size = block.state_size(), all = block.count() * size;
    Buffer<T> starts(chunks * all), carry(all, T(0));
    find_starts(block, starts.get(), chunks);
    if (given(args_.grad_final_state)) block.read_states(carry.get(), args_.grad_final_state);
    const int64_t row = block.sequence() * in_.heads + block.first();
    for (int64_t h = row; h < row + block.count(); ++h) dA_[h] = ddt_bias_[h] = 0;
    if (dD_)
      for (int64_t i = row * in_.dim; i < (row + block.count()) * in_.dim; ++i) dD_[i] = 0;

    Scratch scratch(block);
    for (int64_t k = chunks - 1; k >= 0; --k) {
      const int64_t t = k * block.chunk(), tokens = block.tokens(t);
      block.read_projections(t, tokens);
      block.score(tokens);
      fill_zero(scratch.dB.get(), tokens * block.n());
      fill_zero(scratch.dC.get(), tokens * block.n());
      fill_zero(scratch.dscores.get(), tokens * block.q());
      for (int64_t h = 0; h < block.count(); ++h) {
        const bool from_zero = k == 0 && !given(in_.initial_state);
        const bool ends = k == chunks - 1 && !given(args_.grad_final_state);
        run_head(block, scratch, block.first() + h, t, tokens, from_zero ? nullptr : starts + k * all + h * size,
                 carry + h * size, ends);
      }
      finish_projections(block, scratch, t, tokens);
    }
    block.write_states(args_.dinitial_state, carry.get());
  }

  // The states before every chunk; none before the first if the sequence starts from zero.
  void find_starts(Block<V>& block, T* starts, int64_t chunks) {
    const int64_t size = block.state_size(), all = block.count() * size;
    const bool from_zero = !given(in_.initial_state);
    if (chunks > 0 && !from_zero) block.read_states(starts, in_.initial_state);
    for (int64_t k = 0; k + 1 < chunks; ++k) {
      const int64_t t = k * block.chunk();
      block.read_projections(t, block.chunk());
      for (int64_t h = 0; h < block.count(); ++h) {
        T *const before = starts + k * all + h * size, *const after = before + all;
        block.read_steps(block.first() + h, t, block.chunk());
        block.read_inputs(block.first() + h, t, block.chunk());
        if (k > 0 || !from_zero) copy(after, before, size);
        block.advance(after, k == 0 && from_zero, block.chunk());
      }
    }
  }

  // One head over one chunk. `start` is the state before it, null for zero; `carry` is the gradient of the state after
  // it, then of the state before it; it is zero at first where the sequence `ends` here.
  void run_head(Block<V>& block, const Scratch& s, int64_t head, int64_t t, int64_t tokens, const T* start, T* carry,
                bool ends) {
    const int64_t p = block.p(), n = block.n(), q = block.q();
    T *const dlog = s.steps.get(), *const ddt = dlog + q, *const to_start = dlog + 2 * q, *const reach = dlog + 3 * q;
    block.read_steps(head, t, tokens);
    block.read_inputs(head, t, tokens);
    block.weigh(tokens, s.decays.get());
    read_gradient(block, s, head, t, tokens);
    block.scale_rows(s.grad_decayed.get(), s.grad_y.get(), block.from_start(), tokens);
    block.scale_rows(block.kept(), block.input(), block.to_end(), tokens);

    fill_zero(reach, q);
    fill_zero(to_start, q);
    T through(0);
    if (!ends) {
      multiply<V>(tokens, p, in_.state, {block.B(), n, 1}, {carry, p}, {s.du.get(), p, false, T(1), block.to_end()});
      for (int64_t i = 0; i < tokens; ++i) reach[i] = dot(block.input() + i * p, s.du + i * p, p);
      if (given(args_.dB))
        multiply<V>(tokens, n, in_.dim, {block.kept(), p, 1}, {block.turned(carry), n}, {s.dB.get(), n, true});
      if (start) through = block.from_start()[tokens - 1] * dot(start, carry, block.state_size());
    }
    if (start) {
      multiply<V>(tokens, n, in_.dim, {s.grad_decayed.get(), p, 1}, {block.turned(start), n}, {s.dC_head.get(), n});
      for (int64_t i = 0; i < tokens; ++i) to_start[i] = dot(block.C() + i * n, s.dC_head + i * n, n);
      for (int64_t i = 0; i < tokens * n; i += V::width) (V::load(s.dC + i) + V::load(s.dC_head + i)).store(s.dC + i);
    }
    transpose<V>(s.across.get(), q, block.x(), p, tokens, in_.dim);
    block.lower_product(s.products.get(), s.grad_y.get(), p, s.across.get(), in_.dim, tokens);
    through_decays(block, s, tokens, dlog, reach, to_start, through);
    multiply<V, Terms::from_row>(tokens, p, tokens, {block.weights(), 1, q}, {s.grad_y.get(), p},
                                 {s.du.get(), p, !ends});
    for (int64_t i = 0; i < tokens; ++i) ddt[i] = dot(block.x() + i * p, s.du + i * p, p);

    finish_steps(block, head, t, tokens, dlog, ddt);
    finish_gate(block, s, head, t, tokens, start);
    finish_inputs(block, s, head, t, tokens);
    multiply<V>(in_.state, p, tokens, {block.C(), 1, n}, {s.grad_decayed.get(), p},
                {carry, p, !ends, block.from_start()[tokens - 1]});
  }

  // The gradients of the result and of the result before the gate.
  void read_gradient(const Block<V>& block, const Scratch& s, int64_t head, int64_t t, int64_t tokens) {
    const int64_t p = block.p();
    if (!given(args_.grad_out)) return fill_zero(s.grad_out.get(), tokens * p), fill_zero(s.grad_y.get(), tokens * p);
    block.read_rows(s.grad_out.get(), p, args_.grad_out, head, t, tokens, in_.dim);
    if (!given(in_.z)) return copy(s.grad_y.get(), s.grad_out.get(), tokens * p);
    block.read_rows(block.z(), p, in_.z, head, t, tokens, in_.dim);
    for (int64_t i = 0; i < tokens * p; i += V::width)
      (V::load(s.grad_out + i) * silu(V::load(block.z() + i))).store(s.grad_y + i);
  }

  // Adds the gradient of the scores to s.dscores and leaves that of log_decay in `dlog`. The decay of token t is in all
  // that flows from i < t to t' >= t: walking t down, reach[i] holds what flows from i to such t' (at first: out of the
  // chunk), `through` what flows to them from before the chunk (at first: to beyond it). Only sums: nothing cancels
  // that does not cancel in the gradient itself.
  void through_decays(const Block<V>& block, const Scratch& s, int64_t tokens, T* dlog, T* reach, const T* to_start,
                      T through) {
    const int64_t q = block.q();
    for (int64_t t = tokens - 1; t >= 0; --t) {
      V sum = V::zero();
      for (int64_t i = 0; i <= t; i += V::width) {
        const int before = static_cast<int>(smaller(V::width, t - i));
        const int64_t at = t * q + i;
        const V grad = V::load(s.decays + at) * V::load(block.dt() + i) * V::load(s.products + at);
        const V dscore = V::first(grad, static_cast<int>(smaller(V::width, t - i + 1)));
        (V::load(s.dscores + at) + dscore).store(s.dscores + at);
        const V flow = V::load(reach + i) + V::first(dscore * V::load(block.scores() + at), before);
        flow.store(reach + i);
        sum = sum + V::first(flow, before);
      }
      through += to_start[t];
      dlog[t] = V::sum(sum) + through;
    }
  }

  void finish_steps(const Block<V>& block, int64_t head, int64_t t, int64_t tokens, const T* dlog, T* ddt) {
    const T A = optional_element<T>(in_.A, head);
    const int64_t row = block.sequence() * in_.heads + head;
    double sum_A = 0, sum_bias = 0;
    vectors<V>(tokens, [&](int64_t i, int) {
      const V raw = V::load(block.raw_dt() + i);
      V grad = V::fma(V::set1(A), V::load(dlog + i), V::load(ddt + i));
      if (in_.dt_softplus) grad = grad * softplus_slope(raw);
      grad.store(ddt + i);
    });
    for (int64_t i = 0; i < tokens; ++i) {
      sum_A += static_cast<double>(block.dt()[i]) * static_cast<double>(dlog[i]);
      sum_bias += static_cast<double>(ddt[i]);
      if (given(args_.ddt)) static_cast<T*>(args_.ddt.data)[time_row(block, t + i) * in_.heads + head] = ddt[i];
    }
    dA_[row] += sum_A;
    ddt_bias_[row] += sum_bias;
  }

  void finish_gate(Block<V>& block, const Scratch& s, int64_t head, int64_t t, int64_t tokens, const T* start) {
    if (!given(args_.dz)) return;
    if (!given(args_.grad_out)) return write_rows(args_.dz, block, head, t, tokens, s.grad_out.get());  // zeros
    block.attend(start, tokens);
    block.add_skip(head, tokens);
    for (int64_t i = 0; i < tokens * block.p(); i += V::width) {
      const V slope = silu_slope(V::load(block.z() + i));
      (V::load(s.grad_out + i) * V::load(block.y() + i) * slope).store(block.y() + i);
    }
    write_rows(args_.dz, block, head, t, tokens, block.y());
  }

  void finish_inputs(Block<V>& block, const Scratch& s, int64_t head, int64_t t, int64_t tokens) {
    const int64_t p = block.p();
    if (dD_) {
      double* const to = dD_ + (block.sequence() * in_.heads + head) * in_.dim;
      for (int64_t i = 0; i < tokens; ++i)
        for (int64_t j = 0; j < in_.dim; ++j)
          to[j] += static_cast<double>(s.grad_y[i * p + j]) * static_cast<double>(block.x()[i * p + j]);
    }
    if (!given(args_.dx)) return;
    block.scale_rows(s.du.get(), s.du.get(), block.dt(), tokens);
    if (block.read_skip(head))
      for (int64_t i = 0; i < tokens * p; i += V::width)
        V::fma(V::load(block.skip() + i % p), V::load(s.grad_y + i), V::load(s.du + i)).store(s.du + i);
    write_rows(args_.dx, block, head, t, tokens, s.du.get());
  }

  // Adds what flows through the scores, and writes the slice's sums for this chunk.
  void finish_projections(const Block<V>& block, const Scratch& s, int64_t t, int64_t tokens) {
    const int64_t n = block.n(), q = block.q();
    if (given(args_.dC)) {
      multiply<V, Terms::up_to_row>(tokens, n, tokens, {s.dscores.get(), q, 1}, {block.B(), n}, {s.dC.get(), n, true});
      write_projection(args_.dC, dC_, block, t, tokens, s.dC.get());
    }
    if (given(args_.dB)) {
      multiply<V, Terms::from_row>(tokens, n, tokens, {s.dscores.get(), 1, q}, {block.C(), n}, {s.dB.get(), n, true});
      write_projection(args_.dB, dB_, block, t, tokens, s.dB.get());
    }
  }

  int64_t time_row(const Block<V>& block, int64_t t) const { return block.entry() * in_.length + block.begin() + t; }

  void write_rows(const TensorView& view, const Block<V>& block, int64_t head, int64_t t, int64_t tokens,
                  const T* rows) const {
    for (int64_t i = 0; i < tokens; ++i)
      copy(static_cast<T*>(view.data) + (time_row(block, t + i) * in_.heads + head) * in_.dim, rows + i * block.p(),
           in_.dim);
  }

  // The first slice writes into the result, the others into `slices` [slices - 1, B, L, G, N].
  void write_projection(const TensorView& view, T* slices, const Block<V>& block, int64_t t, int64_t tokens,
                        const T* rows) const {
    T* const to = block.slice() == 0 ? static_cast<T*>(view.data) : slices + (block.slice() - 1) * projections_;
    for (int64_t i = 0; i < tokens; ++i)
      copy(to + (time_row(block, t + i) * in_.groups + block.group()) * in_.state, rows + i * block.n(), in_.state);
  }

  void add_slices(const TensorView& out, const T* slices) const {
    if (!given(out) || g_.slices == 1) return;
    constexpr int64_t block = 1 << 14;
    T* const to = static_cast<T*>(out.data);
    parallel(div_up(projections_, block), share_, [&](int64_t task) {
      const int64_t end = smaller(projections_, (task + 1) * block);
      for (int64_t s = 0; s < g_.slices - 1; ++s)
        for (int64_t i = task * block; i < end; ++i) to[i] += slices[s * projections_ + i];
    });
  }

  // [H] or [H, P] from [B, H, width].
  void add_sequences(const TensorView& out, const double* parts, int64_t width) const {
    if (!given(out)) return;
    const int64_t columns = out.rank == 2 ? width : 1, each = width / columns;
    for (int64_t i = 0; i < in_.heads * columns; ++i) {
      double sum = 0;
      for (int64_t b = 0; b < in_.batch; ++b)
        for (int64_t j = 0; j < each; ++j) sum += parts[(b * in_.heads * columns + i) * each + j];
      static_cast<T*>(out.data)[i] = static_cast<T>(sum);
    }
  }

  // Of rows in whole vectors, padded with zeros.
  static T dot(const T* a, const T* b, int64_t count) {
    V sum = V::zero();
    for (int64_t i = 0; i < count; i += V::width) sum = V::fma(V::load(a + i), V::load(b + i), sum);
    return V::sum(sum);
  }

  const SsdScanBwd& args_;
  const SsdScan& in_;
  Geometry g_;
  int64_t rows_;         // B·H
  int64_t projections_;  // elements of B and C
  bool share_;

  T *dB_ = nullptr, *dC_ = nullptr;                             // of the slices but the first
  double *dA_ = nullptr, *ddt_bias_ = nullptr, *dD_ = nullptr;  // [B, H], [B, H], [B, H, P] or null
};

}  // namespace fastlvm::FASTLVM_ISA::ssd
