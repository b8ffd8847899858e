// The Mamba block of the predictor: one job of several phases (common/phases.h), in all of which a seat has the same
// channels. The scan is that of ops/ssm_scan.h.
//
// Reading the weights takes as long as the scan, which computes and needs next to no memory. So the scan fetches into
// the second cache what its thread's seat will read next; and the gate's projection, which nobody needs before, is made
// between the scans of some channels and those of the next.
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

constexpr int64_t line = 64;  // of the cache

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

// The weights that a thread reads after those it is at.
class Ahead {
 public:
  void add(const uint8_t* begin, int64_t bytes) {
    if (bytes > 0) spans_[count_++] = {begin, bytes};
  }
  int64_t bytes() const {
    int64_t sum = 0;
    for (int i = at_; i < count_; ++i) sum += spans_[i].bytes;
    return sum;
  }
  // Where the next `bytes` are; null at the end. They may reach beyond the end of a matrix.
  const uint8_t* take(int64_t bytes) {
    if (at_ == count_) return nullptr;
    const uint8_t* const begin = spans_[at_].begin;
    spans_[at_].begin += bytes, spans_[at_].bytes -= bytes;
    if (spans_[at_].bytes <= 0) ++at_;
    return begin;
  }

 private:
  struct Span {
    const uint8_t* begin;
    int64_t bytes;
  };
  Span spans_[3];
  int count_ = 0, at_ = 0;
};

// The scan of a Mamba block after its first projections.
class MambaScan {
 public:
  // Memory of one thread.
  struct Memory {
    uint8_t* rank;  // rows of δ before dt_proj, as its product reads them
    float* scale;
    float* tiles;  // for sequences that are not short
  };

  // x [windows · positions, inner], after the convolution; projected (δ, B, C) of the same rows; z, after its SiLU, and
  // y of those rows that are wanted: all, or the newest of each window. `state` is [inner / 16, state, 16] or null.
  MambaScan(const Run& run, const MambaBlock& m, const Rows& x, const Rows& projected, const Rows& z, const Rows& y,
            int64_t windows, float* state)
      : m_(m),
        dt_(product_of(run, m.dt_proj)),
        x_(x),
        projected_(projected),
        z_(z),
        y_(y),
        windows_(windows),
        positions_(x.count / windows),
        wanted_(y.count / windows),
        state_(state),
        rank_stride_(round_up(m.rank, 64) * dt_.element) {}

  Memory memory(const Run& run) const {
    Memory taken{};
    if (dt_.prepare) taken.rank = run.take<uint8_t>(x_.count * rank_stride_), taken.scale = run.take<float>(x_.count);
    if (!is_short()) taken.tiles = run.take<float>((4 * positions_ + m_.state) * block_outputs);
    return taken;
  }

  // Channels of blocks [begin, end); `lines` of what lies ahead are fetched during each block.
  void run(int64_t begin, int64_t end, const Memory& given, Ahead* ahead, int64_t lines) const {
    const FlushSubnormals<Vec> flush;
    float small[4 * ssm::longest_short * block_outputs];
    float* const memory = is_short() ? small : given.tiles;
    const int64_t tile = positions_ * block_outputs;
    const Activations all = ranks(given);
    for (int64_t block = begin; block < end; ++block)
      for (int64_t window = 0; window < windows_; ++window) {
        Activations rank = all;
        rank.rows = positions_, rank.data += window * positions_ * rank.stride;
        if (rank.scale) rank.scale += window * positions_;
        // The product writes at its block's place in a row: the tile takes that place.
        dt_.multiply(m_.dt_proj, rank, block, block + 1, memory - block * block_outputs, block_outputs, false);
        for (int lane = 0; lane < block_outputs; lane += Vec::width)
          scan(window, block * block_outputs, lane, memory, memory + tile, Fetch(window ? nullptr : ahead, lines));
      }
  }

 private:
  // Fetches lines while the states go by, four at each of the first.
  struct Fetch {
    static constexpr int64_t at_once = 4;
    const uint8_t* from = nullptr;
    int64_t until = 0;

    Fetch(Ahead* ahead, int64_t lines_of_block) {
      const int64_t steps = lines_of_block * Vec::width / block_outputs / at_once;
      if (Vec::width < 8 || steps == 0) return;  // narrow vectors pass a state too often
      if (ahead) from = ahead->take(steps * at_once * line);
      if (from) until = steps;
    }
    FASTLVM_INLINE void operator()(int64_t n) const {
      if (n >= until) return;
      FASTLVM_UNROLL
      for (int64_t i = 0; i < at_once; ++i) prefetch(from + (n * at_once + i) * line);
    }
  };

