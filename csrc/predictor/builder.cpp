#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#define FASTLVM_ISA builder  // for half.h: this object has no instruction set of its own
#include "common/half.h"
#include "predictor/model.h"

namespace fastlvm {
namespace {

constexpr int64_t line = 64;
constexpr float log2e = 1.44269504f;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t padded(int64_t dim) { return round_up(dim, block_outputs); }

template <class T>
struct Holder : Details {
  explicit Holder(T value) : value(std::move(value)) {}
  T value;
};

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

// Outputs [first, first + count) of a matrix of `Element`s into blocks (see Matrix).
template <class Element>
void interleave(const MatrixSource& source, int64_t first, int64_t count, int64_t group, Element* out) {
  const int64_t groups = (source.inputs + group - 1) / group;
  const auto* const weight = static_cast<const Element*>(source.weight);
  for (int64_t o = 0; o < padded(count); ++o) {
    Element* const to = out + o / block_outputs * groups * block_outputs * group + o % block_outputs * group;
    const Element* const from = weight + (first + o) * source.inputs;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t k = 0; k < group; ++k) {
        const int64_t i = g * group + k;
        to[g * block_outputs * group + k] = o < count && i < source.inputs ? from[i] : Element(0);
      }
  }
}

}  // namespace

Builder::Builder(int64_t positions, int64_t dim, uint8_t* memory)
    : positions_(positions),
      dim_(dim),
      context_positions_(positions),
      context_dim_(dim),
      memory_(memory),
      widest_(dim),
      levels_(1) {}

template <class T>
T* Builder::place(int64_t count) {
  T* const at = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
  bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), line);
  return at;
}

// Padded with zeros; all zeros if `from` is null.
const float* Builder::vector(const float* from, int64_t count) {
  float* const to = place<float>(padded(count));
  if (!to) return nullptr;
  std::memset(to, 0, static_cast<size_t>(padded(count)) * sizeof(float));
  if (from) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  return to;
}

Matrix Builder::matrix(const MatrixSource& source, int64_t first, int64_t count) {
  const int64_t group = group_of(source.precision);
  constexpr int64_t most_int8 = 1 << 16;  // inputs whose sum fits 32 bits
  if (source.precision == Precision::int8 && source.inputs > most_int8)
    fail("takes at most 65536 features in int8, and " + std::to_string(source.inputs) + " arrive");
  Matrix m{source.precision, source.inputs, count, nullptr, nullptr, nullptr, nullptr};
  uint8_t* const weight = place<uint8_t>(padded(count) / block_outputs * round_up(source.inputs, group) / group * line);
  m.weight = weight;
  m.bias = vector(source.bias ? source.bias + first : nullptr, count);
  if (source.precision == Precision::int8) {
    m.scale = vector(source.scale + first, count);
    int32_t* const sums = place<int32_t>(padded(count));
    m.sums = sums;
    if (sums)
      for (int64_t o = 0; o < padded(count); ++o) {
        const int8_t* const row = static_cast<const int8_t*>(source.weight) + (first + o) * source.inputs;
        int32_t sum = 0;
        for (int64_t i = 0; o < count && i < source.inputs; ++i) sum += row[i];
        sums[o] = 128 * sum;
      }
  }
  if (!weight) return m;
  if (source.precision == Precision::int8) interleave(source, first, count, group, reinterpret_cast<int8_t*>(weight));
  if (source.precision == Precision::bf16) interleave(source, first, count, group, reinterpret_cast<uint16_t*>(weight));
  if (source.precision == Precision::fp32) interleave(source, first, count, group, reinterpret_cast<float*>(weight));
  return m;
}

Norm Builder::norm_of(const NormSource& source) {
  const int64_t dim = source.weight.size;
  const bool centred = source.bias != nullptr;
  return {dim, source.eps, centred, vector(source.weight.data, dim), centred ? vector(source.bias, dim) : nullptr};
}

// [rows, width] as [width, rows].
const float* Builder::columns(const float* from, int64_t rows, int64_t width) {
  float* const to = place<float>(padded(rows) * width);
  for (int64_t k = 0; to && k < width; ++k)
    for (int64_t r = 0; r < padded(rows); ++r) to[k * padded(rows) + r] = r < rows ? from[r * width + k] : 0.0f;
  return to;
}

template <class T>
void Builder::add(LayerKind kind, const T& details, int64_t state) {
  auto holder = std::make_unique<Holder<T>>(details);
  levels_.back().push_back({kind, &holder->value, dim_, state_size_, state});
  details_.push_back(std::move(holder));
  state_size_ += round_up(state, block_outputs);
  widest_ = std::max(widest_, dim_);
}

void Builder::add(LayerKind kind) {
  levels_.back().push_back({kind, nullptr, dim_, state_size_, 0});
  widest_ = std::max(widest_, dim_);
}

void Builder::wants(int64_t dim) const {
  if (dim != dim_) fail("takes " + std::to_string(dim) + " features, and " + std::to_string(dim_) + " arrive");
}

