// The extension module fastlvm._C: arrays are unwrapped and checked, the GIL is released, a kernel is called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>

#include "arrays.h"
#include "common/dispatch.h"
#include "common/threads.h"
#include "ops/kernels.h"

namespace py = pybind11;

namespace fastlvm {
namespace {

// Calls a kernel without the GIL. A daemon thread that is still computing when the interpreter ends cannot have the GIL
// back: CPython before 3.14 then ends the thread by unwinding its stack, which a destructor (py::gil_scoped_release)
// must not be part of. Such a thread is left waiting for the process to end.
template <class Args>
void call_without_gil(void (*kernel)(const Args&), const Args& args) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    kernel(args);
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  try {
    PyEval_RestoreThread(state);
  } catch (...) {
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }
  if (error) std::rethrow_exception(error);
}

constexpr bool optional = true;

// An array and the axes it must have.
struct Expected {
  const Array& array;
  const char* axes;
};

void check_inputs(std::initializer_list<Expected> arrays, const Sizes& sizes, bool float64) {
  for (const auto& [array, axes] : arrays) {
    check_shape(array, axes, sizes);
    check_input_dtype(array, float64);
  }
}

void check_gradients(std::initializer_list<Expected> arrays, const Sizes& sizes, bool float64) {
  for (const auto& [array, axes] : arrays) {
    check_shape(array, axes, sizes);
    check_dense(array, float64);
  }
}

void check_wanted(const Array& gradient, const Array& input) {
  if (gradient && !input)
    throw std::invalid_argument(std::string(gradient.name()) + ": got an array, wants None because " + input.name() +
                                " is None");
}

// The inputs that forward and backward share.
struct ScanInputs {
  Array u, delta, A, B, C, D, z, delta_bias, initial_state;
  bool delta_softplus;

  ScanInputs(py::handle u, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D, py::handle z,
             py::handle delta_bias, bool delta_softplus, py::handle initial_state)
      : u("u", u, Access::read),
        delta("delta", delta, Access::read),
        A("A", A, Access::read),
        B("B", B, Access::read),
        C("C", C, Access::read),
        D("D", D, Access::read, optional),
        z("z", z, Access::read, optional),
        delta_bias("delta_bias", delta_bias, Access::read, optional),
        initial_state("initial_state", initial_state, Access::read, optional),
        delta_softplus(delta_softplus) {}

  bool float64() const { return u.view().dtype == DType::f64; }

  Sizes check() const {
    check_rank(u, "BDL");
    check_rank(A, "DN");
    const Sizes sizes = {{'B', u.shape(0)}, {'D', u.shape(1)}, {'L', u.shape(2)}, {'N', A.shape(1)}};
    check_inputs({{delta, "BDL"}, {A, "DN"}, {D, "D"}, {z, "BDL"}, {delta_bias, "D"}, {initial_state, "BDN"}}, sizes,
                 float64());
    for (const Array* projection : {&B, &C}) {
      check_projection(*projection, sizes);
      check_input_dtype(*projection, float64());
    }
    return sizes;
  }

