// _C.Model: a list of layers becomes a packed model, which then runs without the GIL.
//
// A layer is (kind, fields): numbers, flags, vectors (float32) and matrices, each (weight, scale or None, bias or None)
// with a weight of float32, int8 (which has a scale) or uint16, whose bits are a bfloat16.
#include "predictor/model.h"

#include <deque>
#include <optional>

#include "bindings/bindings.h"

namespace fastlvm {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

// What a Python object holds; std::invalid_argument, naming it, for an object of another kind.
template <class T>
T as(const char* name, py::handle object, const char* wanted) {
  try {
    return py::cast<T>(object);
  } catch (const py::cast_error&) {
  } catch (const py::error_already_set&) {
  } catch (const py::type_error&) {
  }
  fail(std::string(name) + ": got " + Py_TYPE(object.ptr())->tp_name + ", wants " + wanted);
}

// The fields of one layer. What it gives out points into arrays that the layer's dict keeps alive.
class Fields {
 public:
  Fields(py::handle fields, std::deque<py::buffer_info>& arrays) : fields_(fields), arrays_(arrays) {}

  int64_t number(const char* name) const {
    const auto value = as<int64_t>(name, get(name), "a whole number");
    if (value < 1 || value > most) fail(std::string(name) + ": got " + std::to_string(value) + ", wants 1 to 2^24");
    return value;
  }
  py::list layers() const { return as<py::list>("layers", get("layers"), "a list"); }
  float real(const char* name) const { return as<float>(name, get(name), "a number"); }

  MatrixSource matrix(const char* name) const {
    const auto parts = as<py::tuple>(name, get(name), "(weight, scale, bias)");
    if (parts.size() != 3) fail(std::string(name) + ": wants weight, scale and bias");
    const py::buffer_info& weight = array(name, parts[0]);
    MatrixSource m{Precision::fp32, 0, 0, weight.ptr, nullptr, nullptr};
    if (weight.item_type_is_equivalent_to<int8_t>())
      m.precision = Precision::int8;
    else if (weight.item_type_is_equivalent_to<uint16_t>())
      m.precision = Precision::bf16;
    else if (!weight.item_type_is_equivalent_to<float>())
      fail(std::string(name) + ": got dtype " + weight.format + ", wants float32, uint16 or int8");
    if (weight.ndim != 2) fail(std::string(name) + ": got " + std::to_string(weight.ndim) + " axes, wants 2");
    m.outputs = size(name, weight.shape[0]), m.inputs = size(name, weight.shape[1]);
    const bool scaled = !parts[1].is_none();
    if (scaled != (m.precision == Precision::int8))
      fail(std::string(name) + ": wants a scale with int8 and only there");
    if (scaled) m.scale = floats(name, parts[1], {m.outputs});
    if (!parts[2].is_none()) m.bias = floats(name, parts[2], {m.outputs});
    return m;
  }

  const float* floats(const char* name, std::initializer_list<int64_t> shape) const {
    return floats(name, get(name), shape);
  }

  VectorSource vector(const char* name) const {
    const py::buffer_info& values = array(name, get(name));
    if (values.ndim != 1) fail(std::string(name) + ": wants a vector");
    return {size(name, values.shape[0]), floats(name, get(name), {values.shape[0]})};
  }

  NormSource norm(const char* name) const {
    const auto parts = as<py::tuple>(name, get(name), "(weight, bias, eps)");
    if (parts.size() != 3) fail(std::string(name) + ": wants weight, bias and eps");
    const py::buffer_info& weight = array(name, parts[0]);
    if (weight.ndim != 1) fail(std::string(name) + ": wants a vector");
    NormSource norm{{size(name, weight.shape[0]), floats(name, parts[0], {weight.shape[0]})},
                    nullptr,
                    as<float>(name, parts[2], "a number as eps")};
    if (!parts[1].is_none()) norm.bias = floats(name, parts[1], {norm.weight.size});
    return norm;
  }

 private:
  static constexpr int64_t most = 1 << 24;

  py::handle get(const char* name) const {
    PyObject* const found = PyDict_GetItemString(fields_.ptr(), name);
    if (!found) fail(std::string(name) + " is missing");
    return found;
  }

  static int64_t size(const char* name, int64_t axis) {
    if (axis < 1 || axis > most)
      fail(std::string(name) + ": got a size of " + std::to_string(axis) + ", wants 1 to 2^24");
    return axis;
  }

  const py::buffer_info& array(const char* name, py::handle object) const {
    arrays_.push_back(as<py::buffer>(name, object, "an array").request());
    const py::buffer_info& found = arrays_.back();
    py::ssize_t stride = found.itemsize;
    for (py::ssize_t axis = found.ndim; axis-- > 0; stride *= found.shape[static_cast<size_t>(axis)])
      if (found.shape[static_cast<size_t>(axis)] > 1 && found.strides[static_cast<size_t>(axis)] != stride)
        fail(std::string(name) + ": wants a contiguous array");
    return found;
  }

