// Random models for model.cpp: layers of every kind that fit each other, with weights that keep numbers near one.
#pragma once

#include <functional>
#include <memory>
#include <numeric>

#include "arrays.h"
#include "predictor/model.h"

namespace fastlvm::test {

// Weights in memory of exactly their size. Their place stays; a builder reads them as often as it likes.
class Weights {
 public:
  explicit Weights(Draws& draw) : draw_(draw), precision_(draw.pick("precision", {0, 1, 2, mixed})) {}

  bool is_fp32() const { return precision_ == 0; }
  int64_t precision() const { return precision_; }

  template <class F>
  const float* floats(int64_t count, F value) {
    float* const to = place<float>(count);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(value());
    return to;
  }
  const float* floats(int64_t count, double mean, double spread) {
    return floats(count, [&] { return mean + spread * draw_.normal(); });
  }

  MatrixSource matrix(int64_t outputs, int64_t inputs, bool biased, double bias = 0) {
    const int64_t kind = precision_ == mixed ? draw_.below(3) : precision_;
    MatrixSource m{static_cast<Precision>(kind), outputs, inputs, nullptr, nullptr, nullptr};
    const float* const weight = floats(outputs * inputs, 0, 1 / std::sqrt(static_cast<double>(inputs)));
    m.weight = weight;
    if (m.precision == Precision::bf16) m.weight = to_bf16(weight, outputs * inputs);
    if (m.precision == Precision::int8) to_int8(weight, m);
    if (biased) m.bias = floats(outputs, bias, 0.3);
    return m;
  }

  NormSource norm(int64_t dim, bool centred) {
    // A norm of few numbers turns on the sign of one that is near zero.
    const float eps = dim < 8 ? 0.5f : 1e-5f;
    return {{dim, floats(dim, 1, 0.2)}, centred ? floats(dim, 0, 0.2) : nullptr, eps};
  }

 private:
  static constexpr int64_t mixed = 3;

  template <class T>
  T* place(int64_t count) {
    kept_.push_back(std::make_unique<Memory>(static_cast<size_t>(count) * sizeof(T), Memory::heap));
    return reinterpret_cast<T*>(kept_.back()->data());
  }

  const uint16_t* to_bf16(const float* from, int64_t count) {
    uint16_t* const to = place<uint16_t>(count);
    for (int64_t i = 0; i < count; ++i) to[i] = host::to_bf16(from[i]);
    return to;
  }

