// One case of an op: drawn arrays, the call, and what must hold of the result.
#pragma once

#include <algorithm>
#include <cstdio>
#include <list>
#include <stdexcept>

#include "arrays.h"
#include "common/threads.h"
#include "ops/kernels.h"

namespace fastlvm::test {

// A case is computed as drawn, with the instruction set under test; in float64 on contiguous copies, by the scalar
// kernels or plain loops; and so on absolute values, where nothing cancels: an element of that result is the sum of the
// sizes of the terms of the true one, and errors are measured by it. Inputs that set a factor rather than a term (A,
// delta) keep their sign.
enum Variant { drawn, exact, sizes };

struct Tensor {
  Tensor(Draws& draw, const char* name, const Array::Shape& shape, DType dtype, Array::Layout layout)
      : name(name),
        arrays{Array(draw, shape, dtype, layout), Array(draw, shape, DType::f64, Array::contiguous),
               Array(draw, shape, DType::f64, Array::contiguous)} {}

  const char* name;
  Array arrays[3];
  double tolerance = 0;        // of an output
  bool cancels = false;        // even in `sizes`: measured by the largest element
  bool decays = false;         // the smaller, the larger its relative error: see Case::logarithms
  std::vector<double> before;  // of a state: what it held as drawn

  const TensorView& view(Variant variant) const { return arrays[variant].view(); }
};

inline TensorView view(const Tensor* tensor, Variant variant) { return tensor ? tensor->view(variant) : TensorView(); }

// Thrown by a case that fails.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Case {
 public:
  Case(const Kernels& kernels, uint64_t seed, Coverage* coverage)
      : kernels_(kernels), draw(seed, coverage), float64(draw.pick("float64", {0, 0, 0, 1})) {}

  bool wide(Variant variant) const { return float64 || variant != drawn; }
  const Kernels& kernels(Variant variant) const { return variant == drawn ? kernels_ : *scalar_kernels(); }
  double worst() const { return worst_; }  // error of all outputs as a part of what is allowed

  DType dtype(const char* name) {
    if (float64) return DType::f64;
    const auto formats = {DType::f16, DType::bf16, DType::f32, DType::f32};
    return *(formats.begin() + draw.pick(std::string(name) + " dtype", {0, 1, 2, 3}));
  }

  // `value` gives the elements; `keep_sign` as Variant says.
  template <class F>
  Tensor& input(const char* name, const Array::Shape& shape, F value, bool keep_sign = false) {
    const auto layout = static_cast<Array::Layout>(draw.pick(std::string(name) + " layout", {0, 1, 2, 3, 4, 5}));
    return add_input(name, shape, dtype(name), layout, value, keep_sign);
  }
  Tensor& input(const char* name, const Array::Shape& shape) {
    return input(name, shape, [this] { return draw.normal(); });
  }
  Tensor& input_of(DType dtype, const char* name, const Array::Shape& shape) {
    const auto layout = static_cast<Array::Layout>(draw.pick(std::string(name) + " layout", {0, 1, 2, 3, 4, 5}));
    return add_input(name, shape, dtype, layout, [this] { return draw.normal(); }, false);
  }
  // Null when not drawn.
  Tensor* maybe(const char* name, const Array::Shape& shape, bool keep_sign = false) {
    return draw.coin(name) ? &input(name, shape, [this] { return draw.normal(); }, keep_sign) : nullptr;
  }
  Tensor& plain_input(const char* name, const Array::Shape& shape) {  // C-contiguous, float32 (float64)
    return add_input(
        name, shape, float64 ? DType::f64 : DType::f32, Array::contiguous, [this] { return draw.normal(); }, false);
  }

  Tensor& output(const char* name, const Array::Shape& shape, DType dtype, double tolerance) {
    const auto layout = static_cast<Array::Layout>(draw.pick(std::string(name) + " layout", {0, 1, 2, 3, 4}));
    return add_output(name, shape, dtype, layout, tolerance);
  }
  // Read and written in place; what it held is put back before it is written again. `plain` as in plain_input.
  Tensor& state(const char* name, const Array::Shape& shape, double tolerance, bool plain = false) {
    Tensor* tensor = nullptr;
    if (plain) {
      tensor = &plain_input(name, shape);
    } else {
      const auto layout = static_cast<Array::Layout>(draw.pick(std::string(name) + " layout", {0, 1, 2, 3, 4}));
      tensor = &add_input(name, shape, dtype(name), layout, [this] { return draw.normal(); }, false);
    }
    tensor->before = tensor->arrays[drawn].values();
    tensor->tolerance = tolerance;
    outputs_.push_back(tensor);
    return *tensor;
  }
  // C-contiguous, float32 (float64).
  Tensor& dense(const char* name, const Array::Shape& shape, double tolerance) {
    return add_output(name, shape, float64 ? DType::f64 : DType::f32, Array::contiguous, tolerance);
  }
  // The same, for what a case hands from one call to another.
  Tensor& scratch(const char* name, const Array::Shape& shape) {
    return add(name, shape, float64 ? DType::f64 : DType::f32, Array::contiguous);
  }
  // A gradient, which belongs to an input that may not have been given.
  Tensor* gradient(const char* name, const Tensor* of, bool cancels = false) {
    if (!of || !draw.coin(name)) return nullptr;
    const TensorView& like = of->view(exact);
    Tensor& tensor = dense(name, Array::Shape(like.shape, like.shape + like.rank), gradient_bound());
    tensor.cancels = cancels, tensor.decays = logarithms;
    return &tensor;
  }

