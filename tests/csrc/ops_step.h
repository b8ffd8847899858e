// The one-token ops: see ops.h.
#pragma once

#include <numeric>

#include "inputs.h"
#include "plain.h"

namespace fastlvm::test {

// Which state each row advances, in memory of exactly their size; row i advances state i when not drawn. Rows may be
// padding, and states no row's.
class Indices {
 public:
  Indices(Draws& draw, int64_t rows) : memory_(8 * static_cast<size_t>(rows), Memory::heap) {
    given_ = draw.coin("indices");
    const bool padding = given_ && draw.coin("padding");
    const int64_t spare = given_ ? draw.pick("spare states", {0, 1, 3}) : 0;
    std::vector<int64_t> indices;
    int64_t used = 0;
    for (int64_t i = 0; i < rows; ++i)
      indices.push_back(padding && draw.below(3) == 0 ? (draw.below(2) ? -1 : INT64_MIN) : used++);
    std::vector<int64_t> order(static_cast<size_t>(used + spare));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = given_ ? order.size() : 0; i > 1; --i)
      std::swap(order[i - 1], order[static_cast<size_t>(draw.below(static_cast<int64_t>(i)))]);
    advanced_.resize(order.size());
    for (int64_t& index : indices) {
      if (index < 0) continue;
      index = order[static_cast<size_t>(index)];
      advanced_[static_cast<size_t>(index)] = true;
    }
    if (rows > 0) std::memcpy(memory_.data(), indices.data(), memory_.size());
  }
  const int64_t* get() const {  // as the bindings have it, null of no rows
    return given_ && memory_.size() > 0 ? reinterpret_cast<const int64_t*>(memory_.data()) : nullptr;
  }
  int64_t states() const { return static_cast<int64_t>(advanced_.size()); }
  const std::vector<bool>& advanced() const { return advanced_; }

 private:
  Memory memory_;
  std::vector<bool> advanced_;
  bool given_;
};

// B or C [rows, G, size], with a G of its own.
inline Tensor& step_projection(Case& c, const char* name, int64_t rows, int64_t channels, int64_t size) {
  int64_t groups = c.draw.pick(std::string(name) + " groups", {1, 2, 3, -1});
  if (groups < 0) groups = std::max<int64_t>(channels, 1);
  return c.input(name, {rows, channels % groups == 0 ? groups : 1, size});
}

// Widths of vectors and of their tails, and of the stretches of 256 that the kernels hold of a row.
inline int64_t draw_state_size(Draws& draw) {
  return draw.pick("N", {0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 256, 257, 300});
}

inline bool is_shared(Draws& draw) { return draw.pick("shared among threads", {0, 0, 0, 0, 0, 0, 1}) != 0; }

inline void ssm_step(Case& c) {
  const bool shared = is_shared(c.draw);
  const int64_t N = shared ? 64 : draw_state_size(c.draw);
  const int64_t rows = shared ? 4 : c.draw.pick("rows", {0, 1, 1, 2, 3});
  const int64_t D = shared ? 600 : c.draw.pick("D", {0, 1, 2, 6, 17, 64, 66, 130});
  const Indices indices(c.draw, rows);
  const bool softplus = c.draw.coin("softplus");
  const Tensor& state = c.state("state", {indices.states(), D, N}, c.forward_tolerance);
  const Tensor &x = c.input("x", {rows, D}), &delta = time_steps(c, "delta", {rows, D}, softplus);
  const Tensor& A = decay(c, {D, N});
  const Tensor &B = step_projection(c, "B", rows, D, N), &C = step_projection(c, "C", rows, D, N);
  const Tensor *skip = c.maybe("D skip", {D}), *z = c.maybe("z", {rows, D});
  const Tensor* bias = c.draw.coin("delta_bias") ? &time_steps(c, "delta_bias", {D}, false) : nullptr;
  const Tensor& out = c.output("out", {rows, D}, x.view(drawn).dtype, c.forward_tolerance);
  c.run([&](Variant v) {
    SsmStep args{};
    args.batch = rows, args.dim = D, args.state_size = N;
    args.indices = indices.get();
    args.float64 = c.wide(v), args.delta_softplus = softplus;
    args.state = state.view(v), args.x = x.view(v), args.delta = delta.view(v), args.z = view(z, v);
    args.out = out.view(v), args.A = A.view(v), args.B = B.view(v), args.C = C.view(v);
    args.D = view(skip, v), args.delta_bias = view(bias, v);
    (v == drawn ? c.kernels(v).ssm_step : plain::ssm_step)(args);
  });
  c.expect_left_alone(state, indices.advanced());
}

