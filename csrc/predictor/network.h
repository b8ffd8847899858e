// A whole model as the kernels see it: packed weights and a list of layers, plain data (see common/tensor.h).
#pragma once

#include <cstdint>

namespace fastlvm {

enum class Precision : uint8_t { fp32, bf16, int8 };
inline constexpr int precisions = 3;

// Outputs in a block of a packed matrix. Rows of activations and vectors of weights are padded to it with zeros.
inline constexpr int64_t block_outputs = 16;

// Inputs that share the 32-bit lane of an output.
constexpr int64_t group_of(Precision precision) {
  return precision == Precision::int8 ? 4 : precision == Precision::bf16 ? 2 : 1;
}

// y = x Wᵀ + bias. Per block of 16 outputs and group of inputs there are 64 bytes: 16 lanes of a group of weights each.
// Zeros fill the last block and the last group.
struct Matrix {
  Precision precision;
  int64_t inputs, outputs;
  const uint8_t* weight;  // [blocks, groups, 64]
  const float* scale;     // [blocks * 16], of int8 weights only: what a step of 1 is worth
  const int32_t* sums;    // [blocks * 16], of int8 weights only: 128 Σ weight
  const float* bias;      // [blocks * 16], zeros where the layer has none
};

// Rows as a product reads them; what an element is and whether there is a scale is up to the product.
struct Activations {
  int64_t rows, stride;  // bytes from row to row
  const uint8_t* data;
  const float* scale;  // of row r at r * scale_stride
  int64_t scale_stride;
};

// One way to multiply matrices of one precision.
struct Product {
  const char* name;
  int64_t element;  // bytes of an activation
  // Rows [rows, inputs], `x_stride` floats apart, to `data` with rows `stride` bytes apart and `scale` [rows]. Null
  // where products read float32 rows as they are.
  void (*prepare)(const float* x, int64_t x_stride, int64_t rows, int64_t inputs, uint8_t* data, int64_t stride,
                  float* scale);
  // Blocks [begin, end) of the outputs for all rows: y, or what is added to y, with rows `y_stride` floats apart.
  void (*multiply)(const Matrix&, const Activations&, int64_t begin, int64_t end, float* y, int64_t y_stride, bool add);
  bool tiles = false;  // whole tiles of both matrices meet in one instruction: the fastest way for many rows, too
};

struct Products {
  const Product* of[precisions];
};

struct Norm {
  int64_t dim;
  float eps;
  bool centred;         // LayerNorm, else RMSNorm
  const float* weight;  // padded, as all vectors below
  const float* bias;    // null for RMSNorm
};

// h + block(norm(h)): in_proj → causal convolution, SiLU → (δ, B, C) → selective scan, D skip, gate → out_proj.
struct MambaBlock {
  int64_t dim, inner, state, width, rank;
  Norm norm;
  Matrix in_x, x_proj, in_z, dt_proj, out_proj;  // the bias of dt_proj is that of δ
  const float* conv_weight;                      // [width, inner]
  const float* conv_bias;                        // [inner]
  const float* A;                                // [inner / 16, state, 16], times log2(e), or
  const uint16_t* half_A;                        // the same as float16, where the matrices are not float32
  const float* D;                                // [inner]
  bool last;                                     // only the newest position is wanted of it
  const MambaBlock* next;                        // where another one follows at once, else null
};

// h + block(norm(h)), Mamba-2: in_proj → convolution over (x, B, C), SiLU → SSD → norm(y silu(z)) → out_proj.
struct Mamba2Block {
  int64_t dim, heads, head_dim, groups, state, width;
  Norm norm, gate_norm;
  Matrix in_z, in_xbc, in_dt, out_proj;
  const float *conv_weight, *conv_bias;  // [width, heads * head_dim + 2 groups * state], [..]
  const float *A, *D, *dt_bias;          // [heads]
};

// Causal attention of every position to the `window` newest up to itself: [q | k | v] of `heads` heads → values.
struct Attention {
  int64_t dim, heads, window;
};

// Over [.., inputs], from a zero state: what the cells hold at every position, [.., hidden].
struct Recurrent {
  int64_t hidden;
  bool lstm;                // else GRU
  Matrix input, recurrent;  // gates in torch's order
};

// [mean | attended] of a sequence: its mean, and its vectors as the attention of one query, made from the mean, mixes
// them.
struct ContextAttention {
  int64_t dim, inner;
  Matrix query, key;  // [inner, dim]
};

enum class LayerKind : uint8_t {
  linear,             // Matrix
  norm,               // Norm
  mamba_block,        // MambaBlock
  mamba2_block,       // Mamba2Block
  attention,          // Attention
  recurrent,          // Recurrent
  gelu,               // nothing
  positions,          // const float [context, dim], added
  last,               // nothing: the newest position alone
  flatten,            // nothing: all positions in one row, newest first, then zeros where some are missing
  residual,           // Network: h + layers(h)
  context,            // nothing: the stream as it is here is what the mixture mixes
  recency_mixture,    // const float [context]: h + Σ softmax(logits)ₜ contextₜ
  mixture,            // const float [context]: Σ softmax(logits)ₜ contextₜ alone
  context_attention,  // ContextAttention
  l2_norm,            // nothing
};

struct Layer {
  LayerKind kind;
  const void* details;
  int64_t dim;         // of the stream after this layer
  int64_t state;       // where the floats that a stream keeps for it begin
  int64_t state_size;  // how many they are
};

struct Network {
  const Layer* layers;
  int64_t count;
  int64_t positions, dim;  // of the context
  int64_t widest;          // of the stream anywhere
};

// What a forward pass spends its time on.
enum class Phase : uint8_t { elementwise, in_proj, x_proj, scan, out_proj, linear, attention, recurrent };
inline constexpr int phases = 8;

class Workspace;

// Windows [windows, positions, dim] → [windows, dim]. With `state` there is one window, of one position that follows
// `seen` others, and the state goes on with it.
struct Prediction {
  const Network* network;
  const Products* products;
  Workspace* workspace;
  int64_t windows, positions;
  const float* context;
  float* out;
  float* state;
  int64_t seen;
  int64_t* nanoseconds;  // [layers, phases], added to; null where nobody asks
};

}  // namespace fastlvm
