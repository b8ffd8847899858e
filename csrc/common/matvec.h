// Products of a matrix that streams from memory once, of any dtype and stride, and a few rows of numbers in the caches.
#pragma once

#include "common/rows.h"

namespace fastlvm::FASTLVM_ISA {

constexpr int64_t matvec_depth = 256;  // a sum begins anew: hundreds of float32 products in one lose a digit

// Rows of numbers that meet some rows of the matrix while these are in registers.
template <class V>
constexpr int matvec_batch = V::width == 8 ? 2 : 4;  // AVX2 has 16 registers, the others 32
// Rows of the matrix at a time: as many streams from memory, and as many sums that do not wait for each other.
template <int Batch>
constexpr int matvec_rows = Batch == 1 ? 8 : 4;

template <class V, int Batch>
struct Dots {
  static constexpr int rows = matvec_rows<Batch>;
  static constexpr int ahead = 512;  // bytes: what memory brings by itself begins late, on rows this short
  using T = typename V::scalar;
  V sums[Batch][rows];

  FASTLVM_INLINE Dots() {
    FASTLVM_UNROLL
    for (int b = 0; b < Batch; ++b) {
      FASTLVM_UNROLL
      for (int r = 0; r < rows; ++r) sums[b][r] = V::zero();
    }
  }

  // `lanes` elements from k on, known when this is compiled where it is V::width.
  template <class Format>
  FASTLVM_INLINE void add(Format format, const typename Format::Element* const (&row)[rows], const T* x, int64_t pitch,
                          int64_t k, int lanes) {
    V weight[rows];
    FASTLVM_UNROLL
    for (int r = 0; r < rows; ++r) {
      weight[r] = format.load(row[r] + k, lanes);
      prefetch_near(reinterpret_cast<const char*>(row[r] + k) + ahead);
    }
    FASTLVM_UNROLL
    for (int b = 0; b < Batch; ++b) {
      const V in = Plain<V>::load(x + b * pitch + k, lanes);
      FASTLVM_UNROLL
      for (int r = 0; r < rows; ++r) sums[b][r] = V::fma(weight[r], in, sums[b][r]);
    }
  }
};

// y[b * y_pitch + r] = matrix[first + r] · x[b * x_pitch ...] + bias[first + r] for r < rows, b < batch.
template <class V>
class MatVec {
 public:
  using T = typename V::scalar;

  MatVec(const TensorView& matrix, const TensorView& bias, int64_t batch, const T* x, int64_t x_pitch)
      : matrix_(matrix), bias_(bias), batch_(batch), x_(x), x_pitch_(x_pitch) {}

  void operator()(int64_t first, int64_t rows, T* y, int64_t y_pitch) const {
    constexpr int most = matvec_batch<V>;
    for (int64_t b = 0; b < batch_; b += most)
      with_constant<most>(smaller(most, batch_ - b), [&](auto batch) {
        constexpr int step = matvec_rows<batch.value>;
        for (int64_t r = 0; r < rows; r += step)
          some<batch.value>(first + r, smaller(step, rows - r), b, y + b * y_pitch + r, y_pitch);
      });
  }

 private:
  template <int Batch>
  void some(int64_t first, int64_t count, int64_t b, T* y, int64_t y_pitch) const {
    constexpr int rows = matvec_rows<Batch>;
    T sums[Batch][rows] = {};
    const int64_t along = matrix_.stride[1], depth = matrix_.shape[1];
    const auto offset = [&](int r) {
      return (first + smaller(r, count - 1)) * matrix_.stride[0];
    };  // the last one again
    for (int64_t k = 0; k < depth; k += matvec_depth) {
      const int64_t length = smaller(matvec_depth, depth - k);
      const T* const x = x_ + b * x_pitch_ + k;
      if (along == 1) {
        with_format<V>(matrix_, [&](auto format, const auto* data) {
          const typename decltype(format)::Element* row[rows];
          for (int r = 0; r < rows; ++r) row[r] = data + offset(r) + k;
          add<Batch>(format, row, x, length, sums);
        });
        continue;
      }
      T read[rows][matvec_depth];
      const T* row[rows];
      for (int r = 0; r < rows; ++r) {
        read_row<V>(read[r], matrix_, offset(r) + k * along, along, length);
        row[r] = read[r];
      }
      add<Batch>(Plain<V>(), row, x, length, sums);
    }
    for (int i = 0; i < Batch; ++i)
      for (int64_t r = 0; r < count; ++r) y[i * y_pitch + r] = sums[i][r] + optional_element<T>(bias_, first + r);
  }

  template <int Batch, class Format>
  FASTLVM_INLINE void add(Format format, const typename Format::Element* const (&row)[matvec_rows<Batch>], const T* x,
                          int64_t length, T (&sums)[Batch][matvec_rows<Batch>]) const {
    Dots<V, Batch> dots;
    int64_t k = 0;
    for (; k + V::width <= length; k += V::width) dots.add(format, row, x, x_pitch_, k, V::width);
    if (k < length) dots.add(format, row, x, x_pitch_, k, static_cast<int>(length - k));
    for (int b = 0; b < Batch; ++b)
      for (int r = 0; r < matvec_rows<Batch>; ++r) sums[b][r] += V::sum(dots.sums[b][r]);
  }

  TensorView matrix_, bias_;
  int64_t batch_;
  const T* x_;
  int64_t x_pitch_;
};

}  // namespace fastlvm::FASTLVM_ISA
