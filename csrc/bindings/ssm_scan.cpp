// _C.ssm_scan and its backward.
#include "bindings/bindings.h"

namespace fastlvm {
namespace {

// The inputs that forward and backward share.
struct ScanInputs {
  Array u, delta, A, B, C, D, z, delta_bias, initial_state;
  py::handle cu_seqlens;
  std::vector<int64_t> offsets;
  bool delta_softplus;

  ScanInputs(py::handle u, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D, py::handle z,
             py::handle delta_bias, bool delta_softplus, py::handle initial_state, py::handle cu_seqlens)
      : u("u", u, Access::read),
        delta("delta", delta, Access::read),
        A("A", A, Access::read),
        B("B", B, Access::read),
        C("C", C, Access::read),
        D("D", D, Access::read, optional),
        z("z", z, Access::read, optional),
        delta_bias("delta_bias", delta_bias, Access::read, optional),
        initial_state("initial_state", initial_state, Access::read, optional),
        cu_seqlens(cu_seqlens),
        delta_softplus(delta_softplus) {}

  bool float64() const { return u.view().dtype == DType::f64; }

  Sizes check() {
    check_rank(u, "BDL");
    check_rank(A, "DN");
    Sizes sizes = {{'B', u.shape(0)}, {'D', u.shape(1)}, {'L', u.shape(2)}, {'N', A.shape(1)}};
    offsets = read_sequences(cu_seqlens, u, sizes);
    check_inputs({{delta, "BDL"}, {A, "DN"}, {D, "D"}, {z, "BDL"}, {delta_bias, "D"}, {initial_state, "SDN"}}, sizes,
                 float64());
    for (const Array* projection : {&B, &C}) {
      check_projection(*projection, sizes);
      check_input_dtype(*projection, float64());
    }
    return sizes;
  }