void Builder::wants_sequence() const {
  if (!sequence_) fail("takes a sequence, and one vector arrives");
}

void Builder::linear(const MatrixSource& weight) {
  wants(weight.inputs);
  const Matrix m = matrix(weight);
  dim_ = weight.outputs;
  add(LayerKind::linear, m);
}

void Builder::norm(const NormSource& norm) {
  wants(norm.weight.size);
  add(LayerKind::norm, norm_of(norm));
}

void Builder::mamba_block(const MambaSource& b) {
  const int64_t dim = b.norm.weight.size, inner = b.out_proj.inputs, rank = b.dt_proj.inputs;
  wants(dim);
  wants_sequence();
  if (b.in_proj.inputs != dim || b.in_proj.outputs != 2 * inner || b.x_proj.inputs != inner ||
      b.x_proj.outputs != rank + 2 * b.state || b.dt_proj.outputs != inner || b.out_proj.outputs != dim)
    fail("has matrices that do not fit each other");
  MambaBlock m{};
  m.dim = dim, m.inner = inner, m.state = b.state, m.width = b.width, m.rank = rank;
  // In the order of their use.
  m.norm = norm_of(b.norm);
  m.in_x = matrix(b.in_proj, 0, inner);
  m.conv_weight = columns(b.conv_weight, inner, b.width);
  m.conv_bias = vector(b.conv_bias, inner);
  m.x_proj = matrix(b.x_proj);
  m.in_z = matrix(b.in_proj, inner, inner);
  m.dt_proj = matrix(b.dt_proj);
  coefficients(b, inner, m);
  m.D = vector(b.D, inner);
  m.out_proj = matrix(b.out_proj);
  const bool follows = !levels_.back().empty() && levels_.back().back().kind == LayerKind::mamba_block;
  auto* const before = follows ? static_cast<Holder<MambaBlock>*>(details_.back().get()) : nullptr;
  add(LayerKind::mamba_block, m, (b.width - 1 + b.state) * padded(inner));
  if (before) before->value.next = &static_cast<Holder<MambaBlock>*>(details_.back().get())->value;
}

// A by vectors of channels, times log2(e); as float16 beside matrices that are no more exact, where it fits.
void Builder::coefficients(const MambaSource& b, int64_t inner, MambaBlock& m) {
  constexpr float most_half = 65504;
  bool half = b.in_proj.precision != Precision::fp32;
  for (int64_t i = 0; i < inner * b.state; ++i) half = half && std::abs(b.A[i] * log2e) < most_half;
  const int64_t count = padded(inner) * b.state;
  float* const A = half ? nullptr : place<float>(count);
  uint16_t* const half_A = half ? place<uint16_t>(count) : nullptr;
  m.A = A, m.half_A = half_A;
  for (int64_t c = 0; (A || half_A) && c < padded(inner); ++c)
    for (int64_t n = 0; n < b.state; ++n) {
      const int64_t at = (c / block_outputs * b.state + n) * block_outputs + c % block_outputs;
      const float value = c < inner ? b.A[c * b.state + n] * log2e : 0.0f;
      half ? half_A[at] = builder::to_f16(value) : A[at] = value;
    }
}

void Builder::mamba2_block(const Mamba2Source& b) {
  const int64_t dim = b.norm.weight.size, inner = b.heads * b.head_dim, channels = inner + 2 * b.groups * b.state;
  wants(dim);
  wants_sequence();
  if (b.groups < 1 || b.heads % b.groups != 0)
    fail("has " + std::to_string(b.groups) + " groups, which do not divide its " + std::to_string(b.heads) + " heads");
  if (b.in_proj.inputs != dim || b.in_proj.outputs != inner + channels + b.heads || b.out_proj.inputs != inner ||
      b.out_proj.outputs != dim || b.gate_norm.weight.size != inner)
    fail("has matrices that do not fit each other");
  Mamba2Block m{};
  m.dim = dim, m.heads = b.heads, m.head_dim = b.head_dim, m.groups = b.groups, m.state = b.state, m.width = b.width;
  m.norm = norm_of(b.norm);
  m.in_z = matrix(b.in_proj, 0, inner);
  m.in_xbc = matrix(b.in_proj, inner, channels);
  m.conv_weight = columns(b.conv_weight, channels, b.width);
  m.conv_bias = vector(b.conv_bias, channels);
  m.in_dt = matrix(b.in_proj, inner + channels, b.heads);
  m.A = vector(b.A, b.heads);
  m.D = vector(b.D, b.heads);
  m.dt_bias = vector(b.dt_bias, b.heads);
  m.gate_norm = norm_of(b.gate_norm);
  m.out_proj = matrix(b.out_proj);
  add(LayerKind::mamba2_block, m, (b.width - 1) * padded(channels) + inner * b.state);
}

