// The other layers that look at several positions: attention, recurrent cells, Mamba-2.
#pragma once

#include "ops/ssd_scan.h"
#include "predictor/mamba.h"

namespace fastlvm::FASTLVM_ISA::predict {

inline float dot(const float* a, const float* b, int64_t dim) {
  Vec sum = Vec::zero();
  vectors<Vec>(dim,
               [&](int64_t i, int n) { sum = Vec::fma(Vec::load_first(a + i, n), Vec::load_first(b + i, n), sum); });
  return Vec::sum(sum);
}

// out += weight · x
inline void add_scaled(float* out, float weight, const float* x, int64_t dim) {
  vectors<Vec>(dim, [&](int64_t i, int n) {
    Vec::fma(Vec::set1(weight), Vec::load_first(x + i, n), Vec::load_first(out + i, n)).store_first(out + i, n);
  });
}

// scores → softmax of them
inline void softmax(float* scores, int64_t count) {
  float most = scores[0], sum = 0;
  for (int64_t i = 1; i < count; ++i) most = scores[i] > most ? scores[i] : most;
  for (int64_t i = 0; i < count; ++i) sum += scores[i] = expf(scores[i] - most);
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
}

// The stream is [q | k | v], 3 dim wide. state: the k and v of the last window - 1 positions, [2 dim] each, the place
// of position p being p % (window - 1).
inline void attention(Run& run, Stream& s, const Attention& m, float* state) {
  const Scratch scratch(run);
  const Rows in = s.now, out = s.next(m.dim);
  const int64_t positions = s.positions, kept = m.window - 1, head = m.dim / m.heads;
  const int64_t reach = smaller(m.window, (state ? run.args.seen : 0) + positions);
  const float scale = 1.0f / sqrtf(static_cast<float>(head));
  ranges(in.count, 1, in.count * m.dim * reach > work_worth_sharing, [&](int64_t begin, int64_t end) {
    const Buffer<float> scores(reach);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t t = r % positions, past = state ? run.args.seen : t;
      const int64_t count = smaller(m.window, past + 1);
      // Keys and values of `back` positions ago.
      const auto key = [&](int64_t back) -> const float* {
        if (back == 0 || !state) return in.row(r - back) + m.dim;
        return state + (past - back) % kept * 2 * m.dim;
      };
      float *const to = out.row(r), *const weights = scores.get();
      fill_zero(to, out.stride());
      for (int64_t h = 0; h < m.heads; ++h) {
        const float* const q = in.row(r) + h * head;
        for (int64_t back = 0; back < count; ++back) weights[back] = scale * dot(q, key(back) + h * head, head);
        softmax(weights, count);
        for (int64_t back = 0; back < count; ++back)
          add_scaled(to + h * head, weights[back], key(back) + m.dim + h * head, head);
      }
    }
  });
  if (state && kept > 0) copy(state + run.args.seen % kept * 2 * m.dim, in.row(0) + m.dim, 2 * m.dim);
  s.turn(out);
  run.lap(Phase::attention);
}

inline Vec tanh(Vec x) {
  const Vec two = Vec::set1(2);
  return two * sigmoid(two * x) - Vec::set1(1);
}

// Gates of a row from the projections of its input and of the state before; h, and c of an LSTM, become the new ones.
// As torch has them: GRU r, z, n; LSTM i, f, g, o; `width` apart.
inline void recurrent_row(const Recurrent& m, const float* input, const float* before, float* h, float* c) {
  const int64_t width = m.hidden;
  vectors<Vec>(m.hidden, [&](int64_t i, int n) {
    const auto in = [&](int gate) { return Vec::load_first(input + gate * width + i, n); };
    const auto old = [&](int gate) { return Vec::load_first(before + gate * width + i, n); };
    if (m.lstm) {
      const Vec cell =
          Vec::fma(sigmoid(in(1) + old(1)), Vec::load_first(c + i, n), sigmoid(in(0) + old(0)) * tanh(in(2) + old(2)));
      cell.store_first(c + i, n);
      (sigmoid(in(3) + old(3)) * tanh(cell)).store_first(h + i, n);
    } else {
      const Vec reset = sigmoid(in(0) + old(0)), keep = sigmoid(in(1) + old(1));
      const Vec fresh = tanh(Vec::fma(reset, old(2), in(2)));
      Vec::fma(keep, Vec::load_first(h + i, n) - fresh, fresh).store_first(h + i, n);
    }
  });
}

// state: h and c, padded(hidden) each.
inline void recurrent(Run& run, Stream& s, const Recurrent& m, float* state) {
  const Scratch scratch(run);
  const Rows out = s.next(m.hidden), gates = run.rows(s.now.count, m.input.outputs);
  multiply(run, m.input, activations(run, m.input, s.now), gates);
  const Rows h = state ? Rows{state, 1, m.hidden} : run.rows(s.windows, m.hidden);
  float* const cells = state ? state + h.stride() : run.take<float>(s.windows * h.stride());
  if (!state) fill_zero(h.data, s.windows * h.stride()), fill_zero(cells, s.windows * h.stride());
  const Rows before = run.rows(s.windows, m.recurrent.outputs);
  for (int64_t t = 0; t < s.positions; ++t) {
    const Scratch step(run);
    multiply(run, m.recurrent, activations(run, m.recurrent, h), before);
    each_row(s.windows, 8 * m.hidden, [&](int64_t w) {
      const int64_t row = w * s.positions + t;
      recurrent_row(m, gates.row(row), before.row(w), h.row(w), cells + w * h.stride());
      copy(out.row(row), h.row(w), h.stride());
    });
  }
  s.turn(out);
  run.lap(Phase::recurrent);
}

