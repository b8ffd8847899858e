// The forward pass of a whole model (network.h), windows a few at a time.
#pragma once

#include "predictor/mixing.h"

namespace fastlvm::FASTLVM_ISA::predict {

constexpr int64_t rows_at_once = 320;  // positions of all windows: activations stay in the second cache

// x Φ(x); the error of Φ is below 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline Vec gelu(Vec x) {
  const Vec one = Vec::set1(1), size = Vec::abs(x) * Vec::set1(0.70710678f);
  const Vec t = one / Vec::fma(Vec::set1(0.3275911f), size, one);
  Vec q = Vec::set1(1.061405429f);
  q = Vec::fma(q, t, Vec::set1(-1.453152027f));
  q = Vec::fma(q, t, Vec::set1(1.421413741f));
  q = Vec::fma(q, t, Vec::set1(-0.284496736f));
  q = Vec::fma(q, t, Vec::set1(0.254829592f));
  const Vec tail = Vec::set1(0.5f) * q * t * exp(Vec::zero() - size * size);  // 1 - Φ(|x|)
  return x * Vec::if_greater(Vec::zero(), x, tail, one - tail);
}

// Everything of a row but its padding, which stays zero.
template <class F>
inline void each_vector(const Rows& rows, F f) {
  each_row(rows.count, rows.dim, [&](int64_t r) {
    float* const row = rows.row(r);
    vectors<Vec>(rows.dim, [&](int64_t i, int n) { f(Vec::load_first(row + i, n), r, i, n).store_first(row + i, n); });
  });
}

inline void keep_newest(Stream& s) {
  if (s.positions == 1) return;
  const Rows left = {s.other, s.windows, s.now.dim};
  for (int64_t w = 0; w < s.windows; ++w)
    copy(left.row(w), s.now.row(w * s.positions + s.positions - 1), left.stride());
  s.turn(left);
  s.positions = 1;
}

inline void l2_norm(const Rows& rows) {
  each_row(rows.count, rows.dim, [&](int64_t r) {
    const float length = sqrtf(sum_of_squares(rows.row(r), rows.dim));
    const Vec scale = Vec::set1(1.0f / (length > 1e-12f ? length : 1e-12f));
    for (int64_t i = 0; i < rows.stride(); i += Vec::width) (Vec::load(rows.row(r) + i) * scale).store(rows.row(r) + i);
  });
}

// The newest rows of every window, at most network.positions of them. state: as many rows as that are, that of
// position p in row p % network.positions; the row that arrives is put there.
class Newest {
 public:
  Newest(const Run& run, const Rows& rows, int64_t windows, float* state)
      : rows_(rows),
        state_(state),
        seen_(run.args.seen),
        most_(run.args.network->positions),
        given_(rows.count / windows) {
    if (state) copy(state + seen_ % most_ * rows.stride(), rows.data, rows.stride());
  }

  int64_t count() const { return smaller(most_, state_ ? seen_ + 1 : given_); }
  // `back` positions ago.
  const float* row(int64_t window, int64_t back) const {
    return state_ ? state_ + (seen_ - back) % most_ * rows_.stride() : rows_.row((window + 1) * given_ - 1 - back);
  }

 private:
  const Rows& rows_;
  float* state_;
  int64_t seen_, most_, given_;
};

// h + Σ softmax(logits)ₜ contextₜ, of the newest positions where there are fewer.
inline void recency_mixture(const Run& run, const Stream& s, const float* logits, const Rows& context, float* state) {
  const Scratch scratch(run);
  const Newest newest(run, context, s.windows, state);
  const int64_t count = newest.count();
  float* const weights = run.take<float>(count);
  copy(weights, logits + run.args.network->positions - count, count);
  softmax(weights, count);
  for (int64_t w = 0; w < s.windows; ++w)
    for (int64_t back = 0; back < count; ++back)
      add_scaled(s.now.row(w), weights[count - 1 - back], newest.row(w, back), s.now.dim);
}

inline void flatten(const Run& run, Stream& s, float* state) {
  const Newest newest(run, s.now, s.windows, state);
  const int64_t dim = s.now.dim, count = newest.count();
  const Rows out = {s.other, s.windows, run.args.network->positions * dim};
  each_row(s.windows, out.dim, [&](int64_t w) {
    float* const to = out.row(w);
    for (int64_t back = 0; back < count; ++back) copy(to + back * dim, newest.row(w, back), dim);
    fill_zero(to + count * dim, out.stride() - count * dim);
  });
  s.turn(out);
  s.positions = 1;
}

