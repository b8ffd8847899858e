// _C.mamba_step.
#include "bindings/step.h"

namespace fastlvm {
namespace {

void mamba_step(py::handle x, py::handle conv_state, py::handle ssm_state, py::handle in_proj, py::handle conv1d,
                py::handle x_proj, py::handle dt_proj, py::handle A_log, py::handle out_proj, py::handle D,
                py::handle in_proj_bias, py::handle conv1d_bias, py::handle dt_bias, py::handle out_proj_bias,
                py::handle dt_norm, py::handle B_norm, py::handle C_norm, double norm_eps, py::handle out) {
  const Array input("x", x, Access::read), conv("conv_state", conv_state, Access::write);
  const Array states("ssm_state", ssm_state, Access::write), to_inner("in_proj", in_proj, Access::read);
  const Array filters("conv1d", conv1d, Access::read), to_projected("x_proj", x_proj, Access::read);
  const Array to_delta("dt_proj", dt_proj, Access::read), decay("A_log", A_log, Access::read);
  const Array to_model("out_proj", out_proj, Access::read), skip("D", D, Access::read, optional);
  const Array in_bias("in_proj_bias", in_proj_bias, Access::read, optional);
  const Array conv_bias("conv1d_bias", conv1d_bias, Access::read, optional);
  const Array delta_bias("dt_bias", dt_bias, Access::read, optional);
  const Array out_bias("out_proj_bias", out_proj_bias, Access::read, optional);
  const Array of_dt("dt_norm", dt_norm, Access::read, optional), of_B("B_norm", B_norm, Access::read, optional);
  const Array of_C("C_norm", C_norm, Access::read, optional), result("out", out, Access::write);
  const bool float64 = input.view().dtype == DType::f64;
  check_rank(input, "BM");
  check_rank(conv, "BDL");
  check_rank(filters, "DW");
  check_rank(decay, "DN");
  check_rank(to_delta, "DR");
  const int64_t dim = decay.shape(0), N = decay.shape(1), rank = to_delta.shape(1), width = filters.shape(1);
  if (width < 1) throw std::invalid_argument("conv1d: got " + filters.shape_text() + ", wants (D, W) with W >= 1");
  if (conv.shape(2) < width - 1)
    throw std::invalid_argument("conv_state: got " + conv.shape_text() +
                                ", wants at least W - 1 = " + std::to_string(width - 1) + " inputs a channel");
  // E is 2 D and P is R + 2 N
  const Sizes sizes = {{'B', input.shape(0)}, {'M', input.shape(1)}, {'D', dim},     {'N', N},
                       {'R', rank},           {'W', width},          {'E', 2 * dim}, {'P', rank + 2 * N},
                       {'L', conv.shape(2)}};
  check_inputs({{to_inner, "EM"}, {in_bias, "E"}, {filters, "DW"}, {conv_bias, "D"}, {to_projected, "PD"}}, sizes,
               float64);
  check_inputs({{of_dt, "R"}, {of_B, "N"}, {of_C, "N"}, {to_delta, "DR"}, {delta_bias, "D"}}, sizes, float64);
  check_inputs({{decay, "DN"}, {skip, "D"}, {to_model, "MD"}, {out_bias, "M"}}, sizes, float64);
  check_state(conv, "BDL", sizes, float64);
  check_state(states, "BDN", sizes, float64);
  check_shape(result, "BM", sizes);
  check_output(result, input.view().dtype);

  MambaStep args{};
  args.batch = sizes.at('B'), args.model = sizes.at('M'), args.dim = dim, args.state_size = N;
  args.rank = rank, args.width = width, args.length = conv.shape(2);
  args.float64 = float64, args.norm_eps = norm_eps;
  args.x = input.view(), args.out = result.view();
  args.conv_state = conv.view(), args.ssm_state = states.view();
  args.in_proj = to_inner.view(), args.in_bias = in_bias.view();
  args.conv_weight = filters.view(), args.conv_bias = conv_bias.view();
  args.x_proj = to_projected.view(), args.dt_norm = of_dt.view(), args.B_norm = of_B.view(), args.C_norm = of_C.view();
  args.dt_proj = to_delta.view(), args.dt_bias = delta_bias.view();
  args.A_log = decay.view(), args.D = skip.view();
  args.out_proj = to_model.view(), args.out_bias = out_bias.view();
  call_without_gil(active_kernels().mamba_step, args);
}

}  // namespace

void bind_mamba_step(py::module_& m) {
  m.def("mamba_step", &mamba_step, py::arg("x"), py::arg("conv_state"), py::arg("ssm_state"), py::arg("in_proj"),
        py::arg("conv1d"), py::arg("x_proj"), py::arg("dt_proj"), py::arg("A_log"), py::arg("out_proj"), py::arg("D"),
        py::arg("in_proj_bias"), py::arg("conv1d_bias"), py::arg("dt_bias"), py::arg("out_proj_bias"),
        py::arg("dt_norm"), py::arg("B_norm"), py::arg("C_norm"), py::arg("norm_eps"), py::arg("out"));
}

}  // namespace fastlvm
