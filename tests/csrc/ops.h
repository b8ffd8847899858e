// The ops of the Kernels table, each as one function that draws a case and runs it: here and in ops_*.h.
// A new op is one more function and one more line in `ops`. Truth is plain.h, or else the float64 form of the same
// source: a wrong formula is wrong in both then, and tests/ops holds the formulas.
#pragma once

#include "ops_nce.h"
#include "ops_ssd.h"
#include "ops_step.h"

namespace fastlvm::test {

// The inputs that ssm_scan and ssm_scan_bwd share.
struct ScanInputs {
  int64_t N;
  Sizes sizes;
  Offsets offsets;
  int64_t batch, D, L;
  bool softplus;
  Tensor *u, *delta, *z, *A, *B, *C, *skip, *bias, *h0;

  explicit ScanInputs(Case& c)
      : N(c.draw.pick("N", {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 16, 17, 37, 64, 128, 130})),
        sizes(draw_sizes(c.draw, N)),
        offsets(c.draw, sizes),
        batch(offsets.batch(sizes)),
        D(sizes.dim),
        L(sizes.length),
        softplus(c.draw.coin("softplus")) {
    u = &c.input("u", {batch, D, L});
    delta = &time_steps(c, "delta", {batch, D, L}, softplus);
    z = c.maybe("z", {batch, D, L});
    A = &decay(c, {D, N});
    B = &projection(c, "B"), C = &projection(c, "C");
    skip = c.maybe("D skip", {D});
    bias = c.draw.coin("delta_bias") ? &time_steps(c, "delta_bias", {D}, false) : nullptr;
    h0 = c.maybe("initial_state", {sizes.batch, D, N});
  }

  Tensor& projection(Case& c, const char* name) const {
    const int64_t layout = c.draw.pick(std::string(name) + " groups", {0, 1, 2, -1});
    if (layout == 0) return c.input(name, {D, N});
    const int64_t groups = layout == 2 && D % 2 == 0 ? 2 : layout == -1 && D > 0 ? D : 1;
    return c.input(name, {batch, groups, N, L});
  }

  SsmScan args(const Case& c, Variant v) const {
    SsmScan args{};
    args.batch = sizes.batch, args.dim = D, args.length = L, args.state = N;
    args.offsets = offsets.get();
    args.float64 = c.wide(v), args.delta_softplus = softplus;
    args.u = u->view(v), args.delta = delta->view(v), args.z = view(z, v), args.A = A->view(v);
    args.B = B->view(v), args.C = C->view(v), args.D = view(skip, v), args.delta_bias = view(bias, v);
    args.initial_state = view(h0, v);
    return args;
  }
};

inline void ssm_scan(Case& c) {
  const ScanInputs in(c);
  const Tensor& out = c.output("out", {in.batch, in.D, in.L}, in.u->view(drawn).dtype, c.forward_tolerance);
  const Tensor* last =
      c.draw.coin("final_state") ? &c.dense("final_state", {in.sizes.batch, in.D, in.N}, c.forward_tolerance) : nullptr;
  c.run([&](Variant v) {
    SsmScan args = in.args(c, v);
    args.out = out.view(v), args.final_state = view(last, v);
    c.kernels(v).ssm_scan(args);
  });
}

inline void ssm_scan_bwd(Case& c) {
  const ScanInputs in(c);
  c.steps = in.L;
  const Tensor* grad_out = c.maybe("grad_out", {in.batch, in.D, in.L});
  const Tensor* grad_last = c.maybe("grad_final_state", {in.sizes.batch, in.D, in.N});
  const int64_t steps = checkpoint_steps, packed_rows = in.L / steps + in.sizes.batch;
  const int64_t rows = in.offsets.get() ? packed_rows : in.batch * ((in.L + steps - 1) / steps);
  const Tensor* kept = c.draw.coin("checkpoints") ? &c.scratch("checkpoints", {rows, in.N, in.D}) : nullptr;
  const Tensor& out = c.scratch("out", {in.batch, in.D, in.L});
  const Tensor *du = c.gradient_alike("du", in.u), *dA = c.gradient("dA", in.A);
  const Tensor* ddelta = c.gradient_alike("ddelta", in.delta, true);
  const Tensor *dB = c.gradient("dB", in.B), *dC = c.gradient("dC", in.C), *dD = c.gradient("dD", in.skip);
  const Tensor *dz = c.gradient_alike("dz", in.z), *ddelta_bias = c.gradient("ddelta_bias", in.bias, true);
  const Tensor* dinitial = c.gradient("dinitial_state", in.h0);
  c.run([&](Variant v) {
    SsmScanBwd args{};
    args.forward = in.args(c, v);
    if (kept) {
      args.forward.out = out.view(v), args.forward.checkpoints = kept->view(v);
      c.kernels(v).ssm_scan(args.forward);
      args.forward.out = {};
    }
    args.grad_out = view(grad_out, v), args.grad_final_state = view(grad_last, v);
    args.du = view(du, v), args.ddelta = view(ddelta, v), args.dA = view(dA, v), args.dB = view(dB, v);
    args.dC = view(dC, v), args.dD = view(dD, v), args.dz = view(dz, v), args.ddelta_bias = view(ddelta_bias, v);
    args.dinitial_state = view(dinitial, v);
    c.kernels(v).ssm_scan_bwd(args);
  });
}

struct ConvInputs {
  int64_t W;
  Sizes sizes;
  Offsets offsets;
  int64_t batch, D, L;
  bool silu;
  Tensor *x, *weight, *bias, *h0;

