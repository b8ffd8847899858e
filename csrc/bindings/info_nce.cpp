// _C.info_nce and its backward.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string_view>

#include "bindings/bindings.h"

namespace fastlvm {
namespace {

// A matrix of bools or int64, which no kernel computes on, through the buffer protocol.
class Matrix {
 public:
  Matrix(const char* name, py::handle object, int64_t itemsize, std::string_view formats, bool contiguous)
      : name_(name) {
    if (object.is_none()) return;
    const int flags = PyBUF_FORMAT | (contiguous ? PyBUF_C_CONTIGUOUS : PyBUF_STRIDES);
    if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
      const py::error_already_set error;
      throw std::invalid_argument(std::string(name) + ": cannot be read (" + error.what() + ")");
    }
    const std::string_view format = buffer_.format ? buffer_.format : "B";
    if (buffer_.ndim == 2 && buffer_.itemsize == itemsize && formats.find(format) != formats.npos) return;
    PyBuffer_Release(&buffer_);
    throw std::invalid_argument(std::string(name) + ": wants a matrix of " + (itemsize == 1 ? "bool" : "int64"));
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  ~Matrix() {
    if (buffer_.obj) PyBuffer_Release(&buffer_);
  }

  explicit operator bool() const { return buffer_.obj != nullptr; }
  int64_t shape(int axis) const { return buffer_.shape[axis]; }
  int64_t stride(int axis) const { return buffer_.strides[axis]; }
  template <class T>
  const T* data() const {
    static const T nothing{};
    return !buffer_.obj ? nullptr : buffer_.buf ? static_cast<const T*>(buffer_.buf) : &nothing;
  }
  void check_shape(int64_t rows, int64_t columns) const {
    if (!*this || (shape(0) == rows && shape(1) == columns)) return;
    throw std::invalid_argument(std::string(name_) + ": got shape (" + std::to_string(shape(0)) + ", " +
                                std::to_string(shape(1)) + "), wants (" + std::to_string(rows) + ", " +
                                std::to_string(columns) + ")");
  }

 private:
  const char* name_;
  Py_buffer buffer_{};
};

// The inputs that forward and backward share.
struct NceInputs {
  Array queries, keys;
  Matrix mask, query_labels, key_labels;
  double temperature;
  bool symmetric;

  NceInputs(py::handle queries, py::handle keys, double temperature, bool symmetric, py::handle mask,
            py::handle query_labels, py::handle key_labels)
      : queries("queries", queries, Access::read),
        keys("keys", keys, Access::read),
        mask("mask", mask, 1, "?", false),
        query_labels("query_labels", query_labels, 8, "lq", true),
        key_labels("key_labels", key_labels, 8, "lq", true),
        temperature(temperature),
        symmetric(symmetric) {}

  bool float64() const { return queries.view().dtype == DType::f64; }

  Sizes check() const {
    check_rank(queries, "BD");
    check_rank(keys, "MD");
    const Sizes sizes = {
        {'B', queries.shape(0)}, {'M', keys.shape(0)}, {'D', queries.shape(1)}, {'S', symmetric ? 2 : 1}};
    check_inputs({{queries, "BD"}, {keys, "MD"}}, sizes, float64());
    const int64_t batch = sizes.at('B'), count = sizes.at('M');
    if (count < batch || (symmetric && count != batch))
      throw std::invalid_argument("keys: got " + keys.shape_text() + ", wants (M, D) with M " +
                                  (symmetric ? "equal to B" : "of at least B") + "=" + std::to_string(batch));
    if (!(temperature > 0) || !std::isfinite(temperature))
      throw std::invalid_argument("temperature: wants a positive finite number");
    mask.check_shape(batch, count);
    if (static_cast<bool>(query_labels) != static_cast<bool>(key_labels))
      throw std::invalid_argument("key_labels: wants labels of queries and keys, or of neither");
    if (query_labels) {
      query_labels.check_shape(batch, query_labels.shape(1));
      key_labels.check_shape(count, query_labels.shape(1));
    }
    return sizes;
  }