  SsmScan args(const Sizes& sizes) const {
    SsmScan args{};
    args.batch = sizes.at('S'), args.dim = sizes.at('D'), args.length = sizes.at('L'), args.state = sizes.at('N');
    args.offsets = offsets.empty() ? nullptr : offsets.data();
    args.float64 = float64(), args.delta_softplus = delta_softplus;
    args.u = u.view(), args.delta = delta.view(), args.z = z.view(), args.A = A.view();
    args.B = projection_view(B), args.C = projection_view(C);
    args.D = D.view(), args.delta_bias = delta_bias.view(), args.initial_state = initial_state.view();
    return args;
  }
};

// See SsmScan.
void check_checkpoints(const Array& checkpoints, Sizes sizes, bool packed, bool float64) {
  const int64_t length = sizes.at('L'), up = length + checkpoint_steps - 1;
  sizes['R'] = packed ? length / checkpoint_steps + sizes.at('S') : sizes.at('B') * (up / checkpoint_steps);
  check_gradients({{checkpoints, "RND"}}, sizes, float64);
}

// [B, D, L], or the last tokens alone where the sequences are not packed.
void check_outputs_wanted(const Array& out, const Sizes& sizes, bool packed) {
  Sizes wanted = sizes;
  if (!packed && out.view().rank == 3 && out.shape(2) < sizes.at('L')) wanted['L'] = out.shape(2);
  check_shape(out, "BDL", wanted);
}

void ssm_scan(py::handle u, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D, py::handle z,
              py::handle delta_bias, bool delta_softplus, py::handle initial_state, py::handle out,
              py::handle final_state, py::handle cu_seqlens, py::handle checkpoints) {
  ScanInputs in(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  const Array result("out", out, Access::fresh), last("final_state", final_state, Access::fresh, optional);
  const Array kept("checkpoints", checkpoints, Access::fresh, optional);
  const Sizes sizes = in.check();
  check_outputs_wanted(result, sizes, !in.offsets.empty());
  check_output(result, in.u.view().dtype);
  check_gradients({{last, "SDN"}}, sizes, in.float64());
  check_checkpoints(kept, sizes, !in.offsets.empty(), in.float64());
  SsmScan args = in.args(sizes);
  args.out = result.view(), args.final_state = last.view(), args.checkpoints = kept.view();
  call_without_gil(active_kernels().ssm_scan, args);
}

void ssm_scan_bwd(py::handle grad_out, py::handle grad_final_state, py::handle u, py::handle delta, py::handle A,
                  py::handle B, py::handle C, py::handle D, py::handle z, py::handle delta_bias, bool delta_softplus,
                  py::handle initial_state, py::handle du, py::handle ddelta, py::handle dA, py::handle dB,
                  py::handle dC, py::handle dD, py::handle dz, py::handle ddelta_bias, py::handle dinitial_state,
                  py::handle cu_seqlens, py::handle checkpoints) {
  ScanInputs in(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens);
  const Array grad("grad_out", grad_out, Access::read, optional);
  const Array grad_last("grad_final_state", grad_final_state, Access::read, optional);
  const Array kept("checkpoints", checkpoints, Access::read, optional);
  const auto output = [](const char* name, py::handle array) { return Array(name, array, Access::fresh, optional); };
  const Array to_u = output("du", du), to_delta = output("ddelta", ddelta), to_A = output("dA", dA);
  const Array to_B = output("dB", dB), to_C = output("dC", dC), to_D = output("dD", dD), to_z = output("dz", dz);
  const Array to_bias = output("ddelta_bias", ddelta_bias), to_initial = output("dinitial_state", dinitial_state);

  Sizes sizes = in.check();
  check_inputs({{grad, "BDL"}, {grad_last, "SDN"}}, sizes, in.float64());
  check_checkpoints(kept, sizes, !in.offsets.empty(), in.float64());
  check_wanted(to_D, in.D);
  check_wanted(to_bias, in.delta_bias);
  check_wanted(to_initial, in.initial_state);
  check_alike(to_u, in.u, "BDL", sizes);
  check_alike(to_delta, in.delta, "BDL", sizes);
  check_alike(to_z, in.z, "BDL", sizes);
  check_gradients({{to_A, "DN"}, {to_D, "D"}, {to_bias, "D"}, {to_initial, "SDN"}}, sizes, in.float64());
  const auto projection_axes = [&](const Array& projection) {
    if (projection.view().rank == 4) sizes['G'] = projection.shape(1);
    return projection.view().rank == 2 ? "DN" : projection.view().rank == 3 ? "BNL" : "BGNL";
  };
  check_gradients({{to_B, projection_axes(in.B)}}, sizes, in.float64());
  check_gradients({{to_C, projection_axes(in.C)}}, sizes, in.float64());

  SsmScanBwd args{};
  args.forward = in.args(sizes);
  args.forward.checkpoints = kept.view();
  args.grad_out = grad.view(), args.grad_final_state = grad_last.view();
  args.du = to_u.view(), args.ddelta = to_delta.view(), args.dA = to_A.view(), args.dB = to_B.view();
  args.dC = to_C.view(), args.dD = to_D.view(), args.dz = to_z.view();
  args.ddelta_bias = to_bias.view(), args.dinitial_state = to_initial.view();
  call_without_gil(active_kernels().ssm_scan_bwd, args);
}

}  // namespace

void bind_ssm_scan(py::module_& m) {
  m.def("ssm_scan", &ssm_scan, py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"),
        py::arg("z"), py::arg("delta_bias"), py::arg("delta_softplus"), py::arg("initial_state"), py::arg("out"),
        py::arg("final_state"), py::arg("cu_seqlens") = py::none(), py::arg("checkpoints") = py::none());
  m.def("ssm_scan_bwd", &ssm_scan_bwd, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("u"), py::arg("delta"),
        py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("z"), py::arg("delta_bias"),
        py::arg("delta_softplus"), py::arg("initial_state"), py::arg("du"), py::arg("ddelta"), py::arg("dA"),
        py::arg("dB"), py::arg("dC"), py::arg("dD"), py::arg("dz"), py::arg("ddelta_bias"), py::arg("dinitial_state"),
        py::arg("cu_seqlens") = py::none(), py::arg("checkpoints") = py::none());
  m.attr("checkpoint_steps") = checkpoint_steps;
}

}  // namespace fastlvm
