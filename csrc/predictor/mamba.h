// The Mamba block of the predictor: five phases, each spread over the team. The scan is that of ops/ssm_scan.h.
#pragma once

#include "ops/ssm_scan.h"
#include "predictor/stream.h"

namespace fastlvm::FASTLVM_ISA::predict {

// Depthwise over the positions of every window, with SiLU, in place; channels [begin, end). `before`, if given, holds
// the inputs before the first position, [width - 1, channels], and takes the last ones.
inline void convolve(const float* weight, const float* bias, int64_t width, const Rows& x, int64_t positions,
                     float* before, int64_t begin, int64_t end) {
  const int64_t stride = x.stride(), tail = width - 1;
  for (int64_t first = 0; first < x.count; first += positions) {
    for (int64_t c = begin; c < end; c += Vec::width) {
      float* const at = x.row(first) + c;
      const auto input = [&](int64_t t) {
        if (t >= 0) return Vec::load(at + t * stride);
        return before ? Vec::load(before + (tail + t) * stride + c) : Vec::zero();
      };
      if (before) {
        // Only ever with one position: all that is kept moves up by one.
        Vec sum = Vec::fma(Vec::load(weight + tail * stride + c), input(0), Vec::load(bias + c));
        const Vec newest = input(0);
        for (int64_t k = 0; k < tail; ++k) {
          sum = Vec::fma(Vec::load(weight + k * stride + c), input(k - tail), sum);
          (k + 1 < tail ? input(k + 1 - tail) : newest).store(before + k * stride + c);
        }
        silu(sum).store(at);
        continue;
      }
      for (int64_t t = positions - 1; t >= 0; --t) {
        Vec sum = Vec::load(bias + c);
        for (int64_t k = larger(0, tail - t); k < width; ++k)
          sum = Vec::fma(Vec::load(weight + k * stride + c), input(t - tail + k), sum);
        silu(sum).store(at + t * stride);
      }
    }
  }
}

inline void gate(const Rows& z, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < z.count; ++r)
    for (int64_t c = begin; c < end; c += Vec::width) silu(Vec::load(z.row(r) + c)).store(z.row(r) + c);
}

// Rows of a vector of channels as the walks of ssm_scan.h read them.
struct Lanes {
  float *delta_, *input_, *y_;
  float* delta() const { return delta_; }
  float* input() const { return input_; }
  float* y() const { return y_; }
};

// A as float16.
struct HalfColumns {
  const uint16_t* p;
  Vec at(int64_t n) const { return Vec::load_f16(p + n * block_outputs, Vec::width); }
};

// One call of a Mamba block after its first projections.
class MambaScan {
 public:
  // x [windows · positions, inner], after the convolution; projected (δ, B, C) of the same rows; z, after its SiLU, and
  // y of those rows that are wanted: all, or the newest of each window. `state` is [inner / 16, state, 16] or null.
  MambaScan(const Run& run, const MambaBlock& m, const Rows& x, const Rows& projected, const Activations& rank,
            const Rows& z, const Rows& y, int64_t windows, float* state)
      : m_(m),
        dt_(product_of(run, m.dt_proj)),
        x_(x),
        projected_(projected),
        rank_(rank),
        z_(z),
        y_(y),
        windows_(windows),
        positions_(x.count / windows),
        wanted_(y.count / windows),
        state_(state) {}

  // Channels of blocks [begin, end).
  void run(int64_t begin, int64_t end) const {
    const FlushSubnormals<Vec> flush;
    const int64_t tile = positions_ * block_outputs;
    constexpr int64_t most = 4 * ssm::longest_short * block_outputs;
    float small[most];
    Buffer<float> large;
    const bool fits = is_short();
    if (!fits) large.reset(4 * tile + m_.state * block_outputs);
    float* const memory = fits ? small : large.get();
    for (int64_t block = begin; block < end; ++block)
      for (int64_t window = 0; window < windows_; ++window) {
        Activations rank = rank_;
        rank.rows = positions_, rank.data += window * positions_ * rank_.stride;
        if (rank.scale) rank.scale += window * positions_ * rank_.scale_stride;
        // The product writes at its block's place in a row: the tile takes that place.
        dt_.multiply(m_.dt_proj, rank, block, block + 1, memory - block * block_outputs, block_outputs, false);
        for (int lane = 0; lane < block_outputs; lane += Vec::width)
          scan(window, block * block_outputs, lane, memory, memory + tile);
      }
  }

 private:
  bool is_short() const { return positions_ <= ssm::longest_short && !state_; }

  // raw [positions, 16] is δ before its softplus; its product has added the bias.
  void scan(int64_t window, int64_t c, int lane, const float* raw, float* memory) const {
    constexpr int64_t W = Vec::width;
    const int64_t at = c + lane, first = window * positions_, skipped = positions_ - wanted_;
    const int64_t tile = positions_ * block_outputs;
    const Lanes rows = {memory, memory + tile, memory + 2 * tile};
    for (int64_t t = 0; t < positions_; ++t) {
      const Vec step = softplus(Vec::load(raw + t * block_outputs + lane));
      step.store(rows.delta() + t * W);
      (step * Vec::load(x_.row(first + t) + at)).store(rows.input() + t * W);
    }
    walk(rows, first, c, lane, skipped, memory + 3 * tile);
    const Vec skip = Vec::load(m_.D + at);
    for (int64_t t = skipped; t < positions_; ++t) {
      const int64_t row = window * wanted_ + t - skipped;
      const Vec sum = Vec::fma(skip, Vec::load(x_.row(first + t) + at), Vec::load(rows.y() + t * W));
      (sum * Vec::load(z_.row(row) + at)).store(y_.row(row) + at);
    }
  }