inline void ssd_step(Case& c) {
  const bool shared = is_shared(c.draw);
  const int64_t N = shared ? 120 : draw_state_size(c.draw);
  const int64_t rows = shared ? 3 : c.draw.pick("rows", {0, 1, 1, 2, 3});
  const int64_t H = shared ? 6 : c.draw.pick("H", {0, 1, 2, 3, 4, 6});
  const int64_t P = shared   ? 70
                    : N > 64 ? c.draw.pick("P of a long row", {1, 5})
                             : c.draw.pick("P", {0, 1, 2, 17, 64, 66, 130});
  const Indices indices(c.draw, rows);
  const bool softplus = c.draw.coin("softplus");
  const Tensor& state = c.state("state", {indices.states(), H, P, N}, c.forward_tolerance);
  const Tensor &x = c.input("x", {rows, H, P}), &dt = time_steps(c, "dt", {rows, H}, softplus), &A = decay(c, {H});
  const Tensor &B = step_projection(c, "B", rows, H, N), &C = step_projection(c, "C", rows, H, N);
  const Tensor *skip = maybe_skip(c, H, P), *z = c.maybe("z", {rows, H, P});
  const Tensor* bias = c.draw.coin("dt_bias") ? &time_steps(c, "dt_bias", {H}, false) : nullptr;
  const Tensor& out = c.output("out", {rows, H, P}, x.view(drawn).dtype, c.forward_tolerance);
  c.run([&](Variant v) {
    SsdStep args{};
    args.batch = rows, args.heads = H, args.dim = P, args.state_size = N;
    args.indices = indices.get();
    args.float64 = c.wide(v), args.dt_softplus = softplus;
    args.state = state.view(v), args.x = x.view(v), args.z = view(z, v), args.out = out.view(v);
    args.dt = dt.view(v), args.A = A.view(v), args.dt_bias = view(bias, v);
    args.B = B.view(v), args.C = C.view(v), args.D = view(skip, v);
    (v == drawn ? c.kernels(v).ssd_step : plain::ssd_step)(args);
  });
  c.expect_left_alone(state, indices.advanced());
}

inline void causal_conv1d_step(Case& c) {
  const bool shared = is_shared(c.draw);
  const int64_t W = shared ? 4 : c.draw.pick("W", {1, 2, 3, 4, 5, 9});
  const int64_t length = W - 1 + (shared ? 0 : c.draw.pick("older inputs", {0, 0, 0, 1, 5}));
  const int64_t rows = shared ? 33 : c.draw.pick("rows", {0, 1, 1, 2, 3});
  const int64_t D = shared ? 1000 : c.draw.pick("D", {0, 1, 2, 17, 64, 256, 257, 300});
  const Indices indices(c.draw, rows);
  const bool silu = c.draw.coin("silu");
  const bool plain = c.draw.coin("plain");  // the common widths have a path of their own for such a state and weight
  const Tensor& state = c.state("state", {indices.states(), D, length}, 0, plain);
  const Tensor& x = c.input("x", {rows, D});
  const Tensor& weight = plain ? c.plain_input("weight", {D, W}) : c.input("weight", {D, W});
  const Tensor* bias = c.maybe("bias", {D});
  const Tensor& out = c.output("out", {rows, D}, x.view(drawn).dtype, c.forward_tolerance);
  c.run([&](Variant v) {
    CausalConv1dStep args{};
    args.batch = rows, args.dim = D, args.width = W, args.length = length;
    args.indices = indices.get();
    args.float64 = c.wide(v), args.silu = silu;
    args.x = x.view(v), args.out = out.view(v), args.state = state.view(v), args.weight = weight.view(v);
    args.bias = view(bias, v);
    (v == drawn ? c.kernels(v).causal_conv1d_step : plain::causal_conv1d_step)(args);
  });
  c.expect_left_alone(state, indices.advanced());
}