  Activations ranks(const Memory& given) const {
    if (!dt_.prepare)
      return {x_.count, projected_.stride() * dt_.element, reinterpret_cast<const uint8_t*>(projected_.data), nullptr,
              0};
    dt_.prepare(projected_.data, projected_.stride(), x_.count, m_.rank, given.rank, rank_stride_, given.scale);
    return {x_.count, rank_stride_, given.rank, given.scale, 1};
  }

  bool is_short() const { return positions_ <= ssm::longest_short && !state_; }

  // raw [positions, 16] is δ before its softplus; its product has added the bias.
  void scan(int64_t window, int64_t c, int lane, const float* raw, float* memory, const Fetch& fetch) const {
    constexpr int64_t W = Vec::width;
    const int64_t at = c + lane, first = window * positions_, skipped = positions_ - wanted_;
    const int64_t tile = positions_ * block_outputs;
    const Lanes rows = {memory, memory + tile, memory + 2 * tile};
    for (int64_t t = 0; t < positions_; ++t) {
      const Vec step = softplus(Vec::load(raw + t * block_outputs + lane));
      step.store(rows.delta() + t * W);
      (step * Vec::load(x_.row(first + t) + at)).store(rows.input() + t * W);
    }
    walk(rows, first, c, lane, skipped, memory + 3 * tile, fetch);
    const Vec skip = Vec::load(m_.D + at);
    for (int64_t t = skipped; t < positions_; ++t) {
      const int64_t row = window * wanted_ + t - skipped;
      const Vec sum = Vec::fma(skip, Vec::load(x_.row(first + t) + at), Vec::load(rows.y() + t * W));
      (sum * Vec::load(z_.row(row) + at)).store(y_.row(row) + at);
    }
  }

  void walk(const Lanes& rows, int64_t first, int64_t c, int lane, int64_t skipped, float* zeros,
            const Fetch& fetch) const {
    const int64_t at = c * m_.state + lane;
    if (m_.half_A)
      walk(rows, HalfColumns{m_.half_A + at}, first, c, lane, skipped, zeros, fetch);
    else
      walk(rows, ssm::Columns<Vec>{m_.A + at, block_outputs}, first, c, lane, skipped, zeros, fetch);
  }

  template <class A>
  void walk(const Lanes& rows, A a, int64_t first, int64_t c, int lane, int64_t skipped, float* zeros,
            const Fetch& fetch) const {
    const float* const B = projected_.row(first) + m_.rank;
    const ssm::Broadcast<Vec> b = {B, 1, projected_.stride()}, c_t = {B + m_.state, 1, projected_.stride()};
    constexpr int64_t pitch = block_outputs;
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
  Rows x_, projected_, z_, y_;
  int64_t windows_, positions_, wanted_;
  float* state_;
  int64_t rank_stride_;
};

// Blocks [begin, end) of part `index` of `count`: whole tiles of a product.
struct Share {
  int64_t begin, end;
  Share(int64_t blocks, int64_t count, int64_t index) {
    const int64_t tiles = div_up(blocks, grain);
    begin = tiles * index / count * grain, end = smaller(blocks, tiles * (index + 1) / count * grain);
  }
  int64_t first() const { return begin * block_outputs; }
  int64_t last() const { return end * block_outputs; }
};

// One call of a Mamba block.
class Mamba {
 public:
  // state: [width - 1, inner] inputs of the convolution, then [inner / 16, state, 16] of the scan; null for a zero one.
  Mamba(Run& run, Stream& s, const MambaBlock& m, float* state)
      : run_(run),
        m_(m),
        state_(state),
        positions_(s.positions),
        wanted_(m.last && !state ? s.windows : s.now.count),
        seats_(worth_sharing(m.in_x, s.now.count) ? threads_of_job() : 1),
        in_(s.now),
        out_(wanted_ < in_.count ? Rows{s.other, wanted_, m.dim} : in_),
        normed_(run.rows(in_.count, m.dim)),
        x_(run.rows(in_.count, m.inner)),
        z_(run.rows(wanted_, m.inner)),
        projected_(run.rows(in_.count, m.rank + 2 * m.state)),
        y_(run.rows(wanted_, m.inner)),
        for_in_(run, m.in_x, normed_),
        for_x_(run, m.x_proj, x_),
        for_out_(run, m.out_proj, y_),
        scan_(run, m, x_, projected_, z_, y_, s.windows, state ? state + (m.width - 1) * x_.stride() : nullptr),
        memory_(run.take<MambaScan::Memory>(seats_)),
        phases_(run.take<uint8_t>(static_cast<int64_t>(Phases::bytes(count, seats_))), seats_, parts(), count) {
    for (int seat = 0; seat < seats_; ++seat) memory_[seat] = scan_.memory(run);
    if (wanted_ == in_.count) return;
    for (int64_t w = 0; w < wanted_; ++w) copy(out_.row(w), in_.row(w * positions_ + positions_ - 1), out_.stride());
    s.turn(out_);
    s.positions = 1;
  }

