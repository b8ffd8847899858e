// Arrays handed in from Python (numpy or anything else with a buffer or __dlpack__) as TensorViews.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/tensor.h"

namespace fastlvm {

enum class Access { read, write, fresh };  // fresh: written whole, in memory that may never have been touched

// One argument. It keeps the array alive and is created and destroyed with the GIL held.
class Array {
 public:
  // `object` may be None only if `optional`. Throws std::invalid_argument, naming the argument.
  Array(const char* name, pybind11::handle object, Access access, bool optional = false);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array();

  explicit operator bool() const { return view_.dtype != DType::none; }
  const char* name() const { return name_; }
  const TensorView& view() const { return view_; }
  int64_t shape(int axis) const { return view_.shape[axis]; }
  std::string shape_text() const;

 private:
  void from_buffer();
  void from_dlpack(pybind11::handle object);
  void set_rank(int64_t rank);
  [[noreturn]] void fail(const std::string& got_and_wanted) const;

  const char* name_;
  TensorView view_;
  Py_buffer buffer_{};
  pybind11::object owner_;
};

// The sizes that the axes' letters stand for, as in "BDL". It allocates nothing: an op on few elements takes
// microseconds.
class Sizes {
 public:
  Sizes(std::initializer_list<std::pair<char, int64_t>> sizes) {
    for (const auto& [letter, size] : sizes) (*this)[letter] = size;
  }

  int64_t at(char letter) const {
    for (int i = 0; i < count_; ++i)
      if (letters_[i] == letter) return values_[i];
    throw std::out_of_range("no size of this letter");
  }

  int64_t& operator[](char letter) {
    for (int i = 0; i < count_; ++i)
      if (letters_[i] == letter) return values_[i];
    if (count_ == most) throw std::out_of_range("too many sizes");
    letters_[count_] = letter;
    return values_[count_++] = 0;
  }

 private:
  static constexpr int most = 16;
  int count_ = 0;
  char letters_[most];
  int64_t values_[most];
};

// Throw std::invalid_argument, naming argument, what it got and what it wants; an array not given passes.
void check_shape(const Array& array, std::string_view axes, const Sizes& sizes);
void check_rank(const Array& array, std::string_view axes);
void check_projection(const Array& array, const Sizes& sizes);  // (D, N), (B, N, L) or (B, G, N, L)
void check_input_dtype(const Array& array, bool float64);
void check_output(const Array& array, DType dtype);  // no two elements in one place
void check_dense(const Array& array, bool float64);  // float32 (float64), contiguous

// A vector of int32 or int64, from a numpy array; empty for None.
std::vector<int64_t> read_integers(const char* name, pybind11::handle array);
// The offsets of packed sequences: 0 first, never falling, `length` last; empty for None.
std::vector<int64_t> read_offsets(pybind11::handle cu_seqlens, int64_t length);

// A (B, N, L) projection as (B, 1, N, L).
TensorView projection_view(const Array& array);

}  // namespace fastlvm
