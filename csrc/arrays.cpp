#include "arrays.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "common/dlpack.h"
#include "common/memory.h"

namespace py = pybind11;

namespace fastlvm {
namespace {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::none:
      break;
  }
  return "none";
}

[[noreturn]] void reject(const Array& array, const std::string& got, const std::string& wants) {
  throw std::invalid_argument(std::string(array.name()) + ": got " + got + ", wants " + wants);
}

// "BDL" as "(B, D, L)"; with sizes, "(B, D, L) = (2, 3, 4)".
std::string axes_text(std::string_view axes, const Sizes* sizes = nullptr) {
  std::string names, values;
  for (const char axis : axes) {
    const std::string separator = names.empty() ? "" : ", ";
    names += separator + (axis == 'K' ? std::string("W - 1") : std::string(1, axis));
    if (sizes) values += separator + std::to_string(sizes->at(axis));
  }
  const std::string comma = axes.size() == 1 ? "," : "";
  names = "(" + names + comma + ")";
  return sizes ? names + " = (" + values + comma + ")" : names;
}

bool fits(const Array& array, std::string_view axes, const Sizes& sizes) {
  if (array.view().rank != static_cast<int>(axes.size())) return false;
  for (size_t i = 0; i < axes.size(); ++i)
    if (array.shape(static_cast<int>(i)) != sizes.at(axes[i])) return false;
  return true;
}

// How objects of this one's type say in C where their memory is; null where the type has no such function.
decltype(dlpack::Exchange::describe) describe_function(py::handle object) {
  static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  const py::object capsule = py::reinterpret_steal<py::object>(PyObject_GetAttr(type, attribute));
  if (!capsule) PyErr_Clear();
  const char* const name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), name)) return nullptr;
  const auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), name));
  return exchange->version.major == 1 ? exchange->describe : nullptr;
}

bool empty(const TensorView& view) {
  for (int i = 0; i < view.rank; ++i)
    if (view.shape[i] == 0) return true;
  return false;
}

// Where the elements fill the memory that they span: elsewhere pages that nobody writes to would be asked for too.
void prefer_huge_pages_for(const TensorView& view) {
  int64_t first = 0, last = 0, count = 1;
  for (int i = 0; i < view.rank; ++i) {
    count *= view.shape[i];
    (view.stride[i] < 0 ? first : last) += (view.shape[i] - 1) * view.stride[i];
  }
  if (count == 0 || last + 1 - first != count) return;
  const int64_t size = view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2;
  prefer_huge_pages(static_cast<char*>(view.data) + first * size, static_cast<size_t>(count * size));
}

}  // namespace

Array::Array(const char* name, py::handle object, Access access, bool optional) : name_(name) {
  if (object.is_none()) {
    if (optional) return;
    fail("got None, wants an array");
  }
  if (PyObject_CheckBuffer(object.ptr())) {
    const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (access != Access::read ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
      const py::error_already_set error;
      fail(std::string("cannot be ") + (access != Access::read ? "written to" : "read") + " (" + error.what() + ")");
    }
    try {
      from_buffer();
    } catch (...) {
      PyBuffer_Release(&buffer_);
      throw;
    }
  } else if (py::hasattr(object, "__dlpack__")) {
    from_dlpack(object);
  } else {
    fail("got " + py::str(py::type::of(object).attr("__name__")).cast<std::string>() +
         ", wants a numpy array or one with __dlpack__");
  }
  static double nothing;  // torch's empty tensors have no address, and kernels add offsets to what they are given
  if (!view_.data && !empty(view_)) fail("got an array without memory, wants one with its elements in memory");
  if (!view_.data) view_.data = &nothing;
  if (access == Access::fresh) prefer_huge_pages_for(view_);
}

Array::~Array() {
  if (buffer_.obj) PyBuffer_Release(&buffer_);
}

void Array::fail(const std::string& got_and_wanted) const {
  throw std::invalid_argument(std::string(name_) + ": " + got_and_wanted);
}

void Array::set_rank(int64_t rank) {
  if (rank > max_rank) fail("got " + std::to_string(rank) + " axes, wants at most " + std::to_string(max_rank));
  view_.rank = static_cast<int>(rank);
}