  const float* floats(const char* name, py::handle object, std::initializer_list<int64_t> shape) const {
    const py::buffer_info& found = array(name, object);
    bool fits = found.item_type_is_equivalent_to<float>() && found.ndim == static_cast<py::ssize_t>(shape.size());
    size_t axis = 0;
    std::string wanted, got;
    for (const int64_t size : shape) {
      if (fits && found.shape[axis] != size) fits = false;
      wanted += (axis++ ? ", " : "") + std::to_string(size);
    }
    for (const py::ssize_t size : found.shape) got += (got.empty() ? "" : ", ") + std::to_string(size);
    if (!fits) fail(std::string(name) + ": got " + found.format + " [" + got + "], wants float32 [" + wanted + "]");
    return static_cast<const float*>(found.ptr);
  }

  py::handle fields_;
  std::deque<py::buffer_info>& arrays_;
};

void add_layers(Builder& builder, const py::list& layers, std::deque<py::buffer_info>& arrays);

MambaSource mamba_source(const Fields& f) {
  MambaSource m{f.norm("norm"),
                f.matrix("in_proj"),
                f.matrix("x_proj"),
                f.matrix("dt_proj"),
                f.matrix("out_proj"),
                f.number("d_conv"),
                f.number("d_state"),
                nullptr,
                nullptr,
                nullptr,
                nullptr};
  const int64_t inner = m.out_proj.inputs;
  m.conv_weight = f.floats("conv_weight", {inner, m.width}), m.conv_bias = f.floats("conv_bias", {inner});
  m.A = f.floats("A", {inner, m.state}), m.D = f.floats("D", {inner});
  return m;
}

Mamba2Source mamba2_source(const Fields& f) {
  Mamba2Source m{};
  m.norm = f.norm("norm"), m.gate_norm = f.norm("gate_norm");
  m.in_proj = f.matrix("in_proj"), m.out_proj = f.matrix("out_proj");
  m.heads = f.number("n_heads"), m.head_dim = f.number("head_dim"), m.groups = f.number("n_groups");
  m.state = f.number("d_state"), m.width = f.number("d_conv");
  const int64_t channels = m.heads * m.head_dim + 2 * m.groups * m.state;
  m.conv_weight = f.floats("conv_weight", {channels, m.width}), m.conv_bias = f.floats("conv_bias", {channels});
  m.A = f.floats("A", {m.heads}), m.D = f.floats("D", {m.heads}), m.dt_bias = f.floats("dt_bias", {m.heads});
  return m;
}

void add_layer(Builder& builder, const std::string& kind, py::handle fields, std::deque<py::buffer_info>& arrays) {
  const Fields f(fields, arrays);
  if (kind == "linear") return builder.linear(f.matrix("weight"));
  if (kind == "norm") return builder.norm(f.norm("norm"));
  if (kind == "mamba_block") return builder.mamba_block(mamba_source(f));
  if (kind == "mamba2_block") return builder.mamba2_block(mamba2_source(f));
  if (kind == "attention") return builder.attention(f.number("heads"), f.number("window"));
  if (kind == "gru" || kind == "lstm")
    return builder.recurrent(kind == "lstm", f.matrix("input"), f.matrix("recurrent"));
  if (kind == "gelu") return builder.gelu();
  if (kind == "last") return builder.last();
  if (kind == "flatten") return builder.flatten();
  if (kind == "context") return builder.context();
  if (kind == "l2_norm") return builder.l2_norm();
  if (kind == "positions") {
    const int64_t count = f.number("context"), dim = f.number("dim");
    return builder.positions(f.floats("table", {count, dim}), count, dim);
  }
  if (kind == "recency_mixture" || kind == "mixture") {
    const VectorSource logits = f.vector("logits");
    return builder.recency_mixture(logits.data, logits.size, kind == "mixture");
  }
  if (kind == "context_attention") return builder.context_attention(f.matrix("query"), f.matrix("key"));
  if (kind == "residual") {
    builder.begin_residual();
    add_layers(builder, f.layers(), arrays);
    return builder.end_residual();
  }
  fail("kind: got '" + kind + "', which is no layer");
}

void add_layers(Builder& builder, const py::list& layers, std::deque<py::buffer_info>& arrays) {
  for (const py::handle layer : layers) {
    const auto parts = as<py::tuple>("layers", layer, "(kind, fields) of each");
    if (parts.size() != 2 || !py::isinstance<py::dict>(parts[1])) fail("layers: wants (kind, fields) of each");
    add_layer(builder, as<std::string>("kind", parts[0], "a name"), parts[1], arrays);
  }
}

std::unique_ptr<Model> make_model(int64_t positions, int64_t dim, const py::list& layers) {
  if (positions < 1 || positions > 1 << 16 || dim < 1 || dim > 1 << 16)
    fail("context: got " + std::to_string(positions) + " of " + std::to_string(dim) + ", wants 1 to 65536 of each");
  return std::make_unique<Model>(positions, dim, [&](Builder& builder) {
    std::deque<py::buffer_info> arrays;
    add_layers(builder, layers, arrays);
  });
}

int checked_threads(int threads) {
  if (threads < 0 || threads > 1024) fail("threads: got " + std::to_string(threads) + ", wants 0 to 1024");
  return threads;
}

void run(const Model& model, py::handle context, py::handle out, int threads, py::handle nanoseconds) {
  const Array input("context", context, Access::read), result("out", out, Access::write);
  check_rank(input, "BLD");
  const Sizes sizes = {{'B', input.shape(0)}, {'L', model.positions()}, {'D', model.dim()}, {'O', model.out_dim()}};
  check_shape(input, "BLD", sizes);
  check_shape(result, "BO", sizes);
  check_dense(input, false);
  check_dense(result, false);
  std::optional<py::buffer_info> times;
  if (!nanoseconds.is_none()) {
    times = as<py::buffer>("nanoseconds", nanoseconds, "an array").request();
    if (times->readonly) fail("nanoseconds: got a read-only array, wants one to write to");
    if (!times->item_type_is_equivalent_to<int64_t>() || times->ndim != 2 || times->shape[0] != model.layers() ||
        times->shape[1] != phases || times->strides[1] != sizeof(int64_t) ||
        times->strides[0] != phases * static_cast<py::ssize_t>(sizeof(int64_t)))
      fail("nanoseconds: wants int64 [" + std::to_string(model.layers()) + ", " + std::to_string(phases) + "]");
  }
  const auto* const from = static_cast<const float*>(input.view().data);
  auto* const to = static_cast<float*>(result.view().data);
  auto* const clock = times ? static_cast<int64_t*>(times->ptr) : nullptr;
  checked_threads(threads);
  call_without_gil([&] { model.run(from, input.shape(0), to, threads, clock); });
}

void step(const Model& model, py::handle vector, py::handle out, py::handle state, int64_t seen, int threads) {
  if (!model.streams()) fail("the model takes a whole context at a time: one of its layers keeps no state");
  const Array input("vector", vector, Access::read), result("out", out, Access::write),
      kept("state", state, Access::write);
  const Sizes sizes = {{'D', model.dim()}, {'O', model.out_dim()}, {'S', model.state_size()}};
  check_shape(input, "D", sizes);
  check_shape(result, "O", sizes);
  check_shape(kept, "S", sizes);
  for (const Array* array : {&input, &result, &kept}) check_dense(*array, false);
  if (seen < 0 || seen > int64_t{1} << 53)
    fail("seen: got " + std::to_string(seen) + ", wants the number of vectors before this one");
  if (model.most_positions() > 0 && seen >= model.most_positions())
    fail("seen: got " + std::to_string(seen) + ", and the model takes " + std::to_string(model.most_positions()) +
         " vectors at most");
  const auto* const from = static_cast<const float*>(input.view().data);
  auto *const to = static_cast<float*>(result.view().data), *const floats = static_cast<float*>(kept.view().data);
  checked_threads(threads);
  call_without_gil([&] { model.step(from, to, floats, seen, threads); });
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<Model>(m, "Model", "A packed model: context [n, positions, dim] → [n, out_dim], all float32.")
      .def(py::init(&make_model), py::arg("positions"), py::arg("dim"), py::arg("layers"))
      .def("run", &run, py::arg("context"), py::arg("out"), py::arg("threads") = 0, py::arg("nanoseconds") = py::none())
      .def("step", &step, py::arg("vector"), py::arg("out"), py::arg("state"), py::arg("seen"), py::arg("threads") = 0)
      .def_property_readonly("positions", &Model::positions)
      .def_property_readonly("dim", &Model::dim)
      .def_property_readonly("out_dim", &Model::out_dim)
      .def_property_readonly("nbytes", &Model::bytes)
      .def_property_readonly("layers", &Model::layers)
      .def_property_readonly("streams", &Model::streams)
      .def_property_readonly("state_size", &Model::state_size)
      .def_property_readonly("most_positions", &Model::most_positions);
  py::list names;
  for (const char* name : {"elementwise", "in_proj", "x_proj", "scan", "out_proj", "linear", "attention", "recurrent"})
    names.append(name);
  m.attr("PHASES") = py::tuple(names);
}

}  // namespace fastlvm
