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

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(Constant<n>()) for n from 1 to Most.
template <int Most, class F>
inline void with_constant(int64_t n, F f) {
  if constexpr (Most > 1)
    if (n < Most) return with_constant<Most - 1>(n, f);
  f(Constant<Most>());
}

inline int64_t offset_of(const TensorView& view, int64_t i, int64_t j) {
  return i * view.stride[0] + j * view.stride[1];
}

template <class T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::f32 : DType::f64;

// Whether the kernel can compute on a row where it lies.
template <class T>
inline bool computed_in_place(const TensorView& view, int64_t stride) {
  return stride == 1 && view.dtype == dtype_of<T>;
}

template <class T>
inline T* pointer(const TensorView& view, int64_t offset) {
  return static_cast<T*>(view.data) + offset;
}

// Elements of one dtype as vectors: n from p on, the other lanes zero; all of them if n is V::width.
template <class V>
struct Plain {
  using Element = typename V::scalar;
  static V load(const Element* p, int n) { return n < V::width ? V::load_first(p, n) : V::load(p); }
  static void store(Element* p, int n, V x) { n < V::width ? x.store_first(p, n) : x.store(p); }
};

template <class V>
struct Float16 {
  using Element = uint16_t;
  static V load(const Element* p, int n) { return V::load_f16(p, n); }
  static void store(Element* p, int n, V x) { x.store_f16(p, n); }
};

template <class V>
struct Bfloat16 {
  using Element = uint16_t;
  static V load(const Element* p, int n) { return V::load_bf16(p, n); }
  static void store(Element* p, int n, V x) { x.store_bf16(p, n); }
};

// f(Format{}, pointer to the view's data)
template <class V, class F>
inline auto with_format(const TensorView& view, F f) {
  if (view.dtype == DType::f16) return f(Float16<V>{}, static_cast<uint16_t*>(view.data));
  if (view.dtype == DType::bf16) return f(Bfloat16<V>{}, static_cast<uint16_t*>(view.data));
  return f(Plain<V>{}, static_cast<typename V::scalar*>(view.data));
}

template <class T>
inline T element(const TensorView& view, int64_t offset) {
  return with_format<Scalar<T>>(view, [&](auto format, const auto* data) { return format.load(data + offset, 1).v; });
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

template <class V, class Format>
inline void read_row(Format format, typename V::scalar* out, const typename Format::Element* in, int64_t count) {
  constexpr int W = V::width;
  if (count < W) return format.load(in, static_cast<int>(count)).store_first(out, static_cast<int>(count));
  for (int64_t i = 0; i + W <= count; i += W) format.load(in + i, W).store(out + i);
  format.load(in + count - W, W).store(out + count - W);  // again what is there, where no vector ends with the row
}

template <class V, class Format>
inline void write_row(Format format, const typename V::scalar* in, typename Format::Element* out, int64_t count) {
  constexpr int W = V::width;
  if (count < W) return format.store(out, static_cast<int>(count), V::load_first(in, static_cast<int>(count)));
  for (int64_t i = 0; i + W <= count; i += W) format.store(out + i, W, V::load(in + i));
  format.store(out + count - W, W, V::load(in + count - W));
}

// out[i] = element(offset + i * stride) for i < count, zeros if the view was not given.
template <class V>
inline void read_row(typename V::scalar* out, const TensorView& view, int64_t offset, int64_t stride, int64_t count) {
  if (!given(view)) return fill_zero(out, count);
  if (stride == 1)
    return with_format<V>(view, [&](auto format, const auto* in) { read_row<V>(format, out, in + offset, count); });
  with_format<Scalar<typename V::scalar>>(view, [=](auto format, const auto* in) {
    for (int64_t i = 0; i < count; ++i) out[i] = format.load(in + offset + i * stride, 1).v;
  });
}

template <class V>
inline void write_row(const typename V::scalar* in, const TensorView& view, int64_t offset, int64_t stride,
                      int64_t count) {
  if (stride == 1)
    return with_format<V>(view, [&](auto format, auto* out) { write_row<V>(format, in, out + offset, count); });
  with_format<Scalar<typename V::scalar>>(view, [=](auto format, auto* out) {
    for (int64_t i = 0; i < count; ++i) format.store(out + offset + i * stride, 1, {in[i]});
  });
}

}  // namespace fastlvm::FASTLVM_ISA