  void to_int8(const float* from, MatrixSource& m) {
    int8_t* const to = place<int8_t>(m.outputs * m.inputs);
    float* const scale = place<float>(m.outputs);
    for (int64_t o = 0; o < m.outputs; ++o) {
      const float *const begin = from + o * m.inputs, *const end = begin + m.inputs;
      const float most =
          std::fabs(*std::max_element(begin, end, [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
      const bool zero = draw_.below(40) == 0;
      scale[o] = zero ? 0 : most / 127;
      std::transform(begin, end, to + o * m.inputs, [&](float x) {
        return static_cast<int8_t>(zero ? 0 : std::lround(std::clamp(127 * x / most, -127.0f, 127.0f)));
      });
    }
    m.weight = to, m.scale = scale;
  }

  Draws& draw_;
  int64_t precision_;
  std::vector<std::unique_ptr<Memory>> kept_;
};

// A list of layers, from which models of any number of positions are built: what a stream of `positions` gives after
// n vectors is what the model of n positions gives.
class RandomModel {
 public:
  RandomModel(uint64_t seed, Coverage* coverage)
      : draw_(seed, coverage),
        large_(draw_.pick("large", {0, 0, 0, 0, 0, 1}) != 0),
        positions_(large_ ? draw_.pick("positions of a large one", {1, 5}) : draw_.pick("positions", {1, 2, 3, 5, 9})),
        dim_(size("dim")),
        width_(dim_),
        weights_(draw_) {
    for (int64_t left = draw_.pick("sequence layers", {0, 1, 2, 3}); left > 0; --left) sequence_layer(0);
    end_of_sequence();
    for (int64_t left = draw_.pick("vector layers", {0, 1, 2}); left > 0; --left) vector_layer(0);
  }

  int64_t positions() const { return positions_; }
  int64_t dim() const { return dim_; }
  int64_t steps() const { return positions_ + 3; }  // that a stream may take
  bool streams() const { return streams_; }
  Precision lowest() const { return static_cast<Precision>(std::min<int64_t>(weights_.precision(), 2)); }
  const std::string& text() const { return draw_.text(); }
  Draws& draw() { return draw_; }

  Model build(int64_t positions) const {
    return Model(positions, dim_, [&](Builder& builder) {
      for (const Step& step : steps_) step(builder, positions);
    });
  }

 private:
  using Step = std::function<void(Builder&, int64_t positions)>;

  int64_t size(const char* what) {
    if (large_) return draw_.pick(std::string("large ") + what, {97, 160});
    return draw_.pick(what, {1, 2, 3, 5, 8, 15, 16, 17, 31, 33});
  }
  int64_t state_size() { return draw_.pick("state", {1, 2, 3, 8, 17, 37}); }
  int64_t conv_width() { return draw_.pick("conv width", {1, 2, 4, 5}); }

  template <class F>
  void add(F step) {
    steps_.push_back([step](Builder& builder, int64_t) { step(builder); });
  }

  void linear(int64_t outputs) {
    const MatrixSource m = weights_.matrix(outputs, width_, draw_.coin("bias"));
    add([=](Builder& b) { b.linear(m); });
    width_ = outputs;
  }
  void widen_to(int64_t outputs) {
    if (width_ != outputs) linear(outputs);
  }
  void norm() {
    const NormSource n = weights_.norm(width_, draw_.coin("centred"));
    add([=](Builder& b) { b.norm(n); });
  }
  void l2_norm() {
    if (width_ < 8) linear(8);
    add([](Builder& b) { b.l2_norm(); });
  }
  void gelu() {
    add([](Builder& b) { b.gelu(); });
  }

  void mamba() {
    const int64_t inner = size("inner"), state = state_size(), width = conv_width();
    const int64_t rank = draw_.pick("rank", {1, 3, 16, 18});
    MambaSource m{};
    m.norm = weights_.norm(width_, false);
    m.in_proj = weights_.matrix(2 * inner, width_, false);
    m.x_proj = weights_.matrix(rank + 2 * state, inner, false);
    m.dt_proj = weights_.matrix(inner, rank, true, -1);
    m.out_proj = weights_.matrix(width_, inner, false);
    m.width = width, m.state = state;
    m.conv_weight = weights_.floats(inner * width, 0, 1 / std::sqrt(static_cast<double>(width)));
    m.conv_bias = weights_.floats(inner, 0, 0.2);
    m.A = decays(inner * state), m.D = weights_.floats(inner, 1, 0.2);
    add([=](Builder& b) { b.mamba_block(m); });
  }

  void mamba2() {
    const int64_t heads = draw_.pick("heads", {1, 2, 6}), state = state_size(), width = conv_width();
    const int64_t head_dim = large_ ? 40 : draw_.pick("head dim", {1, 3, 8, 17});
    const int64_t groups = std::gcd(heads, draw_.pick("groups", {1, 2, 6})), inner = heads * head_dim;
    const int64_t channels = inner + 2 * groups * state;
    Mamba2Source m{};
    m.norm = weights_.norm(width_, false), m.gate_norm = weights_.norm(inner, false);
    m.in_proj = weights_.matrix(inner + channels + heads, width_, false);
    m.out_proj = weights_.matrix(width_, inner, false);
    m.heads = heads, m.head_dim = head_dim, m.groups = groups, m.state = state, m.width = width;
    m.conv_weight = weights_.floats(channels * width, 0, 1 / std::sqrt(static_cast<double>(width)));
    m.conv_bias = weights_.floats(channels, 0, 0.2);
    m.A = decays(heads), m.D = weights_.floats(heads, 1, 0.2), m.dt_bias = weights_.floats(heads, -1, 0.5);
    add([=](Builder& b) { b.mamba2_block(m); });
  }

  const float* decays(int64_t count) {
    return weights_.floats(count, [&] { return -std::exp(draw_.normal()); });
  }

  void attention() {
    const int64_t heads = draw_.pick("heads", {1, 2, 6}), head = large_ ? 24 : draw_.pick("head dim", {1, 3, 8, 17});
    const int64_t window = draw_.pick("window", {1, 2, 4, 100});
    widen_to(3 * heads * head);
    add([=](Builder& b) { b.attention(heads, window); });
    width_ = heads * head;
  }

  void recurrent(bool lstm) {
    const int64_t hidden = size("hidden"), gates = (lstm ? 4 : 3) * hidden;
    const MatrixSource input = weights_.matrix(gates, width_, true), cells = weights_.matrix(gates, hidden, true);
    add([=](Builder& b) { b.recurrent(lstm, input, cells); });
    width_ = hidden;
  }

  void position_table() {
    const int64_t count = steps(), dim = width_;
    const float* const table = weights_.floats(count * dim, 0, 0.5);
    add([=](Builder& b) { b.positions(table, count, dim); });
  }

  void mixture(bool alone) {
    widen_to(dim_);
    const float* const logits = weights_.floats(positions_, 0, 1);
    const std::vector<float> own(logits, logits + positions_);
    steps_.push_back([own, alone](Builder& b, int64_t positions) {
      std::vector<float> newest(static_cast<size_t>(positions), -1e30f);  // of no weight
      for (size_t back = 0; back < std::min(own.size(), newest.size()); ++back)
        newest[newest.size() - 1 - back] = own[own.size() - 1 - back];
      b.recency_mixture(newest.data(), positions, alone);
    });
  }

  void flatten() {
    add([](Builder& b) { b.flatten(); });
    width_ *= positions_;
    streams_ = false;  // a shorter context's model would be narrower from here on
  }

  void context_attention() {
    const int64_t inner = size("inner");
    const MatrixSource query = weights_.matrix(inner, width_, true), key = weights_.matrix(inner, width_, true);
    add([=](Builder& b) { b.context_attention(query, key); });
    width_ *= 2;
    streams_ = false;
  }

  template <class F>
  void residual(int depth, F layer) {
    const int64_t before = width_;
    add([](Builder& b) { b.begin_residual(); });
    for (int64_t left = draw_.pick("layers of a branch", {0, 1, 2}); left > 0; --left) layer(depth + 1);
    widen_to(before);
    add([](Builder& b) { b.end_residual(); });
  }

  void sequence_layer(int depth) {
    enum { lin, nrm, mam, mam2, att, gru, lstm, gel, pos, con, l2, res };
    switch (draw_.pick("sequence layer", {lin, nrm, mam, mam, mam2, att, gru, lstm, gel, pos, con, l2, res, res})) {
      case lin:
        return linear(size("width"));
      case nrm:
        return norm();
      case mam:
        return mamba();
      case mam2:
        return mamba2();
      case att:
        return attention();
      case gru:
        return recurrent(false);
      case lstm:
        return recurrent(true);
      case gel:
        return gelu();
      case pos:
        return position_table();
      case con:
        widen_to(dim_);
        return add([](Builder& b) { b.context(); });
      case l2:
        return l2_norm();
      case res:
        return depth < 2 ? residual(depth, [this](int deeper) { sequence_layer(deeper); }) : norm();
    }
  }

  void end_of_sequence() {
    enum { last, last_of_mamba, attended, flat, mixed };
    const int64_t end = draw_.pick("end of the sequence", {last, last_of_mamba, last_of_mamba, attended, flat, mixed});
    if (end == flat) return flatten();
    if (end == attended) return context_attention();
    if (end == mixed) return mixture(true);
    if (end == last_of_mamba) mamba();
    add([](Builder& b) { b.last(); });
  }

  void vector_layer(int depth) {
    enum { lin, nrm, gel, l2, mix, res };
    switch (draw_.pick("vector layer", {lin, nrm, gel, l2, mix, mix, res})) {
      case lin:
        return linear(size("width"));
      case nrm:
        return norm();
      case gel:
        return gelu();
      case l2:
        return l2_norm();
      case mix:
        return mixture(false);
      case res:
        return depth < 2 ? residual(depth, [this](int deeper) { vector_layer(deeper); }) : norm();
    }
  }

  Draws draw_;
  bool large_;
  int64_t positions_, dim_, width_;
  bool streams_ = true;
  Weights weights_;
  std::vector<Step> steps_;
};

}  // namespace fastlvm::test
