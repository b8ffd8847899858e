// _C.causal_conv1d_step.
#include "bindings/step.h"

namespace fastlvm {
namespace {

void causal_conv1d_step(py::handle x, py::handle state, py::handle weight, py::handle bias, bool silu,
                        py::handle state_indices, py::handle out) {
  const Array input("x", x, Access::read), states("state", state, Access::write);
  const Array filters("weight", weight, Access::read), constant("bias", bias, Access::read, optional);
  const Array result("out", out, Access::write);
  const bool float64 = input.view().dtype == DType::f64;
  check_rank(input, "BD");
  check_rank(states, "SDL");
  check_rank(filters, "DW");
  const int64_t width = filters.shape(1), length = states.shape(2);
  if (width < 1) throw std::invalid_argument("weight: got " + filters.shape_text() + ", wants (D, W) with W >= 1");
  if (length < width - 1)
    throw std::invalid_argument("state: got " + states.shape_text() +
                                ", wants at least W - 1 = " + std::to_string(width - 1) + " inputs a channel");
  const Sizes sizes = {
      {'B', input.shape(0)}, {'D', input.shape(1)}, {'W', width}, {'L', length}, {'S', states.shape(0)}};
  check_inputs({{filters, "DW"}, {constant, "D"}}, sizes, float64);
  check_state(states, "SDL", sizes, float64);
  check_shape(result, "BD", sizes);
  check_output(result, input.view().dtype);
  const std::vector<int64_t> indices = read_state_indices(state_indices, sizes.at('B'), states);

  CausalConv1dStep args{};
  args.batch = sizes.at('B'), args.dim = sizes.at('D'), args.width = width, args.length = length;
  args.indices = pointer_to(indices);
  args.float64 = float64, args.silu = silu;
  args.x = input.view(), args.state = states.view(), args.weight = filters.view(), args.bias = constant.view();
  args.out = result.view();
  call_without_gil(active_kernels().causal_conv1d_step, args);
}

}  // namespace

void bind_causal_conv1d_step(py::module_& m) {
  m.def("causal_conv1d_step", &causal_conv1d_step, py::arg("x"), py::arg("state"), py::arg("weight"), py::arg("bias"),
        py::arg("silu"), py::arg("state_indices"), py::arg("out"));
}

}  // namespace fastlvm
