// Per-ISA helpers of the ops: scratch memory, tasks for the thread team, and rows of any dtype and stride read into
// (and written from) the contiguous buffers the kernels compute on. See vec.h for the rules of this header.
#pragma once

#include "common/half.h"
#include "common/memory.h"
#include "common/tensor.h"
#include "common/threads.h"
#include "common/vec.h"

namespace fastlvm::FASTLVM_ISA {

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

inline bool given(const TensorView& view) { return view.dtype != DType::none; }

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : data_(static_cast<T*>(aligned_allocate(static_cast<size_t>(count) * sizeof(T)))) {}
  Buffer(int64_t count, T value) : Buffer(count) {
    for (int64_t i = 0; i < count; ++i) data_[i] = value;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { reset(); }
  void reset() {
    if (data_) aligned_release(data_);
    data_ = nullptr;
  }
  void reset(int64_t count) {
    reset();
    data_ = static_cast<T*>(aligned_allocate(static_cast<size_t>(count) * sizeof(T)));
  }
  T* get() const { return data_; }
  T* operator+(int64_t offset) const { return data_ + offset; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

template <class F>
struct TaskOf {
  static void call(void* context, int64_t index) { (*static_cast<F*>(context))(index); }
};

// f(0) … f(count - 1), spread over the team; in order on this thread where the work is too small to share.
template <class F>
inline void parallel(int64_t count, bool worth_sharing, F f) {
  if (worth_sharing) return run_tasks(count, &TaskOf<F>::call, &f);
  for (int64_t i = 0; i < count; ++i) f(i);
}

// f(i, n) for every vector of n <= V::width elements from i on.
template <class V, class F>
inline void vectors(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += V::width) f(i, static_cast<int>(smaller(V::width, count - i)));
}

inline int64_t offset_of(const TensorView& view, int64_t i, int64_t j) {
  return i * view.stride[0] + j * view.stride[1];
}

template <class T>
inline T element(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::f16:
      return static_cast<T>(from_f16(static_cast<const uint16_t*>(view.data)[offset]));
    case DType::bf16:
      return static_cast<T>(from_bf16(static_cast<const uint16_t*>(view.data)[offset]));
    case DType::f32:
      return static_cast<T>(static_cast<const float*>(view.data)[offset]);
    case DType::f64:
      return static_cast<T>(static_cast<const double*>(view.data)[offset]);
    case DType::none:
      break;
  }
  return T(0);
}

// Element i of a vector, 0 if it was not given.
template <class T>
inline T optional_element(const TensorView& view, int64_t i) {
  return given(view) ? element<T>(view, i * view.stride[0]) : T(0);
}

template <class T>
inline void copy(T* out, const T* in, int64_t count) {
  if (count > 0) memcpy(out, in, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
inline void fill_zero(T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = T(0);
}

template <class T, class From, class Convert>
inline void copy_row(T* out, const From* in, int64_t stride, int64_t count, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(convert(in[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(convert(in[i * stride]));
  }
}

// out[i] = element(offset + i * stride) for i < count.
template <class V>
inline void read_row(typename V::scalar* out, const TensorView& view, int64_t offset, int64_t stride, int64_t count) {
  using T = typename V::scalar;
  switch (view.dtype) {
    case DType::f16: {
      const uint16_t* in = static_cast<const uint16_t*>(view.data) + offset;
      int64_t i = 0;
      if constexpr (V::converts_f16) {
        if (stride == 1)
          for (; i + V::width <= count; i += V::width) V::load_f16(in + i).store(out + i);
      }
      return copy_row<T>(out + i, in + i * stride, stride, count - i, [](uint16_t x) { return from_f16(x); });
    }
    case DType::bf16:
      return copy_row<T>(out, static_cast<const uint16_t*>(view.data) + offset, stride, count,
                         [](uint16_t x) { return from_bf16(x); });
    case DType::f32:
      return copy_row<T>(out, static_cast<const float*>(view.data) + offset, stride, count, [](float x) { return x; });
    case DType::f64:
      return copy_row<T>(out, static_cast<const double*>(view.data) + offset, stride, count,
                         [](double x) { return x; });
    case DType::none:
      for (int64_t i = 0; i < count; ++i) out[i] = T(0);
  }
}

template <class T>
inline void write_row(const T* in, const TensorView& view, int64_t offset, int64_t stride, int64_t count) {
  switch (view.dtype) {
    case DType::f16: {
      uint16_t* out = static_cast<uint16_t*>(view.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i * stride] = to_f16(static_cast<float>(in[i]));
      return;
    }
    case DType::bf16: {
      uint16_t* out = static_cast<uint16_t*>(view.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i * stride] = to_bf16(static_cast<float>(in[i]));
      return;
    }
    case DType::f32: {
      float* out = static_cast<float*>(view.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i * stride] = static_cast<float>(in[i]);
      return;
    }
    case DType::f64: {
      double* out = static_cast<double*>(view.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i * stride] = static_cast<double>(in[i]);
      return;
    }
    case DType::none:
      return;
  }
}

}  // namespace fastlvm::FASTLVM_ISA