  void operator()() {
    const ThreadCount of_job(seats_);  // though set_num_threads was called since: no two threads have one seat
    parallel(seats_, seats_ > 1, [&](int64_t) { work(seat_of_thread() % seats_); });
  }

 private:
  enum { norm, in_proj, quantise_x, x_proj, scan, quantise_y, out_proj, count };
  static constexpr int64_t of_seat = 8;  // parts of a phase

  const int64_t* parts() {
    const int64_t each = seats_ * of_seat;
    parts_[norm] = parts_[quantise_x] = in_.count, parts_[quantise_y] = wanted_;
    parts_[in_proj] = parts_[x_proj] = parts_[scan] = parts_[out_proj] = each;
    return parts_;
  }

  void work(int seat) {
    each(norm, seat, Phase::elementwise, [&](int64_t r) {
      norm_row(m_.norm, in_.row(r), normed_.row(r));
      for_in_.prepare(r, r + 1);
    });
    each(in_proj, seat, Phase::in_proj, [&](int64_t part) { project_x(share_of(m_.in_x, part)); });
    each(quantise_x, seat, Phase::elementwise, [&](int64_t r) { for_x_.prepare(r, r + 1); });
    each(x_proj, seat, Phase::x_proj,
         [&](int64_t part) { multiply(m_.x_proj, for_x_.all(), share_of(m_.x_proj, part), projected_); });
    Ahead ahead = ahead_of(seat);
    const int64_t lines = ahead.bytes() / line / larger(1, div_up(product::blocks_of(m_.in_z), seats_));
    each(scan, seat, Phase::scan, [&](int64_t part) {
      const Share share = share_of(m_.in_z, part);
      project_z(share);
      scan_.run(share.begin, share.end, memory_[seat], &ahead, lines);
    });
    each(quantise_y, seat, Phase::elementwise, [&](int64_t r) { for_out_.prepare(r, r + 1); });
    each(out_proj, seat, Phase::out_proj,
         [&](int64_t part) { multiply(m_.out_proj, for_out_.all(), share_of(m_.out_proj, part), out_, true); });
  }

  template <class F>
  void each(int phase, int seat, Phase what, F f) {
    int64_t done = 0;
    for (int64_t part; (part = phases_.claim(phase, seat)) >= 0; ++done) f(part);
    phases_.finish(phase, done);
    if (seat == 0) run_.lap(what);
  }

  Share share_of(const Matrix& m, int64_t part) const { return {product::blocks_of(m), seats_ * of_seat, part}; }

  void multiply(const Matrix& m, const Activations& a, const Share& share, const Rows& y, bool add = false) const {
    product_of(run_, m).multiply(m, a, share.begin, share.end, y.data, y.stride(), add);
  }

  void project_x(const Share& share) const {
    multiply(m_.in_x, for_in_.all(), share, x_);
    convolve(m_.conv_weight, m_.conv_bias, m_.width, x_, positions_, state_, share.first(), share.last());
  }

  void project_z(const Share& share) const {
    multiply(m_.in_z, wanted_ < in_.count ? newest(for_in_.all(), wanted_) : for_in_.all(), share, z_);
    gate(z_, share.first(), share.last());
  }

  // What a seat reads after the first part of its scan: as much of it as will be read soon, or fits half of the cache.
  Ahead ahead_of(int seat) const {
    Ahead ahead;
    int64_t room = second_cache() / 2;
    const auto add = [&](const Matrix& m, const Share& share, int64_t most) {
      const int64_t bytes = product::groups_of(m) * product::slab;  // of a block
      const int64_t wanted = smaller((share.end - share.begin) * bytes, most);
      ahead.add(m.weight + share.begin * bytes, wanted);
      return wanted;
    };
    const auto add_share = [&](const Matrix& m) { room -= add(m, Share(product::blocks_of(m), seats_, seat), room); };
    Share gates = share_of(m_.in_z, seat * of_seat + 1);
    gates.end = share_of(m_.in_z, (seat + 1) * of_seat - 1).end;
    add(m_.in_z, gates, INT64_MAX);
    add_share(m_.out_proj);
    if (m_.next) add_share(m_.next->in_x);
    return ahead;
  }

  Run& run_;
  const MambaBlock& m_;
  float* state_;
  int64_t positions_, wanted_;
  int seats_;
  Rows in_, out_, normed_, x_, z_, projected_, y_;
  Prepared for_in_, for_x_, for_out_;
  MambaScan scan_;
  MambaScan::Memory* memory_;
  int64_t parts_[count];  // of the phases
  Phases phases_;
};

inline void mamba_block(Run& run, Stream& s, const MambaBlock& m, float* state) {
  const Scratch scratch(run);
  Mamba(run, s, m, state)();
}

}  // namespace fastlvm::FASTLVM_ISA::predict