// Weights are of the size that keeps numbers of order one. Errors go through four products and are measured by the
// largest element: in `sizes` the step sizes grow, and with them nothing cancels but more decays.
inline void mamba_step(Case& c) {
  const bool shared = is_shared(c.draw);
  const int64_t N = shared ? 16 : c.draw.pick("N", {0, 1, 3, 8, 16, 17, 33});
  const int64_t rows = shared ? 2 : c.draw.pick("rows", {0, 1, 1, 2, 3, 5});
  const int64_t D = shared ? 300 : c.draw.pick("D", {0, 1, 2, 17, 64, 66, 130});
  const int64_t M = shared ? 150 : c.draw.pick("M", {0, 1, 5, 16, 40, 270});
  const int64_t R = shared ? 10 : c.draw.pick("R", {0, 1, 3, 16, 19});
  const int64_t W = shared ? 4 : c.draw.pick("W", {1, 2, 4, 5});
  const int64_t length = W - 1 + (shared ? 0 : c.draw.pick("older inputs", {0, 0, 1, 2}));
  const double tolerance = 10 * Case::forward_tolerance;
  const auto matrix = [&](const char* name, int64_t outputs, int64_t inputs) -> const Tensor& {
    const double scale = 1 / std::sqrt(static_cast<double>(std::max<int64_t>(inputs, 1)));
    return c.input(name, {outputs, inputs}, [&c, scale] { return scale * c.draw.normal(); });
  };
  Tensor& conv_state = c.state("conv_state", {rows, D, length}, tolerance);
  Tensor& ssm_state = c.state("ssm_state", {rows, D, N}, tolerance);
  const Tensor &x = c.input("x", {rows, M}), &in_proj = matrix("in_proj", 2 * D, M), &conv = matrix("conv1d", D, W);
  const Tensor &x_proj = matrix("x_proj", R + 2 * N, D), &dt_proj = matrix("dt_proj", D, R);
  const Tensor& A_log = c.input("A_log", {D, N}, [&c] { return 0.5 * c.draw.normal(); }, true);
  const Tensor &out_proj = matrix("out_proj", M, D), *skip = c.maybe("D skip", {D});
  const Tensor *in_bias = c.maybe("in_proj_bias", {2 * D}), *conv_bias = c.maybe("conv1d_bias", {D});
  const Tensor *dt_bias = c.maybe("dt_bias", {D}), *out_bias = c.maybe("out_proj_bias", {M});
  const Tensor *dt_norm = c.maybe("dt_norm", {R}), *B_norm = c.maybe("B_norm", {N}), *C_norm = c.maybe("C_norm", {N});
  Tensor& out = c.output("out", {rows, M}, x.view(drawn).dtype, tolerance);
  conv_state.cancels = ssm_state.cancels = out.cancels = true;
  c.run([&](Variant v) {
    MambaStep args{};
    args.batch = rows, args.model = M, args.dim = D, args.state_size = N, args.rank = R, args.width = W;
    args.length = length, args.norm_eps = 1e-5, args.float64 = c.wide(v);
    args.x = x.view(v), args.out = out.view(v);
    args.conv_state = conv_state.view(v), args.ssm_state = ssm_state.view(v);
    args.in_proj = in_proj.view(v), args.in_bias = view(in_bias, v);
    args.conv_weight = conv.view(v), args.conv_bias = view(conv_bias, v), args.x_proj = x_proj.view(v);
    args.dt_norm = view(dt_norm, v), args.B_norm = view(B_norm, v), args.C_norm = view(C_norm, v);
    args.dt_proj = dt_proj.view(v), args.dt_bias = view(dt_bias, v);
    args.A_log = A_log.view(v), args.D = view(skip, v);
    args.out_proj = out_proj.view(v), args.out_bias = view(out_bias, v);
    (v == drawn ? c.kernels(v).mamba_step : plain::mamba_step)(args);
  });
}

}  // namespace fastlvm::test