  SsmScan args(const Sizes& sizes) const {
    SsmScan args{};
    args.batch = sizes.at('B'), args.dim = sizes.at('D'), args.length = sizes.at('L'), args.state = sizes.at('N');
    args.float64 = float64(), args.delta_softplus = delta_softplus;
    args.u = u.view(), args.delta = delta.view(), args.z = z.view(), args.A = A.view();
    args.B = projection_view(B), args.C = projection_view(C);
    args.D = D.view(), args.delta_bias = delta_bias.view(), args.initial_state = initial_state.view();
    return args;
  }
};

void ssm_scan(py::handle u, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D, py::handle z,
              py::handle delta_bias, bool delta_softplus, py::handle initial_state, py::handle out,
              py::handle final_state) {
  const ScanInputs in(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state);
  const Array result("out", out, Access::write), last("final_state", final_state, Access::write, optional);
  const Sizes sizes = in.check();
  check_shape(result, "BDL", sizes);
  check_output(result, in.u.view().dtype);
  check_gradients({{last, "BDN"}}, sizes, in.float64());
  SsmScan args = in.args(sizes);
  args.out = result.view(), args.final_state = last.view();
  call_without_gil(active_kernels().ssm_scan, args);
}

void ssm_scan_bwd(py::handle grad_out, py::handle grad_final_state, py::handle u, py::handle delta, py::handle A,
                  py::handle B, py::handle C, py::handle D, py::handle z, py::handle delta_bias, bool delta_softplus,
                  py::handle initial_state, py::handle du, py::handle ddelta, py::handle dA, py::handle dB,
                  py::handle dC, py::handle dD, py::handle dz, py::handle ddelta_bias, py::handle dinitial_state) {
  const ScanInputs in(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state);
  const Array grad("grad_out", grad_out, Access::read, optional);
  const Array grad_last("grad_final_state", grad_final_state, Access::read, optional);
  const auto output = [](const char* name, py::handle array) { return Array(name, array, Access::write, optional); };
  const Array to_u = output("du", du), to_delta = output("ddelta", ddelta), to_A = output("dA", dA);
  const Array to_B = output("dB", dB), to_C = output("dC", dC), to_D = output("dD", dD), to_z = output("dz", dz);
  const Array to_bias = output("ddelta_bias", ddelta_bias), to_initial = output("dinitial_state", dinitial_state);

  Sizes sizes = in.check();
  check_inputs({{grad, "BDL"}, {grad_last, "BDN"}}, sizes, in.float64());
  check_wanted(to_D, in.D);
  check_wanted(to_z, in.z);
  check_wanted(to_bias, in.delta_bias);
  check_wanted(to_initial, in.initial_state);
  check_gradients(
      {{to_u, "BDL"}, {to_delta, "BDL"}, {to_A, "DN"}, {to_D, "D"}, {to_z, "BDL"}, {to_bias, "D"}, {to_initial, "BDN"}},
      sizes, in.float64());
  const auto projection_axes = [&](const Array& projection) {
    if (projection.view().rank == 4) sizes['G'] = projection.shape(1);
    return projection.view().rank == 2 ? "DN" : projection.view().rank == 3 ? "BNL" : "BGNL";
  };
  check_gradients({{to_B, projection_axes(in.B)}}, sizes, in.float64());
  check_gradients({{to_C, projection_axes(in.C)}}, sizes, in.float64());

  SsmScanBwd args{};
  args.forward = in.args(sizes);
  args.grad_out = grad.view(), args.grad_final_state = grad_last.view();
  args.du = to_u.view(), args.ddelta = to_delta.view(), args.dA = to_A.view(), args.dB = to_B.view();
  args.dC = to_C.view(), args.dD = to_D.view(), args.dz = to_z.view();
  args.ddelta_bias = to_bias.view(), args.dinitial_state = to_initial.view();
  call_without_gil(active_kernels().ssm_scan_bwd, args);
}

struct ConvInputs {
  Array x, weight, bias, initial_state;
  bool silu;

  ConvInputs(py::handle x, py::handle weight, py::handle bias, bool silu, py::handle initial_state)
      : x("x", x, Access::read),
        weight("weight", weight, Access::read),
        bias("bias", bias, Access::read, optional),
        initial_state("initial_state", initial_state, Access::read, optional),
        silu(silu) {}

  bool float64() const { return x.view().dtype == DType::f64; }

  Sizes check() const {
    check_rank(x, "BDL");
    check_rank(weight, "DW");
    const int64_t width = weight.shape(1);
    if (width < 1) throw std::invalid_argument("weight: got " + weight.shape_text() + ", wants (D, W) with W >= 1");
    const Sizes sizes = {{'B', x.shape(0)}, {'D', x.shape(1)}, {'L', x.shape(2)}, {'W', width}, {'K', width - 1}};
    check_inputs({{weight, "DW"}, {bias, "D"}, {initial_state, "BDK"}}, sizes, float64());
    return sizes;
  }

