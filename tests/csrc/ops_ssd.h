// The scan of Mamba-2 and its backward: see ops.h.
#pragma once

#include "inputs.h"
#include "plain.h"

namespace fastlvm::test {

struct SsdSizes {
  int64_t groups, heads, dim, state;
};

// Small, many-headed ones; few heads of whole tiles; lengths about a chunk; and enough work for several threads, whose
// gradients of B and C are added up in more than one piece.
inline SsdSizes draw_ssd_sizes(Draws& draw, Sizes& sizes) {
  const auto heads_of = [&](int64_t groups) { return groups * draw.pick("heads a group", {0, 1, 2, 3, 5}); };
  switch (draw.pick("kind", {0, 0, 0, 0, 0, 0, 1, 2, 2, 3})) {
    case 1:
      sizes.batch = 1, sizes.length = draw.pick("L of wide", {1, 21});
      return {1, draw.pick("H of wide", {1, 2}), draw.pick("P wide", {31, 70}), draw.pick("N wide", {33, 70})};
    case 2:
      sizes.batch = 1, sizes.length = draw.pick("L long", {128, 129, 193});
      return {1, draw.pick("H of a long", {1, 2}), 3, 5};
    case 3:
      sizes.length = 130;
      sizes.batch = draw.pick("B shared", {1, 2});
      return sizes.batch == 2 ? SsdSizes{1, 6, 17, 64} : SsdSizes{2, 10, 33, 37};
    default:
      sizes.batch = draw.pick("B", {0, 1, 1, 2, 3});
      sizes.length = draw.pick("L", {0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64, 65});
      const int64_t groups = draw.pick("G", {1, 2, 3});
      return {groups, heads_of(groups), draw.pick("P", {0, 1, 2, 3, 4, 8, 9, 16, 17}),
              draw.pick("N", {0, 1, 2, 3, 4, 5, 8, 9, 16, 17})};
  }
}

// The inputs that ssd_scan and ssd_scan_bwd share.
struct SsdInputs {
  Sizes sizes{};
  SsdSizes ssd;
  Offsets offsets;
  int64_t batch, L, G, H, P, N;
  bool softplus;
  Tensor *x, *dt, *A, *B, *C, *skip, *z, *bias, *h0;

  explicit SsdInputs(Case& c)
      : ssd(draw_ssd_sizes(c.draw, sizes)),
        offsets(c.draw, sizes),
        batch(offsets.batch(sizes)),
        L(sizes.length),
        G(ssd.groups),
        H(ssd.heads),
        P(ssd.dim),
        N(ssd.state),
        softplus(c.draw.coin("softplus")) {
    x = &c.input("x", {batch, L, H, P});
    dt = &time_steps(c, "dt", {batch, L, H}, softplus);
    A = &decay(c, {H});
    B = &c.input("B", {batch, L, G, N}), C = &c.input("C", {batch, L, G, N});
    skip = maybe_skip(c, H, P);
    z = c.maybe("z", {batch, L, H, P});
    bias = c.draw.coin("dt_bias") ? &time_steps(c, "dt_bias", {H}, false) : nullptr;
    h0 = c.maybe("initial_state", {sizes.batch, H, P, N});
  }

  SsdScan args(const Case& c, Variant v) const {
    SsdScan args{};
    args.batch = sizes.batch, args.length = L, args.heads = H, args.dim = P, args.groups = G, args.state = N;
    args.offsets = offsets.get();
    args.float64 = c.wide(v), args.dt_softplus = softplus;
    args.x = x->view(v), args.dt = dt->view(v), args.A = A->view(v), args.B = B->view(v), args.C = C->view(v);
    args.D = view(skip, v), args.z = view(z, v), args.dt_bias = view(bias, v), args.initial_state = view(h0, v);
    return args;
  }
};

inline void ssd_scan(Case& c) {
  const SsdInputs in(c);
  const Tensor& out = c.output("out", {in.batch, in.L, in.H, in.P}, in.x->view(drawn).dtype, c.forward_tolerance);
  const Tensor* last = c.draw.coin("final_state")
                           ? &c.dense("final_state", {in.sizes.batch, in.H, in.P, in.N}, c.forward_tolerance)
                           : nullptr;
  c.run([&](Variant v) {
    SsdScan args = in.args(c, v);
    args.out = out.view(v), args.final_state = view(last, v);
    (v == drawn ? c.kernels(v).ssd_scan : plain::ssd_scan)(args);
  });
}

inline void ssd_scan_bwd(Case& c) {
  const SsdInputs in(c);
  c.logarithms = true;
  const Tensor* grad_out = c.maybe("grad_out", {in.batch, in.L, in.H, in.P});
  const Tensor* grad_last = c.maybe("grad_final_state", {in.sizes.batch, in.H, in.P, in.N});
  const Tensor *dx = c.gradient("dx", in.x), *ddt = c.gradient("ddt", in.dt, true), *dA = c.gradient("dA", in.A);
  const Tensor *dB = c.gradient("dB", in.B), *dC = c.gradient("dC", in.C), *dD = c.gradient("dD", in.skip);
  const Tensor *dz = c.gradient("dz", in.z), *ddt_bias = c.gradient("ddt_bias", in.bias, true);
  const Tensor* dinitial = c.gradient("dinitial_state", in.h0);
  c.run([&](Variant v) {
    SsdScanBwd args{};
    args.forward = in.args(c, v);
    args.grad_out = view(grad_out, v), args.grad_final_state = view(grad_last, v);
    args.dx = view(dx, v), args.ddt = view(ddt, v), args.dA = view(dA, v), args.dB = view(dB, v);
    args.dC = view(dC, v), args.dD = view(dD, v), args.dz = view(dz, v), args.ddt_bias = view(ddt_bias, v);
    args.dinitial_state = view(dinitial, v);
    c.kernels(v).ssd_scan_bwd(args);
  });
}

}  // namespace fastlvm::test