  void walk(const Lanes& rows, int64_t first, int64_t c, int lane, int64_t skipped, float* zeros) const {
    const int64_t at = c * m_.state + lane;
    if (m_.half_A)
      walk(rows, HalfColumns{m_.half_A + at}, first, c, lane, skipped, zeros);
    else
      walk(rows, ssm::Columns<Vec>{m_.A + at, block_outputs}, first, c, lane, skipped, zeros);
  }

  template <class A>
  void walk(const Lanes& rows, A a, int64_t first, int64_t c, int lane, int64_t skipped, float* zeros) const {
    const float* const B = projected_.row(first) + m_.rank;
    const ssm::Broadcast<Vec> b = {B, 1, projected_.stride()}, c_t = {B + m_.state, 1, projected_.stride()};
    constexpr int64_t pitch = block_outputs, line = 64;
    // The scan computes and leaves the memory idle: the weights that come next are fetched meanwhile.
    const uint8_t* const next = m_.out_proj.weight + (c + lane) / Vec::width * m_.state * line;
    const auto fetch = [next](int64_t n) {
      if constexpr (Vec::width >= 8) FASTLVM_PREFETCH(next + n * line);
      static_cast<void>(n);
    };
    if (is_short() && skipped)
      return ssm::walk_short<Vec, true>(rows, a, nullptr, pitch, b, c_t, m_.state, positions_, fetch);
    if (is_short()) return ssm::walk_short<Vec, false>(rows, a, nullptr, pitch, b, c_t, m_.state, positions_, fetch);
    float* const h = state_ ? state_ + c * m_.state : zeros;
    if (!state_)
      for (int64_t n = 0; n < m_.state; ++n) Vec::zero().store(h + n * pitch + lane);
    fill_zero(rows.y(), positions_ * Vec::width);
    ssm::walk_all<Vec, false>(rows, a, h + lane, pitch, b, c_t, m_.state, positions_, skipped);
  }

  const MambaBlock& m_;
  const Product& dt_;
  Rows x_, projected_;
  Activations rank_;
  Rows z_, y_;
  int64_t windows_, positions_, wanted_;
  float* state_;
};

// x and z of in_proj, convolved and gated by the task that made them.
inline void project_in(const Run& run, const MambaBlock& m, const Activations& a, const Rows& x, const Rows& z,
                       int64_t positions, float* before) {
  const Product& product = product_of(run, m.in_x);
  const int64_t blocks = product::blocks_of(m.in_x);
  const Activations for_z = z.count < x.count ? newest(a, z.count) : a;
  const auto part = [&](int64_t begin, int64_t end) {
    if (begin < blocks) {
      const int64_t until = smaller(end, blocks);
      product.multiply(m.in_x, a, begin, until, x.data, x.stride(), false);
      convolve(m.conv_weight, m.conv_bias, m.width, x, positions, before, begin * block_outputs, until * block_outputs);
    }
    if (end > blocks) {
      const int64_t from = larger(begin, blocks) - blocks;
      product.multiply(m.in_z, for_z, from, end - blocks, z.data, z.stride(), false);
      gate(z, from * block_outputs, (end - blocks) * block_outputs);
    }
  };
  ranges(2 * blocks, grain, worth_sharing(m.in_x, a.rows), part);
}

// state: [width - 1, inner] inputs of the convolution, then [inner / 16, state, 16] of the scan; null for a zero state.
inline void mamba_block(Run& run, Stream& s, const MambaBlock& m, float* state) {
  const Scratch scratch(run);
  const int64_t rows = s.now.count, wanted = m.last && !state ? s.windows : rows;
  const Rows normed = run.rows(rows, m.dim);
  apply(m.norm, s.now, normed);
  const Activations a = activations(run, m.in_x, normed);
  const Rows x = run.rows(rows, m.inner), z = run.rows(wanted, m.inner), y = run.rows(wanted, m.inner);
  run.lap(Phase::elementwise);
  project_in(run, m, a, x, z, s.positions, state);
  run.lap(Phase::in_proj);

  const Rows projected = run.rows(rows, m.rank + 2 * m.state);
  const Activations ax = activations(run, m.x_proj, x);
  run.lap(Phase::elementwise);
  multiply(run, m.x_proj, ax, projected);
  run.lap(Phase::x_proj);

  const MambaScan scan(run, m, x, projected, activations(run, m.dt_proj, projected), z, y, s.windows,
                       state ? state + (m.width - 1) * padded(m.inner) : nullptr);
  const bool share = m.inner * m.state * rows > ssm::work_worth_sharing;
  ranges(padded(m.inner) / block_outputs, 1, share, [&](int64_t begin, int64_t end) { scan.run(begin, end); });
  run.lap(Phase::scan);

  const Activations ay = activations(run, m.out_proj, y);
  if (wanted < rows) {
    const Rows left = {s.other, wanted, m.dim};
    for (int64_t w = 0; w < wanted; ++w) copy(left.row(w), s.now.row(w * s.positions + s.positions - 1), left.stride());
    s.turn(left);
    s.positions = 1;
  }
  run.lap(Phase::elementwise);
  multiply(run, m.out_proj, ay, s.now, true);
  run.lap(Phase::out_proj);
}

}  // namespace fastlvm::FASTLVM_ISA::predict
