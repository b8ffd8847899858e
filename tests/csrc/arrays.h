// Arrays in awkward places for the native tests: any dtype, any strides, and memory that ends where the array ends.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#define FASTLVM_ISA host
#include "common/rows.h"
#undef FASTLVM_ISA

namespace fastlvm::test {

// How often each value of each choice was drawn.
using Coverage = std::map<std::string, std::map<int64_t, int64_t>>;

// The choices that make a case, all from one number.
class Draws {
 public:
  explicit Draws(uint64_t seed, Coverage* coverage = nullptr) : state_(seed), coverage_(coverage) {}

  uint64_t next() {  // splitmix64
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  double normal() { return 1.7320508 * (uniform() + uniform() + uniform() + uniform() - 2); }  // nearly

  int64_t pick(const std::string& what, std::initializer_list<int64_t> values) {
    const int64_t value = *(values.begin() + below(static_cast<int64_t>(values.size())));
    if (coverage_) {
      for (const int64_t each : values) (*coverage_)[what].try_emplace(each, 0);
      ++(*coverage_)[what][value];
    }
    text_ += (text_.empty() ? "" : " ") + what + "=" + std::to_string(value);
    return value;
  }
  bool coin(const std::string& what) { return pick(what, {0, 1}) != 0; }
  const std::string& text() const { return text_; }

 private:
  uint64_t state_;
  Coverage* coverage_;
  std::string text_;
};

// Exactly `bytes` bytes, all 0xff (a NaN in every dtype): on the heap, where AddressSanitizer watches both ends, or
// against a page that nothing may touch, which also holds vector instructions that it does not watch.
class Memory {
 public:
  enum Place { heap, before_guard, after_guard };

  Memory(size_t bytes, Place place) : bytes_(bytes), place_(place) {
    if (place == heap) {
      data_ = static_cast<unsigned char*>(std::malloc(bytes ? bytes : 1));
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
      mapped_ = whole + page;
      void* const map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (map == MAP_FAILED) std::abort();
      base_ = static_cast<unsigned char*>(map);
      mprotect(place == before_guard ? base_ + whole : base_, page, PROT_NONE);
      data_ = place == before_guard ? base_ + whole - bytes : base_ + page;
    }
    if (!data_) std::abort();
    std::memset(data_, 0xff, bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { place_ == heap ? std::free(data_) : static_cast<void>(munmap(base_, mapped_)); }

  unsigned char* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_, mapped_ = 0;
  Place place_;
  unsigned char *data_ = nullptr, *base_ = nullptr;
};

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline double get(const TensorView& view, int64_t offset) {
  return view.dtype == DType::f64 ? host::element<double>(view, offset) : host::element<float>(view, offset);
}

inline void put(const TensorView& view, int64_t offset, double x) {
  const float rounded = static_cast<float>(x);
  if (view.dtype == DType::f64) return host::write_row<host::Scalar<double>>(&x, view, offset, 1, 1);
  host::write_row<host::Scalar<float>>(&rounded, view, offset, 1, 1);
}

// f(offset) for every element, the last axis fastest.
template <class F>
void each_element(const TensorView& view, F f) {
  int64_t index[max_rank] = {}, offset = 0;
  for (int i = 0; i < view.rank; ++i)
    if (view.shape[i] == 0) return;
  while (true) {
    f(offset);
    int axis = view.rank - 1;
    for (; axis >= 0; --axis) {
      offset += view.stride[axis];
      if (++index[axis] < view.shape[axis]) break;
      offset -= index[axis] * view.stride[axis];
      index[axis] = 0;
    }
    if (axis < 0) return;
  }
}

// One array: its memory and a view of all of it.
class Array {
 public:
  using Shape = std::vector<int64_t>;
  enum Layout { contiguous, transposed, reversed, gaps, shuffled, expanded };  // the last for inputs only

  Array(Draws& draw, const Shape& shape, DType dtype, Layout layout)
      : view_(strided(draw, shape, dtype, layout)),
        memory_(static_cast<size_t>(span() * size_of(dtype)), static_cast<Memory::Place>(draw.below(3))) {
    view_.data = memory_.data() + (span() > 0 ? lowest_ * -size_of(dtype) : 0);
  }

  const TensorView& view() const { return view_; }
  const Memory& memory() const { return memory_; }

  std::vector<double> values() const {
    std::vector<double> out;
    each_element(view_, [&](int64_t offset) { out.push_back(get(view_, offset)); });
    return out;
  }
  template <class F>
  void fill(F f) {
    each_element(view_, [&](int64_t offset) { put(view_, offset, f()); });
  }
  void forget() { std::memset(memory_.data(), 0xff, memory_.size()); }

  // Nothing but the elements was written to.
  bool gaps_are_clean() const {
    std::vector<unsigned char> bytes(memory_.data(), memory_.data() + memory_.size());
    const size_t size = static_cast<size_t>(size_of(view_.dtype));
    each_element(view_, [&](int64_t offset) {
      std::memset(bytes.data() + static_cast<size_t>(offset - lowest_) * size, 0xff, size);
    });
    for (const unsigned char byte : bytes)
      if (byte != 0xff) return false;
    return true;
  }

 private:
  TensorView strided(Draws& draw, const Shape& shape, DType dtype, Layout layout) {
    TensorView view;
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    std::vector<int> order;  // innermost axis first
    for (int i = view.rank - 1; i >= 0; --i) order.push_back(i);
    if (layout == transposed) std::reverse(order.begin(), order.end());
    if (layout == shuffled)
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[static_cast<size_t>(draw.below(i))]);
    int64_t stride = 1;
    for (const int i : order) {
      const int64_t n = view.shape[i] = shape[static_cast<size_t>(i)];
      if (layout == gaps || layout == shuffled) stride *= 1 + draw.below(3);
      const bool backwards = layout == reversed || (layout == shuffled && draw.below(2));
      view.stride[i] = backwards ? -stride : stride;
      stride *= n > 0 ? n : 1;
      if (n == 1 && layout != contiguous) view.stride[i] = (draw.below(3) - 1) * 7919;  // of no meaning
      lowest_ += n > 0 && backwards && n != 1 ? (n - 1) * view.stride[i] : 0;
    }
    if (layout == expanded && view.rank > 0) view.stride[draw.below(view.rank)] = 0;
    return view;
  }

  // Elements from the lowest address to the highest; 0 of an empty array.
  int64_t span() const {
    int64_t highest = 0;
    for (int i = 0; i < view_.rank; ++i) {
      if (view_.shape[i] == 0) return 0;
      if (view_.stride[i] > 0) highest += view_.shape[i] > 1 ? (view_.shape[i] - 1) * view_.stride[i] : 0;
    }
    return highest - lowest_ + 1;
  }

  int64_t lowest_ = 0;  // offset of the element at the lowest address
  TensorView view_;
  Memory memory_;
};

}  // namespace fastlvm::test
