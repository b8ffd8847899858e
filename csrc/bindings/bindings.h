// What the bindings of all ops share. Arrays are unwrapped and checked, the GIL is released, a kernel is called.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <exception>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "arrays.h"
#include "common/dispatch.h"
#include "ops/kernels.h"

namespace py = pybind11;

namespace fastlvm {

void bind_ssm_scan(py::module_& m);
void bind_ssd_scan(py::module_& m);
void bind_causal_conv1d(py::module_& m);
void bind_info_nce(py::module_& m);
void bind_model(py::module_& m);
void bind_searcher(py::module_& m);
void bind_ssm_step(py::module_& m);
void bind_causal_conv1d_step(py::module_& m);
void bind_ssd_step(py::module_& m);
void bind_mamba_step(py::module_& m);

// Calls a kernel without the GIL. A daemon thread that is still computing when the interpreter ends cannot have the GIL
// back: CPython before 3.14 then ends the thread by unwinding its stack, which a destructor (py::gil_scoped_release)
// must not be part of. Such a thread is left waiting for the process to end.
template <class Call>
void call_without_gil(Call call) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    call();
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

template <class Args>
void call_without_gil(void (*kernel)(const Args&), const Args& args) {
  call_without_gil([&] { kernel(args); });
}

constexpr bool optional = true;

// An array and the axes it must have.
struct Expected {
  const Array& array;
  const char* axes;
};

inline void check_inputs(std::initializer_list<Expected> arrays, const Sizes& sizes, bool float64) {
  for (const auto& [array, axes] : arrays) {
    check_shape(array, axes, sizes);
    check_input_dtype(array, float64);
  }
}

inline void check_gradients(std::initializer_list<Expected> arrays, const Sizes& sizes, bool float64) {
  for (const auto& [array, axes] : arrays) {
    check_shape(array, axes, sizes);
    check_dense(array, float64);
  }
}

inline void check_wanted(const Array& gradient, const Array& input) {
  if (gradient && !input)
    throw std::invalid_argument(std::string(gradient.name()) + ": got an array, wants None because " + input.name() +
                                " is None");
}

// A gradient of any layout, in the dtype of the input it belongs to.
inline void check_alike(const Array& gradient, const Array& input, const char* axes, const Sizes& sizes) {
  if (!gradient) return;
  check_wanted(gradient, input);
  check_shape(gradient, axes, sizes);
  check_output(gradient, input.view().dtype);
}

// The offsets of packed sequences, of batch size 1, and `sizes` with S, the number of sequences, which is B without
// them.
inline std::vector<int64_t> read_sequences(py::handle cu_seqlens, const Array& lead, Sizes& sizes) {
  std::vector<int64_t> offsets = read_offsets(cu_seqlens, sizes.at('L'));
  if (!offsets.empty() && sizes.at('B') != 1)
    throw std::invalid_argument(std::string(lead.name()) + ": got " + lead.shape_text() +
                                ", wants a batch size of 1 with cu_seqlens");
  sizes['S'] = offsets.empty() ? sizes.at('B') : static_cast<int64_t>(offsets.size()) - 1;
  return offsets;
}

}  // namespace fastlvm