  InfoNce args(const Sizes& sizes) const {
    InfoNce args{};
    args.batch = sizes.at('B'), args.keys_count = sizes.at('M'), args.dim = sizes.at('D');
    args.float64 = float64(), args.symmetric = symmetric, args.scale = 1 / temperature;
    args.queries = queries.view(), args.keys = keys.view();
    args.mask = mask.data<uint8_t>();
    for (int i = 0; mask && i < 2; ++i) args.mask_stride[i] = mask.stride(i);
    args.query_labels = query_labels.data<int64_t>(), args.key_labels = key_labels.data<int64_t>();
    args.label_columns = query_labels ? query_labels.shape(1) : 0;
    const Product* const product = active_products().of[static_cast<int>(Precision::bf16)];
    args.bf16 = product && product->tiles ? product : nullptr;
    return args;
  }
};

void info_nce(py::handle queries, py::handle keys, double temperature, bool symmetric, py::handle mask,
              py::handle query_labels, py::handle key_labels, py::handle loss, py::handle total, py::handle log_sums,
              py::handle dqueries, py::handle dkeys) {
  const NceInputs in(queries, keys, temperature, symmetric, mask, query_labels, key_labels);
  const Array losses("loss", loss, Access::fresh, optional), sum("total", total, Access::fresh, optional);
  const Array logs("log_sums", log_sums, Access::fresh, optional);
  const Array to_queries("dqueries", dqueries, Access::fresh, optional);
  const Array to_keys("dkeys", dkeys, Access::fresh, optional);
  const Sizes sizes = in.check();
  check_gradients({{losses, "B"}, {sum, ""}, {logs, "SB"}, {to_queries, "BD"}, {to_keys, "MD"}}, sizes, in.float64());
  if (symmetric && (to_queries || to_keys))
    throw std::invalid_argument("symmetric: got True with gradients, which info_nce_bwd has");
  InfoNce args = in.args(sizes);
  args.loss = losses.view(), args.total = sum.view(), args.log_sums = logs.view();
  args.dqueries = to_queries.view(), args.dkeys = to_keys.view();
  call_without_gil(active_kernels().info_nce, args);
}

void info_nce_bwd(py::handle grad, py::handle queries, py::handle keys, double temperature, bool symmetric,
                  py::handle mask, py::handle query_labels, py::handle key_labels, py::handle log_sums,
                  py::handle dqueries, py::handle dkeys) {
  const NceInputs in(queries, keys, temperature, symmetric, mask, query_labels, key_labels);
  const Array weights("grad", grad, Access::read), logs("log_sums", log_sums, Access::read);
  const Array to_queries("dqueries", dqueries, Access::fresh, optional);
  const Array to_keys("dkeys", dkeys, Access::fresh, optional);
  const Sizes sizes = in.check();
  check_inputs({{weights, "B"}}, sizes, in.float64());
  check_gradients({{logs, "SB"}, {to_queries, "BD"}, {to_keys, "MD"}}, sizes, in.float64());
  InfoNceBwd args{};
  args.forward = in.args(sizes);
  args.forward.log_sums = logs.view();
  args.grad = weights.view(), args.dqueries = to_queries.view(), args.dkeys = to_keys.view();
  call_without_gil(active_kernels().info_nce_bwd, args);
}

}  // namespace

void bind_info_nce(py::module_& m) {
  m.def("info_nce", &info_nce, py::arg("queries"), py::arg("keys"), py::arg("temperature"), py::arg("symmetric"),
        py::arg("mask"), py::arg("query_labels"), py::arg("key_labels"), py::arg("loss"), py::arg("total"),
        py::arg("log_sums"), py::arg("dqueries"), py::arg("dkeys"));
  m.def("info_nce_bwd", &info_nce_bwd, py::arg("grad"), py::arg("queries"), py::arg("keys"), py::arg("temperature"),
        py::arg("symmetric"), py::arg("mask"), py::arg("query_labels"), py::arg("key_labels"), py::arg("log_sums"),
        py::arg("dqueries"), py::arg("dkeys"));
}

}  // namespace fastlvm