void Array::from_buffer() {
  const std::string_view format = buffer_.format ? buffer_.format : "B";
  const std::string_view kind = format.substr(std::min(format.find_first_not_of("@="), format.size()));
  const DType dtype = kind == "f" ? DType::f32 : kind == "d" ? DType::f64 : kind == "e" ? DType::f16 : DType::none;
  if (dtype == DType::none)
    fail("got elements of format '" + std::string(format) +
         "', wants float32, float16, bfloat16 or float64 in native byte order");
  set_rank(buffer_.ndim);
  const int64_t size = buffer_.itemsize;
  for (int i = 0; i < view_.rank; ++i) {
    view_.shape[i] = buffer_.shape[i];
    view_.stride[i] = buffer_.strides[i] / size;
    if (buffer_.strides[i] % size != 0 && view_.shape[i] > 1) fail("got strides that are no multiple of the item size");
  }
  view_.data = buffer_.buf;
  view_.dtype = dtype;
  if (reinterpret_cast<uintptr_t>(view_.data) % static_cast<uintptr_t>(size) != 0 && !empty(view_))
    fail("got unaligned data, wants an aligned array (numpy.require(x, requirements='A') makes one)");
}

void Array::from_dlpack(py::handle object) {
  const auto check_device = [this](int device) {
    if (device != dlpack::device_cpu && device != dlpack::device_cuda_host)
      fail("got an array on a device (DLPack type " + std::to_string(device) + "), wants one in CPU memory");
  };
  dlpack::Tensor tensor;
  if (const auto describe = describe_function(object)) {
    if (describe(object.ptr(), &tensor) != 0) throw py::error_already_set();
    owner_ = py::reinterpret_borrow<py::object>(object);
    check_device(tensor.device.type);
  } else {
    check_device(object.attr("__dlpack_device__")().cast<std::pair<int, int>>().first);
    owner_ = object.attr("__dlpack__")();
    const auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"));
    if (!managed) throw py::error_already_set();
    tensor = managed->tensor;
  }
  const dlpack::DataType& type = tensor.dtype;
  const bool is_float = type.code == dlpack::code_float && type.lanes == 1;
  const DType dtype = is_float && type.bits == 32                                              ? DType::f32
                      : is_float && type.bits == 16                                            ? DType::f16
                      : is_float && type.bits == 64                                            ? DType::f64
                      : type.code == dlpack::code_bfloat && type.bits == 16 && type.lanes == 1 ? DType::bf16
                                                                                               : DType::none;
  if (dtype == DType::none)
    fail("got elements of DLPack type " + std::to_string(type.code) + " with " + std::to_string(type.bits) +
         " bits, wants float32, float16, bfloat16 or float64");
  set_rank(tensor.rank);
  int64_t contiguous = 1;
  for (int i = view_.rank - 1; i >= 0; --i) {
    view_.shape[i] = tensor.shape[i];
    view_.stride[i] = tensor.strides ? tensor.strides[i] : contiguous;
    contiguous *= tensor.shape[i];
  }
  view_.data = static_cast<char*>(tensor.data) + (tensor.data ? tensor.byte_offset : 0);
  view_.dtype = dtype;
}

std::string Array::shape_text() const {
  std::string text;
  for (int i = 0; i < view_.rank; ++i) text += (i ? ", " : "") + std::to_string(view_.shape[i]);
  return "shape (" + text + (view_.rank == 1 ? ",)" : ")");
}

void check_shape(const Array& array, std::string_view axes, const Sizes& sizes) {
  if (array && !fits(array, axes, sizes)) reject(array, array.shape_text(), axes_text(axes, &sizes));
}

void check_rank(const Array& array, std::string_view axes) {
  if (array.view().rank != static_cast<int>(axes.size())) reject(array, array.shape_text(), axes_text(axes));
}