void Builder::attention(int64_t heads, int64_t window) {
  wants_sequence();
  if (dim_ % 3 != 0 || dim_ / 3 % heads != 0)
    fail("takes q, k and v of " + std::to_string(heads) + " heads, and " + std::to_string(dim_) + " features arrive");
  dim_ /= 3;
  add(LayerKind::attention, Attention{dim_, heads, window}, (window - 1) * 2 * dim_);
}

void Builder::recurrent(bool lstm, const MatrixSource& input, const MatrixSource& recurrent) {
  const int64_t hidden = recurrent.inputs, gates = (lstm ? 4 : 3) * hidden;
  wants(input.inputs);
  wants_sequence();
  if (input.outputs != gates || recurrent.outputs != gates) fail("has matrices that do not fit each other");
  const Recurrent m{hidden, lstm, matrix(input), matrix(recurrent)};
  dim_ = hidden;
  add(LayerKind::recurrent, m, 2 * padded(hidden));
}

void Builder::gelu() { add(LayerKind::gelu); }

void Builder::positions(const float* table, int64_t count, int64_t dim) {
  wants(dim);
  wants_sequence();
  if (count < positions_)
    fail("has " + std::to_string(count) + " positions, and the context has " + std::to_string(positions_));
  float* const to = place<float>(count * padded(dim));
  for (int64_t r = 0; to && r < count; ++r)
    for (int64_t i = 0; i < padded(dim); ++i) to[r * padded(dim) + i] = i < dim ? table[r * dim + i] : 0.0f;
  most_positions_ = most_positions_ ? std::min(most_positions_, count) : count;
  // The table itself is what the layer's details point at.
  levels_.back().push_back({LayerKind::positions, to, dim_, state_size_, 0});
}

void Builder::last() {
  wants_sequence();
  auto& layers = levels_.back();
  if (!layers.empty() && layers.back().kind == LayerKind::mamba_block)
    static_cast<Holder<MambaBlock>*>(details_.back().get())->value.last = true;
  sequence_ = false;
  add(LayerKind::last);
}

void Builder::flatten() {
  wants_sequence();
  const int64_t kept = context_positions_ * padded(dim_);
  dim_ *= context_positions_;
  sequence_ = false;
  levels_.back().push_back({LayerKind::flatten, nullptr, dim_, state_size_, kept});
  state_size_ += kept;
  widest_ = std::max(widest_, dim_);
}

void Builder::begin_residual() {
  constexpr size_t deepest = 16;
  if (levels_.size() > deepest) fail("has branches within branches, more than 16 deep");
  before_residual_.emplace_back(dim_, sequence_);
  levels_.emplace_back();
}

void Builder::end_residual() {
  if (levels_.size() < 2) fail("ends no branch");
  const auto [dim, sequence] = before_residual_.back();
  if (dim != dim_ || sequence != sequence_) fail("adds vectors of another shape than it takes");
  before_residual_.pop_back();
  auto holder = std::make_unique<Holder<std::pair<Network, std::vector<Layer>>>>(
      std::pair<Network, std::vector<Layer>>{{}, std::move(levels_.back())});
  levels_.pop_back();
  auto& [network, layers] = holder->value;
  network = {layers.data(), static_cast<int64_t>(layers.size()), context_positions_, context_dim_, widest_};
  levels_.back().push_back({LayerKind::residual, &network, dim_, state_size_, 0});
  details_.push_back(std::move(holder));
}

void Builder::context() {
  wants(context_dim_);
  wants_sequence();
  add(LayerKind::context);
}

void Builder::recency_mixture(const float* logits, int64_t count, bool alone) {
  if (sequence_ != alone || dim_ != context_dim_ || count != context_positions_)
    fail("adds " + std::to_string(count) + " vectors of the context to one such vector: the shapes differ");
  const float* const to = vector(logits, count);
  sequence_ = false;
  levels_.back().push_back({alone ? LayerKind::mixture : LayerKind::recency_mixture, to, dim_, state_size_,
                            context_positions_ * padded(context_dim_)});
  state_size_ += context_positions_ * padded(context_dim_);
}

void Builder::context_attention(const MatrixSource& query, const MatrixSource& key) {
  wants(query.inputs);
  wants(key.inputs);
  wants_sequence();
  if (query.outputs != key.outputs) fail("has matrices that do not fit each other");
  const ContextAttention m{dim_, query.outputs, matrix(query), matrix(key)};
  dim_ *= 2;
  sequence_ = false;
  streams_ = false;
  add(LayerKind::context_attention, m);
}

void Builder::l2_norm() { add(LayerKind::l2_norm); }

Network Builder::finish() {
  if (levels_.size() != 1) fail("the last branch does not end");
  if (sequence_) fail("the last layer leaves a sequence, and one vector is wanted");
  using Layers = std::vector<Layer>;
  auto holder = std::make_unique<Holder<Layers>>(std::move(levels_.front()));
  const Layers& layers = holder->value;
  const Network network{layers.data(), static_cast<int64_t>(layers.size()), context_positions_, context_dim_, widest_};
  details_.push_back(std::move(holder));
  return network;
}

}  // namespace fastlvm
