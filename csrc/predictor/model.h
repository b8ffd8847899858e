// A model: its layers checked against each other, their weights packed into one piece of memory, and its forward pass.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/memory.h"
#include "common/workspace.h"
#include "predictor/network.h"

namespace fastlvm {

// A matrix [outputs, inputs] as it comes from a file: float32, bfloat16 or int8 with a scale per output; all
// contiguous.
struct MatrixSource {
  Precision precision;
  int64_t outputs, inputs;
  const void* weight;
  const float* scale;  // [outputs], of int8 only
  const float* bias;   // [outputs] or null
};

struct VectorSource {
  int64_t size;
  const float* data;
};

struct NormSource {
  VectorSource weight;
  const float* bias;  // of a LayerNorm, else null
  float eps;
};

struct MambaSource {
  NormSource norm;
  MatrixSource in_proj, x_proj, dt_proj, out_proj;
  int64_t width, state;
  const float* conv_weight;  // [inner, width]
  const float* conv_bias;    // [inner]
  const float* A;            // [inner, state]
  const float* D;            // [inner]
};

struct Mamba2Source {
  NormSource norm, gate_norm;
  MatrixSource in_proj, out_proj;
  int64_t heads, head_dim, groups, state, width;
  const float *conv_weight, *conv_bias;  // [heads · head_dim + 2 groups · state, width], [..]
  const float *A, *D, *dt_bias;          // [heads]
};

struct Details {
  virtual ~Details() = default;
};

// Layers in the order they are added. The sources must hold what their comments say; whether a layer fits the one
// before it is checked here: std::invalid_argument says what it takes and what arrives.
class Builder {
 public:
  Builder(int64_t positions, int64_t dim, uint8_t* memory);

  void linear(const MatrixSource& weight);
  void norm(const NormSource& norm);
  void mamba_block(const MambaSource& block);
  void mamba2_block(const Mamba2Source& block);
  void attention(int64_t heads, int64_t window);
  void recurrent(bool lstm, const MatrixSource& input, const MatrixSource& recurrent);
  void gelu();
  void positions(const float* table, int64_t count, int64_t dim);
  void last();
  void begin_residual();
  void end_residual();
  void context();
  void flatten();
  void recency_mixture(const float* logits, int64_t count, bool alone);
  void context_attention(const MatrixSource& query, const MatrixSource& key);
  void l2_norm();

  Network finish();  // throws where the last layer does not leave one vector a window
  int64_t bytes() const { return bytes_; }
  int64_t state_size() const { return state_size_; }
  int64_t out_dim() const { return dim_; }
  int64_t most_positions() const { return most_positions_; }
  bool streams() const { return streams_; }
  std::vector<std::unique_ptr<Details>> take_details() { return std::move(details_); }

 private:
  struct Level;  // the layers of a residual branch, or of the model

  template <class T>
  T* place(int64_t count);
  const float* vector(const float* from, int64_t count);
  Matrix matrix(const MatrixSource& source, int64_t first, int64_t count);
  Matrix matrix(const MatrixSource& source) { return matrix(source, 0, source.outputs); }
  Norm norm_of(const NormSource& source);
  void coefficients(const MambaSource& source, int64_t inner, MambaBlock& block);
  const float* columns(const float* from, int64_t rows, int64_t width);
  template <class T>
  void add(LayerKind kind, const T& details, int64_t state = 0);
  void add(LayerKind kind);
  void wants(int64_t dim) const;
  void wants_sequence() const;

  int64_t positions_, dim_, context_positions_, context_dim_;
  bool sequence_ = true;
  uint8_t* memory_;  // null: only counted
  int64_t bytes_ = 0, state_size_ = 0, widest_, most_positions_ = 0;
  bool streams_ = true;
  std::vector<std::vector<Layer>> levels_;
  std::vector<std::pair<int64_t, bool>> before_residual_;
  std::vector<std::unique_ptr<Details>> details_;
};

class Model {
 public:
  // build is called twice, first to count the bytes.
  Model(int64_t positions, int64_t dim, const std::function<void(Builder&)>& build);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model();

  int64_t positions() const { return network_.positions; }
  int64_t dim() const { return network_.dim; }
  int64_t out_dim() const { return out_dim_; }
  int64_t bytes() const { return bytes_; }
  int64_t state_size() const { return state_size_; }
  int64_t layers() const { return network_.count; }
  int64_t most_positions() const { return most_positions_; }  // that a stream may take; 0: any number
  bool streams() const { return streams_; }                   // whether step() may be called

  // context [windows, positions, dim] → out [windows, out_dim], on `threads` threads or, if 0, as many as all kernels
  // use. Any number of callers at once. nanoseconds: see Prediction.
  void run(const float* context, int64_t windows, float* out, int threads, int64_t* nanoseconds) const;
  // One vector [dim] after `seen` others → out [out_dim]; state [state_size] goes on, zeros before the first.
  void step(const float* vector, float* out, float* state, int64_t seen, int threads) const;

 private:
  void predict(Prediction args, int threads) const;

  uint8_t* memory_ = nullptr;
  int64_t bytes_ = 0, state_size_ = 0, out_dim_ = 0, most_positions_ = 0;
  bool streams_ = true;
  std::vector<std::unique_ptr<Details>> details_;
  Network network_{};
  mutable Workspaces idle_;
};

}  // namespace fastlvm
