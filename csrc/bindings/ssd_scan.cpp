// _C.ssd_scan and its backward.
#include "bindings/bindings.h"

namespace fastlvm {
namespace {

// The inputs that forward and backward share.
struct SsdInputs {
  Array x, dt, A, B, C, D, z, dt_bias, initial_state;
  py::handle cu_seqlens;
  std::vector<int64_t> offsets;
  bool dt_softplus;

  SsdInputs(py::handle x, py::handle dt, py::handle A, py::handle B, py::handle C, py::handle D, py::handle z,
            py::handle dt_bias, bool dt_softplus, py::handle initial_state, py::handle cu_seqlens)
      : x("x", x, Access::read),
        dt("dt", dt, Access::read),
        A("A", A, Access::read),
        B("B", B, Access::read),
        C("C", C, Access::read),
        D("D", D, Access::read, optional),
        z("z", z, Access::read, optional),
        dt_bias("dt_bias", dt_bias, Access::read, optional),
        initial_state("initial_state", initial_state, Access::read, optional),
        cu_seqlens(cu_seqlens),
        dt_softplus(dt_softplus) {}

  bool float64() const { return x.view().dtype == DType::f64; }
  const char* skip_axes() const { return D.view().rank == 2 ? "HP" : "H"; }

  Sizes check() {
    check_rank(x, "BLHP");
    check_rank(B, "BLGN");
    Sizes sizes = {{'B', x.shape(0)}, {'L', x.shape(1)}, {'H', x.shape(2)},
                   {'P', x.shape(3)}, {'G', B.shape(2)}, {'N', B.shape(3)}};
    if (sizes['G'] < 1 || sizes['H'] % sizes['G'] != 0)
      throw std::invalid_argument("B: got " + B.shape_text() +
                                  ", wants (B, L, G, N) with G a divisor of H=" + std::to_string(sizes['H']));
    offsets = read_sequences(cu_seqlens, x, sizes);
    check_inputs({{dt, "BLH"},
                  {A, "H"},
                  {B, "BLGN"},
                  {C, "BLGN"},
                  {D, skip_axes()},
                  {z, "BLHP"},
                  {dt_bias, "H"},
                  {initial_state, "SHPN"}},
                 sizes, float64());
    return sizes;
  }

  SsdScan args(const Sizes& sizes) const {
    SsdScan args{};
    args.batch = sizes.at('S'), args.length = sizes.at('L'), args.heads = sizes.at('H'), args.dim = sizes.at('P');
    args.groups = sizes.at('G'), args.state = sizes.at('N');
    args.offsets = offsets.empty() ? nullptr : offsets.data();
    args.float64 = float64(), args.dt_softplus = dt_softplus;
    args.x = x.view(), args.dt = dt.view(), args.z = z.view(), args.A = A.view(), args.B = B.view(), args.C = C.view();
    args.D = D.view(), args.dt_bias = dt_bias.view(), args.initial_state = initial_state.view();
    return args;
  }
};

void ssd_scan(py::handle x, py::handle dt, py::handle A, py::handle B, py::handle C, py::handle D, py::handle z,
              py::handle dt_bias, bool dt_softplus, py::handle initial_state, py::handle out, py::handle final_state,
              py::handle cu_seqlens) {
  SsdInputs in(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
  const Array result("out", out, Access::fresh), last("final_state", final_state, Access::fresh, optional);
  const Sizes sizes = in.check();
  check_shape(result, "BLHP", sizes);
  check_output(result, in.x.view().dtype);
  check_gradients({{last, "SHPN"}}, sizes, in.float64());
  SsdScan args = in.args(sizes);
  args.out = result.view(), args.final_state = last.view();
  call_without_gil(active_kernels().ssd_scan, args);
}

void ssd_scan_bwd(py::handle grad_out, py::handle grad_final_state, py::handle x, py::handle dt, py::handle A,
                  py::handle B, py::handle C, py::handle D, py::handle z, py::handle dt_bias, bool dt_softplus,
                  py::handle initial_state, py::handle dx, py::handle ddt, py::handle dA, py::handle dB, py::handle dC,
                  py::handle dD, py::handle dz, py::handle ddt_bias, py::handle dinitial_state, py::handle cu_seqlens) {
  SsdInputs in(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens);
  const Array grad("grad_out", grad_out, Access::read, optional);
  const Array grad_last("grad_final_state", grad_final_state, Access::read, optional);
  const auto output = [](const char* name, py::handle array) { return Array(name, array, Access::fresh, optional); };
  const Array to_x = output("dx", dx), to_dt = output("ddt", ddt), to_A = output("dA", dA), to_B = output("dB", dB);
  const Array to_C = output("dC", dC), to_D = output("dD", dD), to_z = output("dz", dz);
  const Array to_bias = output("ddt_bias", ddt_bias), to_initial = output("dinitial_state", dinitial_state);

  const Sizes sizes = in.check();
  check_inputs({{grad, "BLHP"}, {grad_last, "SHPN"}}, sizes, in.float64());
  check_wanted(to_D, in.D);
  check_wanted(to_z, in.z);
  check_wanted(to_bias, in.dt_bias);
  check_wanted(to_initial, in.initial_state);
  check_gradients({{to_x, "BLHP"},
                   {to_dt, "BLH"},
                   {to_A, "H"},
                   {to_B, "BLGN"},
                   {to_C, "BLGN"},
                   {to_D, in.skip_axes()},
                   {to_z, "BLHP"},
                   {to_bias, "H"},
                   {to_initial, "SHPN"}},
                  sizes, in.float64());

  SsdScanBwd args{};
  args.forward = in.args(sizes);
  args.grad_out = grad.view(), args.grad_final_state = grad_last.view();
  args.dx = to_x.view(), args.ddt = to_dt.view(), args.dA = to_A.view(), args.dB = to_B.view(), args.dC = to_C.view();
  args.dD = to_D.view(), args.dz = to_z.view(), args.ddt_bias = to_bias.view();
  args.dinitial_state = to_initial.view();
  call_without_gil(active_kernels().ssd_scan_bwd, args);
}

}  // namespace

void bind_ssd_scan(py::module_& m) {
  m.def("ssd_scan", &ssd_scan, py::arg("x"), py::arg("dt"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"),
        py::arg("z"), py::arg("dt_bias"), py::arg("dt_softplus"), py::arg("initial_state"), py::arg("out"),
        py::arg("final_state"), py::arg("cu_seqlens") = py::none());
  m.def("ssd_scan_bwd", &ssd_scan_bwd, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("x"), py::arg("dt"),
        py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("z"), py::arg("dt_bias"),
        py::arg("dt_softplus"), py::arg("initial_state"), py::arg("dx"), py::arg("ddt"), py::arg("dA"), py::arg("dB"),
        py::arg("dC"), py::arg("dD"), py::arg("dz"), py::arg("ddt_bias"), py::arg("dinitial_state"),
        py::arg("cu_seqlens") = py::none());
}

}  // namespace fastlvm