void check_projection(const Array& array, const Sizes& sizes) {
  Sizes with_groups = sizes;
  const int64_t groups = array.view().rank == 4 ? array.shape(1) : 1;
  with_groups['G'] = groups;
  const bool divides = groups > 0 && sizes.at('D') % groups == 0;
  if (divides && (fits(array, "DN", sizes) || fits(array, "BNL", sizes) || fits(array, "BGNL", with_groups))) return;
  std::string wants = "(D, N), (B, N, L) or (B, G, N, L) with ";
  for (const char axis : std::string("BDNL"))
    wants += std::string(1, axis) + "=" + std::to_string(sizes.at(axis)) + (axis == 'L' ? "" : ", ");
  reject(array, array.shape_text(), wants + " and G a divisor of D");
}

void check_input_dtype(const Array& array, bool float64) {
  if (!array || (array.view().dtype == DType::f64) == float64) return;
  reject(array, name_of(array.view().dtype),
         float64 ? "float64, because the first array is float64" : "float32, float16 or bfloat16");
}

void check_output(const Array& array, DType dtype) {
  if (!array) return;
  const TensorView& view = array.view();
  if (view.dtype != dtype) reject(array, name_of(view.dtype), name_of(dtype));
  for (int i = 0; i < view.rank; ++i)
    if (view.shape[i] > 1 && view.stride[i] == 0 && !empty(view))
      reject(array, "stride 0 on axis " + std::to_string(i), "an array whose elements have a place each");
}

void check_dense(const Array& array, bool float64) {
  if (!array) return;
  const TensorView& view = array.view();
  check_output(array, float64 ? DType::f64 : DType::f32);
  int64_t contiguous = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    if (view.shape[i] > 1 && view.stride[i] != contiguous && !empty(view))
      reject(array, "strides that are not contiguous", "a C-contiguous array");
    contiguous *= view.shape[i];
  }
}

TensorView projection_view(const Array& array) {
  TensorView view = array.view();
  if (view.rank != 3) return view;
  view.rank = 4;
  for (int i = 3; i > 1; --i) {
    view.shape[i] = view.shape[i - 1];
    view.stride[i] = view.stride[i - 1];
  }
  view.shape[1] = 1;
  view.stride[1] = 0;
  return view;
}

std::vector<int64_t> read_integers(const char* name, py::handle array) {
  if (array.is_none()) return {};
  Py_buffer buffer;
  if (PyObject_GetBuffer(array.ptr(), &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) throw py::error_already_set();
  std::vector<int64_t> values;
  const std::string format = buffer.format ? buffer.format : "";
  const bool wide = buffer.itemsize == 8, taken = format == "i" || format == "l" || format == "q";
  const bool vector = buffer.ndim == 1;
  for (Py_ssize_t i = 0; taken && vector && i < buffer.shape[0]; ++i) {
    const char* const at = static_cast<const char*>(buffer.buf) + i * buffer.strides[0];
    int64_t value = 0;
    int32_t narrow = 0;
    wide ? std::memcpy(&value, at, sizeof value) : std::memcpy(&narrow, at, sizeof narrow);
    values.push_back(wide ? value : narrow);
  }
  PyBuffer_Release(&buffer);
  if (!taken || !vector) throw std::invalid_argument(std::string(name) + ": wants a vector of int32 or int64");
  return values;
}

std::vector<int64_t> read_offsets(py::handle cu_seqlens, int64_t length) {
  const std::vector<int64_t> offsets = read_integers("cu_seqlens", cu_seqlens);
  if (cu_seqlens.is_none()) return offsets;
  const auto fail = [](const std::string& got) { throw std::invalid_argument("cu_seqlens: " + got); };
  if (offsets.empty()) fail("got no elements, wants the offsets of the sequences, 0 first");
  if (offsets.front() != 0) fail("begins with " + std::to_string(offsets.front()) + ", wants 0");
  for (size_t i = 1; i < offsets.size(); ++i)
    if (offsets[i] < offsets[i - 1])
      fail("falls from " + std::to_string(offsets[i - 1]) + " to " + std::to_string(offsets[i]) +
           ", wants offsets that do not fall");
  if (offsets.back() != length)
    fail("ends with " + std::to_string(offsets.back()) + ", wants the length " + std::to_string(length));
  return offsets;
}

}  // namespace fastlvm
