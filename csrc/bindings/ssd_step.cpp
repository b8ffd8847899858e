// _C.ssd_step.
#include "bindings/step.h"

namespace fastlvm {
namespace {

void ssd_step(py::handle state, py::handle x, py::handle dt, py::handle A, py::handle B, py::handle C, py::handle D,
              py::handle z, py::handle dt_bias, bool dt_softplus, py::handle state_indices, py::handle out) {
  const Array states("state", state, Access::write), input("x", x, Access::read), time("dt", dt, Access::read);
  const Array decay("A", A, Access::read), to_state("B", B, Access::read), from_state("C", C, Access::read);
  const Array skip("D", D, Access::read, optional), gate("z", z, Access::read, optional);
  const Array bias("dt_bias", dt_bias, Access::read, optional), result("out", out, Access::write);
  const bool float64 = input.view().dtype == DType::f64;
  check_rank(input, "BHP");
  check_rank(states, "SHPN");
  check_rank(to_state, "BGN");
  check_rank(from_state, "BGN");
  const Sizes sizes = {{'B', input.shape(0)},
                       {'H', input.shape(1)},
                       {'P', input.shape(2)},
                       {'N', states.shape(3)},
                       {'S', states.shape(0)}};
  check_inputs({{time, "BH"}, {decay, "H"}, {gate, "BHP"}, {bias, "H"}}, sizes, float64);
  check_inputs({{skip, skip.view().rank == 2 ? "HP" : "H"}}, sizes, float64);
  check_state(states, "SHPN", sizes, float64);
  check_shape(result, "BHP", sizes);
  check_output(result, input.view().dtype);
  const std::vector<int64_t> indices = read_state_indices(state_indices, sizes.at('B'), states);

  SsdStep args{};
  args.batch = sizes.at('B'), args.heads = sizes.at('H'), args.dim = sizes.at('P'), args.state_size = sizes.at('N');
  args.indices = pointer_to(indices);
  args.float64 = float64, args.dt_softplus = dt_softplus;
  args.state = states.view(), args.x = input.view(), args.dt = time.view(), args.z = gate.view();
  args.A = decay.view(), args.D = skip.view(), args.dt_bias = bias.view(), args.out = result.view();
  args.B = check_groups(to_state, sizes, args.heads, float64);
  args.C = check_groups(from_state, sizes, args.heads, float64);
  call_without_gil(active_kernels().ssd_step, args);
}

}  // namespace

void bind_ssd_step(py::module_& m) {
  m.def("ssd_step", &ssd_step, py::arg("state"), py::arg("x"), py::arg("dt"), py::arg("A"), py::arg("B"), py::arg("C"),
        py::arg("D"), py::arg("z"), py::arg("dt_bias"), py::arg("dt_softplus"), py::arg("state_indices"),
        py::arg("out"));
}

}  // namespace fastlvm