  explicit ConvInputs(Case& c)
      : W(c.draw.pick("W", {1, 2, 3, 4, 5, 9, 18})),
        sizes(draw_sizes(c.draw, W)),
        offsets(c.draw, sizes),
        batch(offsets.batch(sizes)),
        D(sizes.dim),
        L(sizes.length),
        silu(c.draw.coin("silu")) {
    if (L > 70) D *= 13;  // work that is shared
    x = &c.input("x", {batch, D, L});
    weight = &c.input("weight", {D, W});
    bias = c.maybe("bias", {D});
    h0 = c.maybe("initial_state", {sizes.batch, D, W - 1});
  }

  CausalConv1d args(const Case& c, Variant v) const {
    CausalConv1d args{};
    args.batch = sizes.batch, args.dim = D, args.length = L, args.width = W;
    args.offsets = offsets.get();
    args.float64 = c.wide(v), args.silu = silu;
    args.x = x->view(v), args.weight = weight->view(v), args.bias = view(bias, v), args.initial_state = view(h0, v);
    return args;
  }
};

inline void causal_conv1d(Case& c) {
  const ConvInputs in(c);
  const DType dtype = in.x->view(drawn).dtype;
  const Tensor& out = c.output("out", {in.batch, in.D, in.L}, dtype, c.forward_tolerance);
  const Tensor* last =
      c.draw.coin("final_state") ? &c.output("final_state", {in.sizes.batch, in.D, in.W - 1}, dtype, 0) : nullptr;
  c.run([&](Variant v) {
    CausalConv1d args = in.args(c, v);
    args.out = out.view(v), args.final_state = view(last, v);
    c.kernels(v).causal_conv1d(args);
  });
}

inline void causal_conv1d_bwd(Case& c) {
  const ConvInputs in(c);
  const Tensor* grad_out = c.maybe("grad_out", {in.batch, in.D, in.L});
  const Tensor* grad_last = c.maybe("grad_final_state", {in.sizes.batch, in.D, in.W - 1});
  const Tensor *dx = c.gradient_alike("dx", in.x), *dweight = c.gradient("dweight", in.weight);
  const Tensor *dbias = c.gradient("dbias", in.bias), *dinitial = c.gradient("dinitial_state", in.h0);
  c.run([&](Variant v) {
    CausalConv1dBwd args{};
    args.forward = in.args(c, v);
    args.grad_out = view(grad_out, v), args.grad_final_state = view(grad_last, v);
    args.dx = view(dx, v), args.dweight = view(dweight, v), args.dbias = view(dbias, v);
    args.dinitial_state = view(dinitial, v);
    c.kernels(v).causal_conv1d_bwd(args);
  });
}

struct Op {
  const char* name;
  void (*run)(Case&);
};

inline const Op ops[] = {{"ssm_scan", ssm_scan},
                         {"ssm_scan_bwd", ssm_scan_bwd},
                         {"ssm_step", ssm_step},
                         {"ssd_scan", ssd_scan},
                         {"ssd_scan_bwd", ssd_scan_bwd},
                         {"ssd_step", ssd_step},
                         {"causal_conv1d", causal_conv1d},
                         {"causal_conv1d_bwd", causal_conv1d_bwd},
                         {"causal_conv1d_step", causal_conv1d_step},
                         {"mamba_step", mamba_step},
                         {"info_nce", info_nce},
                         {"info_nce_bwd", info_nce_bwd}};

// Empty, or what is wrong, in one line with what was drawn; `worst` gets the error as a part of what is allowed.
inline std::string run_case(const Op& op, const Kernels& kernels, uint64_t seed, double& worst, Coverage* coverage) {
  Case c(kernels, seed, coverage);
  try {
    op.run(c);
  } catch (const Failure& failure) {
    return std::string(op.name) + " " + kernels.name + " " + std::to_string(seed) + ": " + failure.what() + "  (" +
           c.draw.text() + ")";
  }
  worst = std::max(worst, c.worst());
  return "";
}

}  // namespace fastlvm::test
