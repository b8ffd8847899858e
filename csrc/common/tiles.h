// Tiles: a vector of channels for every step along another axis, [steps, V::width], read from and written to arrays of
// any dtype and stride. See vec.h for the rules of this header.
#pragma once

#include "common/rows.h"
#include "common/vec.h"

namespace fastlvm::FASTLVM_ISA {

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
inline void with_format(const TensorView& view, F f) {
  if (view.dtype == DType::f16) return f(Float16<V>{}, static_cast<uint16_t*>(view.data));
  if (view.dtype == DType::bf16) return f(Bfloat16<V>{}, static_cast<uint16_t*>(view.data));
  f(Plain<V>{}, static_cast<typename V::scalar*>(view.data));
}

// Where a tile lies in an array: lane i of step s is element offset + i * lane + s * step.
struct TileAt {
  int64_t offset, lane, step;
};

// The cache lines of a tile that is wanted later, fetched one by one between other work: rows far apart are too many
// streams for the processor to foresee, and all at once are more than it can wait for.
template <class V>
class Fetch {
 public:
  Fetch() = default;
  Fetch(const TensorView& view, TileAt at, int64_t steps) {
    const int64_t size = view.dtype == DType::f64 ? 8 : view.dtype == DType::f32 ? 4 : 2;
    data_ = static_cast<const char*>(view.data) + at.offset * size;
    if (at.lane == 1) {  // a line for each step
      near_ = at.step * size, far_ = V::width * near_, lines_ = steps;
    } else if (at.step == 1) {  // for each lane one after the other
      near_ = at.lane * size, far_ = line, lines_ = V::width * div_up(steps * size, line);
    }
  }

  // Inline, because GCC takes a function that does nothing but prefetch for one that does nothing.
  FASTLVM_INLINE void fetch(int64_t i) const {
    if (i < lines_) FASTLVM_PREFETCH(data_ + (i & (V::width - 1)) * near_ + i / V::width * far_);
  }

 private:
  static constexpr int64_t line = 64;
  const char* data_ = nullptr;
  int64_t near_ = 0, far_ = 0, lines_ = 0;
};

// tile[s] for s < steps; lanes from `lanes` on are zero.
template <class V>
inline void read_tile(typename V::scalar* tile, const TensorView& view, TileAt at, int lanes, int64_t steps) {
  using T = typename V::scalar;
  constexpr int W = V::width;
  with_format<V>(view, [&](auto format, const auto* data) {
    const auto* const p = data + at.offset;
    if (at.lane == 1 || W == 1) {
      for (int64_t s = 0; s < steps; ++s) format.load(p + s * at.step, lanes).store(tile + s * W);
    } else if (at.step == 1) {
      int64_t s = 0;
      if (lanes == W) {
        for (; s + W <= steps; s += W) {
          V rows[W];
          for (int i = 0; i < W; ++i) rows[i] = format.load(p + i * at.lane + s, W);
          V::transpose(rows);
          for (int i = 0; i < W; ++i) rows[i].store(tile + (s + i) * W);
        }
      }
      for (; s < steps; s += W) {
        const int n = static_cast<int>(smaller(W, steps - s));
        V rows[W];
        for (int i = 0; i < W; ++i) rows[i] = i < lanes ? format.load(p + i * at.lane + s, n) : V::zero();
        V::transpose(rows);
        for (int i = 0; i < n; ++i) rows[i].store(tile + (s + i) * W);
      }
    } else {
      for (int64_t s = 0; s < steps; ++s)
        for (int i = 0; i < W; ++i)
          tile[s * W + i] = i < lanes ? element<T>(view, at.offset + i * at.lane + s * at.step) : T(0);
    }
  });
}

// A tile where it lies.
template <class V>
struct Steps {
  const typename V::scalar* p;
  int64_t step;
  V at(int64_t s) const { return V::load(p + s * step); }
};

// Whether vectors can be loaded from the array as they are.
template <class V>
inline bool is_tile(const TensorView& view, TileAt at, int lanes) {
  constexpr DType own = sizeof(typename V::scalar) == 4 ? DType::f32 : DType::f64;
  return view.dtype == own && (at.lane == 1 || V::width == 1) && lanes == V::width;
}

template <class V>
inline void write_tile(const typename V::scalar* tile, const TensorView& view, TileAt at, int lanes, int64_t steps) {
  constexpr int W = V::width;
  with_format<V>(view, [&](auto format, auto* data) {
    auto* const p = data + at.offset;
    if (at.lane == 1 || W == 1) {
      for (int64_t s = 0; s < steps; ++s) format.store(p + s * at.step, lanes, V::load(tile + s * W));
    } else if (at.step == 1) {
      for (int64_t s = 0; s < steps; s += W) {
        const int n = static_cast<int>(smaller(W, steps - s));
        V rows[W];
        for (int i = 0; i < W; ++i) rows[i] = V::load(tile + (i < n ? s + i : s) * W);
        V::transpose(rows);
        for (int i = 0; i < lanes; ++i) format.store(p + i * at.lane + s, n, rows[i]);
      }
    } else {
      for (int64_t s = 0; s < steps; ++s)
        for (int i = 0; i < lanes; ++i) write_row(tile + s * W + i, view, at.offset + i * at.lane + s * at.step, 1, 1);
    }
  });
}

}  // namespace fastlvm::FASTLVM_ISA