// [mean | attended] of every window.
inline void context_attention(Run& run, Stream& s, const ContextAttention& m) {
  const Scratch scratch(run);
  const Rows in = s.now, out = {s.other, s.windows, 2 * m.dim}, mean = run.rows(s.windows, m.dim);
  const Rows query = run.rows(s.windows, m.inner), keys = run.rows(in.count, m.inner);
  float* const scores = run.take<float>(in.count);
  const float share = 1.0f / static_cast<float>(s.positions), scale = 1.0f / sqrtf(static_cast<float>(m.inner));
  for (int64_t w = 0; w < s.windows; ++w) {
    fill_zero(mean.row(w), mean.stride());
    for (int64_t t = 0; t < s.positions; ++t) add_scaled(mean.row(w), share, in.row(w * s.positions + t), m.dim);
  }
  multiply(run, m.query, activations(run, m.query, mean), query);
  multiply(run, m.key, activations(run, m.key, in), keys);
  for (int64_t w = 0; w < s.windows; ++w) {
    float *const weights = scores + w * s.positions, *const to = out.row(w);
    for (int64_t t = 0; t < s.positions; ++t)
      weights[t] = scale * dot(query.row(w), keys.row(w * s.positions + t), m.inner);
    softmax(weights, s.positions);
    fill_zero(to, out.stride());
    copy(to, mean.row(w), m.dim);
    for (int64_t t = 0; t < s.positions; ++t) add_scaled(to + m.dim, weights[t], in.row(w * s.positions + t), m.dim);
  }
  s.turn(out);
  s.positions = 1;
  run.lap(Phase::attention);
}

inline TensorView view1(const float* data, int64_t size) {
  TensorView v;
  v.data = const_cast<float*>(data), v.dtype = DType::f32, v.rank = 1, v.shape[0] = size, v.stride[0] = 1;
  return v;
}

// [windows, positions, a, b] of rows `row` floats apart, b contiguous, a `step` apart.
inline TensorView view4(const float* data, int64_t windows, int64_t positions, int64_t row, int64_t a, int64_t step,
                        int64_t b) {
  TensorView v;
  v.data = const_cast<float*>(data), v.dtype = DType::f32, v.rank = 4;
  const int64_t shape[] = {windows, positions, a, b}, stride[] = {positions * row, row, step, 1};
  for (int i = 0; i < 4; ++i) v.shape[i] = shape[i], v.stride[i] = stride[i];
  return v;
}

// state: [width - 1, channels] inputs of the convolution, then [heads, head_dim, state] of the scan.
inline void mamba2_block(Run& run, Stream& s, const Mamba2Block& m, float* state) {
  const Scratch scratch(run);
  const int64_t rows = s.now.count, inner = m.heads * m.head_dim, bc = m.groups * m.state;
  const Rows normed = run.rows(rows, m.dim), xbc = run.rows(rows, inner + 2 * bc), z = run.rows(rows, inner);
  const Rows dt = run.rows(rows, m.heads), y = run.rows(rows, inner);
  apply(m.norm, s.now, normed);
  const Activations a = activations(run, m.in_z, normed);
  run.lap(Phase::elementwise);
  multiply(run, m.in_z, a, z, false, [&](int64_t begin, int64_t end) { gate(z, begin, end); });
  multiply(run, m.in_xbc, a, xbc, false, [&](int64_t begin, int64_t end) {
    convolve(m.conv_weight, m.conv_bias, m.width, xbc, s.positions, state, begin, end);
  });
  multiply(run, m.in_dt, a, dt);
  run.lap(Phase::in_proj);

  float* const h = state ? state + (m.width - 1) * xbc.stride() : nullptr;
  SsdScan scan{};
  scan.batch = s.windows, scan.length = s.positions, scan.heads = m.heads, scan.dim = m.head_dim;
  scan.groups = m.groups, scan.state = m.state, scan.dt_softplus = true;
  const auto time = [&](const Rows& r, int64_t from, int64_t count, int64_t size) {
    return view4(r.data + from, s.windows, s.positions, r.stride(), count, size, size);
  };
  scan.x = time(xbc, 0, m.heads, m.head_dim), scan.out = time(y, 0, m.heads, m.head_dim);
  scan.B = time(xbc, inner, m.groups, m.state), scan.C = time(xbc, inner + bc, m.groups, m.state);
  scan.dt = time(dt, 0, m.heads, 1), scan.dt.rank = 3, scan.dt.stride[2] = 1;
  scan.A = view1(m.A, m.heads), scan.D = view1(m.D, m.heads), scan.dt_bias = view1(m.dt_bias, m.heads);
  const Rows kept = h ? run.rows(1, inner * m.state) : Rows{};
  if (h) {
    copy(kept.data, h, inner * m.state);
    scan.initial_state = view4(kept.data, 1, m.heads, m.head_dim * m.state, m.head_dim, m.state, m.state);
    scan.final_state = view4(h, 1, m.heads, m.head_dim * m.state, m.head_dim, m.state, m.state);
  }
  ssd::forward<Vec>(scan);
  run.lap(Phase::scan);

  each_row(rows, inner, [&](int64_t r) {
    float* const row = y.row(r);
    fill_zero(row + inner, y.stride() - inner);
    for (int64_t i = 0; i < y.stride(); i += Vec::width) (Vec::load(row + i) * Vec::load(z.row(r) + i)).store(row + i);
    norm_row(m.gate_norm, row, row);
  });
  const Activations ay = activations(run, m.out_proj, y);
  run.lap(Phase::elementwise);
  multiply(run, m.out_proj, ay, s.now, true);
  run.lap(Phase::out_proj);
}

}  // namespace fastlvm::FASTLVM_ISA::predict