  // The same in the dtype of the input, laid out in any way.
  Tensor* gradient_alike(const char* name, const Tensor* of, bool cancels = false) {
    if (!of || !draw.coin(name)) return nullptr;
    const TensorView& like = of->view(drawn);
    Tensor& tensor = output(name, Array::Shape(like.shape, like.shape + like.rank), like.dtype, gradient_bound());
    tensor.cancels = cancels, tensor.decays = logarithms;
    return &tensor;
  }

  // Calls op(variant) as drawn, once more on one thread and in both float64 forms; throws Failure.
  template <class Op>
  void run(Op op) {
    set_num_threads(static_cast<int>(draw.pick("threads", {1, 2, 3, 4})));
    op(drawn);
    std::vector<std::vector<unsigned char>> bytes;
    for (Tensor* tensor : outputs_) {
      const Memory& memory = tensor->arrays[drawn].memory();
      bytes.emplace_back(memory.data(), memory.data() + memory.size());
      if (!tensor->arrays[drawn].gaps_are_clean()) fail(*tensor, "was written to between its elements");
      put_back(*tensor);
    }
    set_num_threads(1);
    op(drawn);
    size_t at = 0;
    for (Tensor* tensor : outputs_) {
      const Memory& memory = tensor->arrays[drawn].memory();
      if (!std::equal(memory.data(), memory.data() + memory.size(), bytes[at++].begin()))
        fail(*tensor, "depends on the number of threads");
    }
    op(exact);
    op(sizes);
    for (const Tensor* tensor : outputs_) compare(*tensor);
  }

  // After a run: the entries of a state that are not `advanced` are as they were, to the last bit.
  void expect_left_alone(const Tensor& state, const std::vector<bool>& advanced) const {
    const std::vector<double> after = state.arrays[drawn].values();
    for (size_t i = 0; i < after.size(); ++i)
      if (!advanced[i / (after.size() / advanced.size())] && after[i] != state.before[i])
        fail(state, "[" + std::to_string(i) + "] of a state that no row advances was " + text(state.before[i]) +
                        " and is " + text(after[i]));
  }

  static constexpr double forward_tolerance = 2e-6, gradient_tolerance = 1e-5;

 private:
  double gradient_bound() const { return gradient_tolerance + static_cast<double>(steps) * 0x1p-24; }

  const Kernels& kernels_;

 public:
  Draws draw;
  const bool float64;
  bool logarithms = false;  // decays are exp of a sum, and a gradient's relative error grows with that of the sum
  int64_t steps = 0;  // of a recurrence whose gradient is rounded once a step, alike in each where the step is constant

 private:
  template <class F>
  Tensor& add_input(const char* name, const Array::Shape& shape, DType dtype, Array::Layout layout, F value,
                    bool keep_sign) {
    Tensor& tensor = add(name, shape, dtype, layout);
    tensor.arrays[drawn].fill(value);
    const std::vector<double> values = tensor.arrays[drawn].values();  // as rounded, and with elements in one place
    auto next = values.begin();
    tensor.arrays[exact].fill([&] { return *next++; });
    next = values.begin();
    tensor.arrays[sizes].fill([&] { return keep_sign ? *next++ : std::fabs(*next++); });
    return tensor;
  }

  Tensor& add_output(const char* name, const Array::Shape& shape, DType dtype, Array::Layout layout, double tolerance) {
    Tensor& tensor = add(name, shape, dtype, layout);
    tensor.tolerance = tolerance;
    outputs_.push_back(&tensor);
    return tensor;
  }

  Tensor& add(const char* name, const Array::Shape& shape, DType dtype, Array::Layout layout) {
    return tensors_.emplace_back(draw, name, shape, dtype, layout);
  }

  static void put_back(Tensor& tensor) {
    tensor.arrays[drawn].forget();
    auto next = tensor.before.begin();
    if (!tensor.before.empty()) tensor.arrays[drawn].fill([&] { return *next++; });
  }

  void compare(const Tensor& tensor) {
    const std::vector<double> got = tensor.arrays[drawn].values(), want = tensor.arrays[exact].values();
    std::vector<double> scale = tensor.arrays[sizes].values();
    if (tensor.cancels) {
      double largest = 1;  // inputs are of order one
      for (const double x : scale) largest = std::max(largest, std::fabs(x));
      std::fill(scale.begin(), scale.end(), largest);
    }
    const DType dtype = tensor.view(drawn).dtype;
    const double rounding = dtype == DType::f16 ? 0x1p-11 : dtype == DType::bf16 ? 0x1p-8 : 0;
    const double smallest = dtype == DType::f16 ? 0x1p-24 : dtype == DType::f64 ? 0 : 1e-37;
    for (size_t i = 0; i < want.size(); ++i) {
      if (dtype == DType::f16 && std::fabs(want[i]) > 65000) continue;
      double tolerance = float64 ? 1e-13 : tensor.tolerance;
      if (tensor.decays) tolerance *= 1 + std::max(0.0, -std::log(std::fabs(scale[i]) + 1e-300)) / 16;
      const double allowed = tolerance * std::fabs(scale[i]) + rounding * std::fabs(want[i]) + smallest;
      const double error = std::fabs(got[i] - want[i]);
      if (!(error <= allowed))
        fail(tensor, "[" + std::to_string(i) + "] is " + text(got[i]) + " instead of " + text(want[i]) +
                         ", terms of size " + text(scale[i]));
      if (allowed > 0 && rounding == 0) worst_ = std::max(worst_, error / allowed);
    }
  }

  static std::string text(double x) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", x);
    return digits;
  }

  [[noreturn]] void fail(const Tensor& tensor, const std::string& what) const {
    throw Failure(std::string(tensor.name) + (what[0] == '[' ? "" : " ") + what);
  }

  std::list<Tensor> tensors_;
  std::vector<Tensor*> outputs_;
  double worst_ = 0;
};

}  // namespace fastlvm::test