  CausalConv1d args(const Sizes& sizes) const {
    CausalConv1d args{};
    args.batch = sizes.at('B'), args.dim = sizes.at('D'), args.length = sizes.at('L'), args.width = sizes.at('W');
    args.float64 = float64(), args.silu = silu;
    args.x = x.view(), args.weight = weight.view(), args.bias = bias.view();
    args.initial_state = initial_state.view();
    return args;
  }
};

void causal_conv1d(py::handle x, py::handle weight, py::handle bias, bool silu, py::handle initial_state,
                   py::handle out, py::handle final_state) {
  const ConvInputs in(x, weight, bias, silu, initial_state);
  const Array result("out", out, Access::write), last("final_state", final_state, Access::write, optional);
  const Sizes sizes = in.check();
  check_shape(result, "BDL", sizes);
  check_shape(last, "BDK", sizes);
  check_output(result, in.x.view().dtype);
  check_output(last, in.x.view().dtype);
  CausalConv1d args = in.args(sizes);
  args.out = result.view(), args.final_state = last.view();
  call_without_gil(active_kernels().causal_conv1d, args);
}

void causal_conv1d_bwd(py::handle grad_out, py::handle grad_final_state, py::handle x, py::handle weight,
                       py::handle bias, bool silu, py::handle initial_state, py::handle dx, py::handle dweight,
                       py::handle dbias, py::handle dinitial_state) {
  const ConvInputs in(x, weight, bias, silu, initial_state);
  const Array grad("grad_out", grad_out, Access::read, optional);
  const Array grad_last("grad_final_state", grad_final_state, Access::read, optional);
  const Array to_x("dx", dx, Access::write, optional), to_weight("dweight", dweight, Access::write, optional);
  const Array to_bias("dbias", dbias, Access::write, optional);
  const Array to_initial("dinitial_state", dinitial_state, Access::write, optional);
  const Sizes sizes = in.check();
  check_inputs({{grad, "BDL"}, {grad_last, "BDK"}}, sizes, in.float64());
  check_wanted(to_bias, in.bias);
  check_wanted(to_initial, in.initial_state);
  check_gradients({{to_x, "BDL"}, {to_weight, "DW"}, {to_bias, "D"}, {to_initial, "BDK"}}, sizes, in.float64());
  CausalConv1dBwd args{};
  args.forward = in.args(sizes);
  args.grad_out = grad.view(), args.grad_final_state = grad_last.view();
  args.dx = to_x.view(), args.dweight = to_weight.view(), args.dbias = to_bias.view();
  args.dinitial_state = to_initial.view();
  call_without_gil(active_kernels().causal_conv1d_bwd, args);
}

void linear(py::handle x, py::handle weight, py::handle out) {
  const Array input("x", x, Access::read), matrix("weight", weight, Access::read), result("out", out, Access::write);
  check_rank(input, "RI");
  check_rank(matrix, "OI");
  const Sizes sizes = {{'R', input.shape(0)}, {'I', input.shape(1)}, {'O', matrix.shape(0)}};
  check_shape(matrix, "OI", sizes);
  check_shape(result, "RO", sizes);
  for (const Array* array : {&input, &matrix, &result}) check_dense(*array, false);
  const Linear args{sizes.at('R'),
                    sizes.at('I'),
                    sizes.at('O'),
                    static_cast<const float*>(input.view().data),
                    static_cast<const float*>(matrix.view().data),
                    static_cast<float*>(result.view().data)};
  call_without_gil(active_kernels().linear, args);
}

}  // namespace
}  // namespace fastlvm

PYBIND11_MODULE(_C, m) {
  using namespace fastlvm;
  m.doc() = "fastlvm native kernels";
  read_isa_environment();

  m.def("ssm_scan", &ssm_scan, py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"),
        py::arg("z"), py::arg("delta_bias"), py::arg("delta_softplus"), py::arg("initial_state"), py::arg("out"),
        py::arg("final_state"));
  m.def("ssm_scan_bwd", &ssm_scan_bwd, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("u"), py::arg("delta"),
        py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("z"), py::arg("delta_bias"),
        py::arg("delta_softplus"), py::arg("initial_state"), py::arg("du"), py::arg("ddelta"), py::arg("dA"),
        py::arg("dB"), py::arg("dC"), py::arg("dD"), py::arg("dz"), py::arg("ddelta_bias"), py::arg("dinitial_state"));
  m.def("causal_conv1d", &causal_conv1d, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("silu"),
        py::arg("initial_state"), py::arg("out"), py::arg("final_state"));
  m.def("causal_conv1d_bwd", &causal_conv1d_bwd, py::arg("grad_out"), py::arg("grad_final_state"), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("silu"), py::arg("initial_state"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"), py::arg("dinitial_state"));

  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("out"));

  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("get_num_threads", &get_num_threads);
  m.def("isa", [] { return std::string(active_kernels().name); });
  m.def("isas", &available_isas, "Instruction sets this machine can run, best last.");
  m.def("compiled_isas", &compiled_isas);
  m.def("set_isa", &set_isa, py::arg("name"));

  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    py::gil_scoped_release release;
    shutdown_threads();
  }));
}
