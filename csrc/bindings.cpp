// The extension module fastlvm._C: the ops of bindings/, the thread team and the instruction set.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "common/threads.h"

PYBIND11_MODULE(_C, m) {
  using namespace fastlvm;
  m.doc() = "fastlvm native kernels";
  read_isa_environment();

  bind_ssm_scan(m);
  bind_ssd_scan(m);
  bind_causal_conv1d(m);
  bind_info_nce(m);
  bind_model(m);
  bind_searcher(m);
  bind_ssm_step(m);
  bind_causal_conv1d_step(m);
  bind_ssd_step(m);
  bind_mamba_step(m);

  m.def("set_num_threads", &set_num_threads, py::arg("n"));
  m.def("get_num_threads", &get_num_threads);
  m.def("isa", [] { return std::string(active_kernels().name); });
  m.def("isas", &available_isas, "Instruction sets this machine can run, best last.");
  m.def("compiled_isas", &compiled_isas);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def(
      "products",
      [] {
        py::dict found;
        const char* const names[] = {"fp32", "bf16", "int8"};
        const Products products = active_products();
        for (int i = 0; i < precisions; ++i) found[names[i]] = products.of[i]->name;
        return found;
      },
      "By precision, the instructions that a model's matrices are multiplied with.");
  m.def("set_extension_level", &set_extension_level, py::arg("level"));
  m.attr("EXTENSION_LEVELS") = extension_levels;

  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    py::gil_scoped_release release;
    shutdown_threads();
  }));
}
