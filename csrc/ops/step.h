// What the one-token ops share: which state a row advances, and rows of any dtype and stride advanced where they lie.
//
// Nothing is allocated: channels go in panels and rows in stretches, whose converted copies live on the stack. Both
// sizes are constants, so that no bit of a result depends on the number of threads.
#pragma once

#include "common/rows.h"
#include "common/vmath.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::one_token {

constexpr int64_t panel = 64;     // channels whose elementwise work fills vectors
constexpr int64_t stretch = 256;  // elements of a row held at once

// The state that row i advances; negative where the row is padding.
inline int64_t slot_of(const int64_t* indices, int64_t i) { return indices ? indices[i] : i; }

// At most `stretch` elements of a row: where they lie, if the kernel can compute there, else converted.
template <class V>
class Row {
 public:
  using T = typename V::scalar;

  const T* read(const TensorView& view, int64_t offset, int64_t stride, int64_t count) {
    if (computed_in_place<T>(view, stride)) return pointer<const T>(view, offset);
    read_row<V>(converted_, view, offset, stride, count);
    return converted_;
  }

  // advance(pointer to the elements); they are written back if they had to be converted. Returns what it returns.
  template <class F>
  T update(const TensorView& view, int64_t offset, int64_t stride, int64_t count, F advance) {
    if (computed_in_place<T>(view, stride)) return advance(pointer<T>(view, offset));
    read_row<V>(converted_, view, offset, stride, count);
    const T result = advance(converted_);
    write_row<V>(converted_, view, offset, stride, count);
    return result;
  }

 private:
  T converted_[stretch];
};

// A row of B or C [b, G, N], each group shared by a run of channels; read again only where the group changes.
template <class V>
class Projection {
 public:
  using T = typename V::scalar;

  Projection(const TensorView& view, int64_t i, int64_t channels)
      : view_(view), offset_(i * view.stride[0]), channels_(channels / view.shape[1]) {}

  const T* row(int64_t channel, int64_t begin, int64_t count) {
    const int64_t group = channel / channels_;
    if (group == group_ && begin == begin_) return row_;
    group_ = group, begin_ = begin;
    const int64_t along = view_.stride[2];
    row_ = elements_.read(view_, offset_ + group * view_.stride[1] + begin * along, along, count);
    return row_;
  }

 private:
  const TensorView& view_;
  int64_t offset_, channels_;
  int64_t group_ = -1, begin_ = -1;
  const T* row_ = nullptr;
  Row<V> elements_;
};

// h[n] = next(n, h[n], lanes) for n < count; returns C · h. Lanes that are no elements are kept out of the sum, which
// begins anew after 32 vectors: a sum of hundreds of float32 products one after the other loses a digit. Within a
// stretch that is so for vectors of up to four.
template <class V, class Next>
inline typename V::scalar advance(const typename V::scalar* C, typename V::scalar* h, int64_t count, Next next) {
  typename V::scalar total = 0;
  for (int64_t n = 0; n < count;) {
    V y = V::zero();
    const int64_t end = smaller(count, n + 32 * V::width);
    for (; n + V::width <= end; n += V::width) {
      const V after = next(n, V::load(h + n), V::width);
      after.store(h + n);
      y = V::fma(V::load(C + n), after, y);
    }
    if (n < end) {
      const int lanes = static_cast<int>(end - n);
      const V after = V::first(next(n, V::load_first(h + n, lanes), lanes), lanes);
      after.store_first(h + n, lanes);
      y = V::fma(V::load_first(C + n, lanes), after, y);
      n = end;
    }
    total += V::sum(y);
  }
  return total;
}

template <class V>
inline void gate(typename V::scalar* y, const typename V::scalar* z, int64_t count) {
  vectors<V>(count, [&](int64_t i, int n) {
    (V::load_first(y + i, n) * silu(V::load_first(z + i, n))).store_first(y + i, n);
  });
}

}  // namespace fastlvm::FASTLVM_ISA::one_token