// The windows of one pass through the layers.
class Pass {
 public:
  Pass(Run& run, int64_t first, int64_t windows) : run_(run), windows_(windows), first_(first) {}

  void operator()() {
    const Prediction& args = run_.args;
    const Network& network = *args.network;
    const Scratch scratch(run_);
    const int64_t rows = windows_ * args.positions, dim = network.dim;
    Stream s{run_.rows(rows, network.widest), run_.take<float>(rows * padded(network.widest)), windows_,
             args.positions};
    s.now.dim = dim;
    for (int64_t r = 0; r < rows; ++r) {
      copy(s.now.row(r), args.context + (first_ * args.positions + r) * dim, dim);
      fill_zero(s.now.row(r) + dim, s.now.stride() - dim);
    }
    context_ = run_.rows(rows, dim);
    copy(context_.data, s.now.data, rows * s.now.stride());
    for (run_.layer = 0; run_.layer < network.count; ++run_.layer) {
      run_layer(network.layers[run_.layer], s);
      run_.lap(Phase::elementwise);
    }
    run_.layer = network.count - 1;
    for (int64_t w = 0; w < windows_; ++w) copy(args.out + (first_ + w) * s.now.dim, s.now.row(w), s.now.dim);
    run_.lap(Phase::elementwise);
  }

 private:
  template <class T>
  static const T& of(const Layer& layer) {
    return *static_cast<const T*>(layer.details);
  }

  void run_layer(const Layer& layer, Stream& s) {
    float* const state = run_.args.state ? run_.args.state + layer.state : nullptr;
    switch (layer.kind) {
      case LayerKind::linear:
        return linear(of<Matrix>(layer), s);
      case LayerKind::norm:
        return apply(of<Norm>(layer), s.now, s.now);
      case LayerKind::mamba_block:
        return mamba_block(run_, s, of<MambaBlock>(layer), state);
      case LayerKind::mamba2_block:
        return mamba2_block(run_, s, of<Mamba2Block>(layer), state);
      case LayerKind::attention:
        return attention(run_, s, of<Attention>(layer), state);
      case LayerKind::recurrent:
        return recurrent(run_, s, of<Recurrent>(layer), state);
      case LayerKind::gelu:
        return each_vector(s.now, [](Vec v, int64_t, int64_t, int) { return gelu(v); });
      case LayerKind::positions:
        return add_positions(&of<float>(layer), s);
      case LayerKind::last:
        return keep_newest(s);
      case LayerKind::flatten:
        return flatten(run_, s, state);
      case LayerKind::residual:
        return residual(of<Network>(layer), s);
      case LayerKind::context:
        return copy(context_.data, s.now.data, s.now.count * s.now.stride());
      case LayerKind::recency_mixture:
        return recency_mixture(run_, s, &of<float>(layer), context_, state);
      case LayerKind::mixture:
        keep_newest(s);
        fill_zero(s.now.data, s.now.count * s.now.stride());
        return recency_mixture(run_, s, &of<float>(layer), context_, state);
      case LayerKind::context_attention:
        return context_attention(run_, s, of<ContextAttention>(layer));
      case LayerKind::l2_norm:
        return l2_norm(s.now);
    }
  }

  void linear(const Matrix& m, Stream& s) {
    const Scratch scratch(run_);
    const Rows out = s.next(m.outputs);
    multiply(run_, m, activations(run_, m, s.now), out);
    s.turn(out);
    run_.lap(Phase::linear);
  }

  void add_positions(const float* table, const Stream& s) {
    const int64_t width = s.now.stride();
    for (int64_t r = 0; r < s.now.count; ++r)
      add_scaled(s.now.row(r), 1, table + (run_.args.seen + r % s.positions) * width, s.now.dim);
  }

  void residual(const Network& inner, Stream& s) {
    const Scratch scratch(run_);
    const Rows before = run_.rows(s.now.count, s.now.dim);
    copy(before.data, s.now.data, before.count * before.stride());
    for (int64_t i = 0; i < inner.count; ++i) run_layer(inner.layers[i], s);
    each_vector(s.now, [&](Vec v, int64_t r, int64_t i, int n) { return v + Vec::load_first(before.row(r) + i, n); });
  }

  Run& run_;
  int64_t windows_, first_;
  Rows context_{};
};

inline void forward(const Prediction& args) {
  Run run(args);
  const int64_t at_once = larger(1, rows_at_once / larger(1, args.positions));
  for (int64_t first = 0; first < args.windows; first += at_once)
    Pass(run, first, smaller(at_once, args.windows - first))();
}

}  // namespace fastlvm::FASTLVM_ISA::predict
