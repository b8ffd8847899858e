// What crosses from the bindings to the kernels: the arguments of each op and one table of functions per ISA.
// The bindings have checked every shape and dtype. See common/tensor.h for why this is plain data.
#pragma once

#include "common/tensor.h"
#include "predictor/network.h"
#include "search/lists.h"

namespace fastlvm {

// out = (C·h + D u) silu(z), h_t = exp(δ_t A) h_{t-1} + δ_t B_t u_t, δ = softplus(delta + delta_bias).
struct SsmScan {
  int64_t batch, dim, length, state;  // B, D, L, N
  // Packed sequences: sequence b is times [offsets[b], offsets[b + 1]) of arrays of time whose own batch size is 1; the
  // states are [B, D, N] all the same. Null where every sequence is a batch entry.
  const int64_t* offsets;
  bool float64;  // all arrays are float64, and so is the arithmetic
  bool delta_softplus;
  TensorView u, delta, z;    // [B, D, L]
  TensorView A;              // [D, N]
  TensorView B, C;           // [D, N] or [B, G, N, L], each with its own G
  TensorView D, delta_bias;  // [D]
  TensorView initial_state;  // [B, D, N]
  TensorView out;            // [B, D, L], or [B, D, L'] for the last L' tokens alone
  TensorView final_state;    // [B, D, N] contiguous, float32 (float64)
  // The states before every checkpoint_steps-th step of each sequence, written by the forward and, if given, read by
  // the backward, which else walks every sequence forward first. [R, N, D] contiguous, float32 (float64), with L /
  // checkpoint_steps rows a sequence, rounded up; of packed sequences rounded down and with one more row a sequence, so
  // that some rows are not used.
  TensorView checkpoints;
};
inline constexpr int64_t checkpoint_steps = 32;

// Gradients have the shape of what they belong to and are contiguous, float32 (float64), but for those of arrays of
// time in SsmScanBwd and CausalConv1dBwd: du, ddelta, dz and dx have any strides and the dtype of u, delta, z and x.
// Those not wanted are not given.
struct SsmScanBwd {
  SsmScan forward;  // out and final_state are not given
  TensorView grad_out, grad_final_state;
  TensorView du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state;
};

// out = (H C + D x) silu(z), H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_tᵀ, dt = softplus(dt + dt_bias), A a scalar per
// head.
struct SsdScan {
  int64_t batch, length, heads, dim, groups, state;  // B, L, H, P, G, N
  const int64_t* offsets;                            // as in SsmScan
  bool float64;
  bool dt_softplus;
  TensorView x, z, out;                   // [B, L, H, P]
  TensorView dt;                          // [B, L, H]
  TensorView A, dt_bias;                  // [H]
  TensorView B, C;                        // [B, L, G, N], H / G heads a group
  TensorView D;                           // [H] or [H, P]
  TensorView initial_state, final_state;  // [B, H, P, N]; the final state contiguous, float32 (float64)
};

struct SsdScanBwd {
  SsdScan forward;  // out and final_state are not given
  TensorView grad_out, grad_final_state;
  TensorView dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state;
};

// out_t = activation(bias + Σ_k weight_k x_{t - W + 1 + k})
struct CausalConv1d {
  int64_t batch, dim, length, width;  // B, D, L, W
  const int64_t* offsets;             // as in SsmScan
  bool float64;
  bool silu;
  TensorView x, out;                      // [B, D, L]
  TensorView weight;                      // [D, W]
  TensorView bias;                        // [D]
  TensorView initial_state, final_state;  // [B, D, W - 1]: the inputs before x, the last inputs
};

struct CausalConv1dBwd {
  CausalConv1d forward;  // out and final_state are not given
  TensorView grad_out, grad_final_state;
  TensorView dx, dweight, dbias, dinitial_state;
};

// One token of SsmScan: h = exp(δ A) h + δ B x in place, out = (C·h + D x) silu(z). Here and below row i advances state
// indices[i], or state i where there are no indices; a negative index is padding, whose output is zero.
struct SsmStep {
  int64_t batch, dim, state_size;  // b, D, N
  const int64_t* indices;          // [b], no two alike but the negative ones
  bool float64;
  bool delta_softplus;
  TensorView state;             // [S, D, N]
  TensorView x, delta, z, out;  // [b, D]
  TensorView A;                 // [D, N]
  TensorView B, C;              // [b, G, N], each with its own G
  TensorView D, delta_bias;     // [D]
};

// One token of CausalConv1d: the state, oldest first, drops an input and takes x.
struct CausalConv1dStep {
  int64_t batch, dim, width, length;  // b, D, W, and the inputs that the state holds, W - 1 or more
  const int64_t* indices;
  bool float64;
  bool silu;
  TensorView x, out;  // [b, D]
  TensorView state;   // [S, D, length]
  TensorView weight;  // [D, W]
  TensorView bias;    // [D]
};

// One token of Mamba-2: H = exp(dt A) H + dt x Bᵀ in place, out = (H C + D x) silu(z), dt = softplus(dt + dt_bias).
struct SsdStep {
  int64_t batch, heads, dim, state_size;  // b, h, p, n
  const int64_t* indices;
  bool float64;
  bool dt_softplus;
  TensorView state;       // [S, h, p, n]
  TensorView x, z, out;   // [b, h, p]
  TensorView dt;          // [b, h]
  TensorView A, dt_bias;  // [h]
  TensorView B, C;        // [b, g, n]
  TensorView D;           // [h] or [h, p]
};

// One token of a Mamba block: (x, z) = in_proj x, CausalConv1dStep with SiLU on x, (δ, B, C) = x_proj x, each over its
// root mean square and times its norm where that is given, SsmStep with δ = softplus(dt_proj δ + dt_bias) and
// A = -exp(A_log), out_proj.
struct MambaStep {
  int64_t batch, model, dim, state_size, rank, width, length;  // b, M, D, N, R, W, and the inputs conv_state holds
  bool float64;
  double norm_eps;
  TensorView x, out;                   // [b, M]
  TensorView conv_state;               // [b, D, length]
  TensorView ssm_state;                // [b, D, N]
  TensorView in_proj, in_bias;         // [2 D, M], [2 D]
  TensorView conv_weight, conv_bias;   // [D, W], [D]
  TensorView x_proj;                   // [R + 2 N, D]
  TensorView dt_norm, B_norm, C_norm;  // [R], [N], [N]
  TensorView dt_proj, dt_bias;         // [D, R], [D]
  TensorView A_log, D;                 // [D, N], [D]
  TensorView out_proj, out_bias;       // [M, D], [M]
};

// loss_i = log Σ_j exp(scale q_i·k_j) - scale q_i·k_i, over the keys j that are not left out of query i's sum; key i
// never is. Symmetric: the mean of that and of the same with queries and keys changing places.
struct InfoNce {
  int64_t batch, keys_count, dim;  // B, M >= B, D; M == B where symmetric
  bool float64;
  bool symmetric;
  double scale;         // 1 / temperature
  TensorView queries;   // [B, D]
  TensorView keys;      // [M, D]
  const uint8_t* mask;  // [B, M], not 0 for what is left out; null if not given
  int64_t mask_stride[2];
  // [B, G] and [M, G] contiguous: left out is what has the same label, of 0 or more, in any column. Null if not given.
  const int64_t *query_labels, *key_labels;
  int64_t label_columns;  // G
  TensorView loss;        // [B], contiguous, float32 (float64), as all that follow
  TensorView total;       // [], the sum of the losses
  // [1, B], of the queries' sums; [2, B] where symmetric: the keys' second. Base 2.
  TensorView log_sums;
  const Product* bf16;  // how rows of bfloat16 are multiplied as they are; null where they are not
  // Gradients of `total`, where they are wanted; not where symmetric: there InfoNceBwd alone has them.
  TensorView dqueries, dkeys;  // [B, D], [M, D]
};

struct InfoNceBwd {
  InfoNce forward;  // log_sums are read; loss, total and gradients are not given
  TensorView grad;  // [B], of the losses
  TensorView dqueries, dkeys;
};

struct Kernels {
  const char* name;
  void (*ssm_scan)(const SsmScan&);
  void (*ssm_scan_bwd)(const SsmScanBwd&);
  void (*ssd_scan)(const SsdScan&);
  void (*ssd_scan_bwd)(const SsdScanBwd&);
  void (*causal_conv1d)(const CausalConv1d&);
  void (*causal_conv1d_bwd)(const CausalConv1dBwd&);
  void (*info_nce)(const InfoNce&);
  void (*info_nce_bwd)(const InfoNceBwd&);
  void (*ssm_step)(const SsmStep&);
  void (*causal_conv1d_step)(const CausalConv1dStep&);
  void (*ssd_step)(const SsdStep&);
  void (*mamba_step)(const MambaStep&);
  void (*predict)(const Prediction&);
  Products products;  // of this instruction set alone
  SearchKernels search;
};

// One per object in isa/; null where the target architecture or the compiler lacks the instructions.
const Kernels* scalar_kernels();
const Kernels* neon_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace fastlvm
