// _C.linear.
#include "bindings/bindings.h"

namespace fastlvm {
namespace {

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

void bind_linear(py::module_& m) { m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("out")); }

}  // namespace fastlvm
