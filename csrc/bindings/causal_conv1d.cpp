// _C.causal_conv1d and its backward.
#include "bindings/bindings.h"

namespace fastlvm {
namespace {

struct ConvInputs {
  Array x, weight, bias, initial_state;
  py::handle cu_seqlens;
  std::vector<int64_t> offsets;
  bool silu;

  ConvInputs(py::handle x, py::handle weight, py::handle bias, bool silu, py::handle initial_state,
             py::handle cu_seqlens)
      : x("x", x, Access::read),
        weight("weight", weight, Access::read),
        bias("bias", bias, Access::read, optional),
        initial_state("initial_state", initial_state, Access::read, optional),
        cu_seqlens(cu_seqlens),
        silu(silu) {}

  bool float64() const { return x.view().dtype == DType::f64; }

  Sizes check() {
    check_rank(x, "BDL");
    check_rank(weight, "DW");
    const int64_t width = weight.shape(1);
    if (width < 1) throw std::invalid_argument("weight: got " + weight.shape_text() + ", wants (D, W) with W >= 1");
    Sizes sizes = {{'B', x.shape(0)}, {'D', x.shape(1)}, {'L', x.shape(2)}, {'W', width}, {'K', width - 1}};
    offsets = read_sequences(cu_seqlens, x, sizes);
    check_inputs({{weight, "DW"}, {bias, "D"}, {initial_state, "SDK"}}, sizes, float64());
    return sizes;
  }

  CausalConv1d args(const Sizes& sizes) const {
    CausalConv1d args{};
    args.batch = sizes.at('S'), args.dim = sizes.at('D'), args.length = sizes.at('L'), args.width = sizes.at('W');
    args.offsets = offsets.empty() ? nullptr : offsets.data();
    args.float64 = float64(), args.silu = silu;
    args.x = x.view(), args.weight = weight.view(), args.bias = bias.view();
    args.initial_state = initial_state.view();
    return args;
  }
};

void causal_conv1d(py::handle x, py::handle weight, py::handle bias, bool silu, py::handle initial_state,
                   py::handle out, py::handle final_state, py::handle cu_seqlens) {
  ConvInputs in(x, weight, bias, silu, initial_state, cu_seqlens);
  const Array result("out", out, Access::fresh), last("final_state", final_state, Access::fresh, optional);
  const Sizes sizes = in.check();
  check_shape(result, "BDL", sizes);
  check_shape(last, "SDK", sizes);
  check_output(result, in.x.view().dtype);
  check_output(last, in.x.view().dtype);
  CausalConv1d args = in.args(sizes);
  args.out = result.view(), args.final_state = last.view();
  call_without_gil(active_kernels().causal_conv1d, args);
}

void causal_conv1d_bwd(py::handle grad_out, py::handle grad_final_state, py::handle x, py::handle weight,
                       py::handle bias, bool silu, py::handle initial_state, py::handle dx, py::handle dweight,
                       py::handle dbias, py::handle dinitial_state, py::handle cu_seqlens) {
  ConvInputs in(x, weight, bias, silu, initial_state, cu_seqlens);
  const Array grad("grad_out", grad_out, Access::read, optional);
  const Array grad_last("grad_final_state", grad_final_state, Access::read, optional);
  const Array to_x("dx", dx, Access::fresh, optional), to_weight("dweight", dweight, Access::fresh, optional);
  const Array to_bias("dbias", dbias, Access::fresh, optional);
  const Array to_initial("dinitial_state", dinitial_state, Access::fresh, optional);
  const Sizes sizes = in.check();
  check_inputs({{grad, "BDL"}, {grad_last, "SDK"}}, sizes, in.float64());
  check_wanted(to_bias, in.bias);
  check_wanted(to_initial, in.initial_state);
  check_alike(to_x, in.x, "BDL", sizes);
  check_gradients({{to_weight, "DW"}, {to_bias, "D"}, {to_initial, "SDK"}}, sizes, in.float64());
  CausalConv1dBwd args{};
  args.forward = in.args(sizes);
  args.grad_out = grad.view(), args.grad_final_state = grad_last.view();
  args.dx = to_x.view(), args.dweight = to_weight.view(), args.dbias = to_bias.view();
  args.dinitial_state = to_initial.view();
  call_without_gil(active_kernels().causal_conv1d_bwd, args);
}

}  // namespace

void bind_causal_conv1d(py::module_& m) {
  m.def("causal_conv1d", &causal_conv1d, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("silu"),
        py::arg("initial_state"), py::arg("out"), py::arg("final_state"), py::arg("cu_seqlens") = py::none());
  m.def("causal_conv1d_bwd", &causal_conv1d_bwd, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("silu"), py::arg("initial_state"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"), py::arg("dinitial_state"), py::arg("cu_seqlens") = py::none());
}

}  // namespace fastlvm
