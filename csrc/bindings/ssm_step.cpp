// _C.ssm_step.
#include "bindings/step.h"

namespace fastlvm {
namespace {

void ssm_step(py::handle state, py::handle x, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D,
              py::handle z, py::handle delta_bias, bool delta_softplus, py::handle state_indices, py::handle out) {
  const Array states("state", state, Access::write), input("x", x, Access::read), time("delta", delta, Access::read);
  const Array decay("A", A, Access::read), to_state("B", B, Access::read), from_state("C", C, Access::read);
  const Array skip("D", D, Access::read, optional), gate("z", z, Access::read, optional);
  const Array bias("delta_bias", delta_bias, Access::read, optional), result("out", out, Access::write);
  const bool float64 = input.view().dtype == DType::f64;
  check_rank(input, "BD");
  check_rank(decay, "DN");
  check_rank(states, "SDN");
  const Sizes sizes = {{'B', input.shape(0)}, {'D', input.shape(1)}, {'N', decay.shape(1)}, {'S', states.shape(0)}};
  check_inputs({{time, "BD"}, {decay, "DN"}, {skip, "D"}, {gate, "BD"}, {bias, "D"}}, sizes, float64);
  check_state(states, "SDN", sizes, float64);
  check_shape(result, "BD", sizes);
  check_output(result, input.view().dtype);
  const std::vector<int64_t> indices = read_state_indices(state_indices, sizes.at('B'), states);

  SsmStep args{};
  args.batch = sizes.at('B'), args.dim = sizes.at('D'), args.state_size = sizes.at('N');
  args.indices = pointer_to(indices);
  args.float64 = float64, args.delta_softplus = delta_softplus;
  args.state = states.view(), args.x = input.view(), args.delta = time.view(), args.z = gate.view();
  args.A = decay.view(), args.D = skip.view(), args.delta_bias = bias.view(), args.out = result.view();
  args.B = check_groups(to_state, sizes, args.dim, float64);
  args.C = check_groups(from_state, sizes, args.dim, float64);
  call_without_gil(active_kernels().ssm_step, args);
}

}  // namespace

void bind_ssm_step(py::module_& m) {
  m.def("ssm_step", &ssm_step, py::arg("state"), py::arg("x"), py::arg("delta"), py::arg("A"), py::arg("B"),
        py::arg("C"), py::arg("D"), py::arg("z"), py::arg("delta_bias"), py::arg("delta_softplus"),
        py::arg("state_indices"), py::arg("out"));
}

}  // namespace fastlvm
