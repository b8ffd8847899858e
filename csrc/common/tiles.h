// Tiles: a vector of channels for every step along another axis, [steps, V::width], read from and written to arrays of
// any dtype and stride. See vec.h for the rules of this header.
#pragma once

#include "common/rows.h"
#include "common/vec.h"

namespace fastlvm::FASTLVM_ISA {

// n elements from `offset` on, widened; the other lanes are zero.
template <class V>
inline V load_as(const TensorView& view, int64_t offset, int n) {
  using T = typename V::scalar;
  switch (view.dtype) {
    case DType::f16:
      return V::load_f16(static_cast<const uint16_t*>(view.data) + offset, n);
    case DType::bf16:
      return V::load_bf16(static_cast<const uint16_t*>(view.data) + offset, n);
    default:
      break;
  }
  const T* const from = static_cast<const T*>(view.data) + offset;
  return n < V::width ? V::load_first(from, n) : V::load(from);
}

template <class V>
inline void store_as(V x, const TensorView& view, int64_t offset, int n) {
  using T = typename V::scalar;
  switch (view.dtype) {
    case DType::f16:
      return x.store_f16(static_cast<uint16_t*>(view.data) + offset, n);
    case DType::bf16:
      return x.store_bf16(static_cast<uint16_t*>(view.data) + offset, n);
    default:
      break;
  }
  T* const to = static_cast<T*>(view.data) + offset;
  n < V::width ? x.store_first(to, n) : x.store(to);
}

// Where a tile lies in an array: lane i of step s is element offset + i * lane + s * step.
struct TileAt {
  int64_t offset, lane, step;
};

// tile[s] for s < steps; lanes from `lanes` on are zero.
template <class V>
inline void read_tile(typename V::scalar* tile, const TensorView& view, TileAt at, int lanes, int64_t steps) {
  using T = typename V::scalar;
  if (at.lane == 1 || V::width == 1) {
    for (int64_t s = 0; s < steps; ++s) load_as<V>(view, at.offset + s * at.step, lanes).store(tile + s * V::width);
  } else if (at.step == 1) {
    for (int64_t s = 0; s < steps; s += V::width) {
      const int n = static_cast<int>(smaller(V::width, steps - s));
      V rows[V::width];
      for (int i = 0; i < V::width; ++i)
        rows[i] = i < lanes ? load_as<V>(view, at.offset + i * at.lane + s, n) : V::zero();
      V::transpose(rows);
      for (int i = 0; i < n; ++i) rows[i].store(tile + (s + i) * V::width);
    }
  } else {
    for (int64_t s = 0; s < steps; ++s)
      for (int i = 0; i < V::width; ++i)
        tile[s * V::width + i] = i < lanes ? element<T>(view, at.offset + i * at.lane + s * at.step) : T(0);
  }
}

template <class V>
inline void write_tile(const typename V::scalar* tile, const TensorView& view, TileAt at, int lanes, int64_t steps) {
  if (at.lane == 1 || V::width == 1) {
    for (int64_t s = 0; s < steps; ++s) store_as(V::load(tile + s * V::width), view, at.offset + s * at.step, lanes);
  } else if (at.step == 1) {
    for (int64_t s = 0; s < steps; s += V::width) {
      const int n = static_cast<int>(smaller(V::width, steps - s));
      V rows[V::width];
      for (int i = 0; i < V::width; ++i) rows[i] = i < n ? V::load(tile + (s + i) * V::width) : V::zero();
      V::transpose(rows);
      for (int i = 0; i < lanes; ++i) store_as(rows[i], view, at.offset + i * at.lane + s, n);
    }
  } else {
    for (int64_t s = 0; s < steps; ++s)
      for (int i = 0; i < lanes; ++i)
        write_row(tile + s * V::width + i, view, at.offset + i * at.lane + s * at.step, 1, 1);
  }
}

}  // namespace fastlvm::FASTLVM_ISA
