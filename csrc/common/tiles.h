// Tiles: a vector of channels for every step along another axis, [steps, V::width], read from and written to arrays of
// any dtype and stride. See vec.h for the rules of this header.
#pragma once

#include "common/columns.h"
#include "common/rows.h"

namespace fastlvm::FASTLVM_ISA {

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

  FASTLVM_INLINE void fetch(int64_t i) const {
    if (i < lines_) prefetch(data_ + (i & (V::width - 1)) * near_ + i / V::width * far_);
  }

 private:
  static constexpr int64_t line = 64;
  const char* data_ = nullptr;
  int64_t near_ = 0, far_ = 0, lines_ = 0;
};

// Whether the steps of a tile lie side by side, lane after lane, and are few.
template <class V>
inline bool is_few_columns(TileAt at, int lanes, int64_t steps) {
  return lanes == V::width && at.step == 1 && at.lane == steps && steps > 0 && steps <= max_columns<V>;
}

// One of the strides is 1, or there is one lane. By value: a vector that is stored may alias anything else.
template <class V, class Format>
inline void read_tile(Format format, typename V::scalar* tile, const typename Format::Element* p, TileAt at, int lanes,
                      int64_t steps, int64_t pitch) {
  constexpr int W = V::width;
  if (at.lane == 1 || W == 1) {
    if (lanes == W)
      for (int64_t s = 0; s < steps; ++s) format.load(p + s * at.step, W).store(tile + s * pitch);
    else
      for (int64_t s = 0; s < steps; ++s) format.load(p + s * at.step, lanes).store(tile + s * pitch);
    return;
  }
  if (is_few_columns<V>(at, lanes, steps))
    return with_constant<max_columns<V>>(steps, [&](auto n) { split_columns<V, n.value>(format, tile, p, pitch); });
  int64_t s = 0;
  if (lanes == W) {
    for (; s + W <= steps; s += W) {
      V rows[W];
      for (int i = 0; i < W; ++i) rows[i] = format.load(p + i * at.lane + s, W);
      V::transpose(rows);
      for (int i = 0; i < W; ++i) rows[i].store(tile + (s + i) * pitch);
    }
  }
  for (; s < steps; s += W) {
    const int n = static_cast<int>(smaller(W, steps - s));
    V rows[W];
    for (int i = 0; i < W; ++i) rows[i] = i < lanes ? format.load(p + i * at.lane + s, n) : V::zero();
    V::transpose(rows);
    for (int i = 0; i < n; ++i) rows[i].store(tile + (s + i) * pitch);
  }
}

// tile[s] for s < steps, `pitch` elements apart; lanes from `lanes` on are zero.
template <class V>
inline void read_tile(typename V::scalar* tile, const TensorView& view, TileAt at, int lanes, int64_t steps,
                      int64_t pitch = V::width) {
  if (V::width == 1 || at.lane == 1 || at.step == 1)
    return with_format<V>(view, [&](auto format, const auto* data) {
      read_tile<V>(format, tile, data + at.offset, at, lanes, steps, pitch);
    });
  for (int64_t s = 0; s < steps; ++s) {
    read_row<V>(tile + s * pitch, view, at.offset + s * at.step, at.lane, lanes);
    fill_zero(tile + s * pitch + lanes, V::width - lanes);
  }
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
  return view.dtype == dtype_of<typename V::scalar> && (at.lane == 1 || V::width == 1) && lanes == V::width;
}

template <class V, class Format>
inline void write_tile(Format format, const typename V::scalar* tile, typename Format::Element* p, TileAt at, int lanes,
                       int64_t steps, int64_t pitch) {
  constexpr int W = V::width;
  if (at.lane == 1 || W == 1) {
    if (lanes == W)
      for (int64_t s = 0; s < steps; ++s) format.store(p + s * at.step, W, V::load(tile + s * pitch));
    else
      for (int64_t s = 0; s < steps; ++s) format.store(p + s * at.step, lanes, V::load(tile + s * pitch));
    return;
  }
  if (is_few_columns<V>(at, lanes, steps))
    return with_constant<max_columns<V>>(steps, [&](auto n) { join_columns<V, n.value>(format, tile, p, pitch); });
  for (int64_t s = 0; s < steps; s += W) {
    const int n = static_cast<int>(smaller(W, steps - s));
    V rows[W];
    for (int i = 0; i < W; ++i) rows[i] = V::load(tile + (i < n ? s + i : s) * pitch);
    V::transpose(rows);
    for (int i = 0; i < lanes; ++i) format.store(p + i * at.lane + s, n, rows[i]);
  }
}

template <class V>
inline void write_tile(const typename V::scalar* tile, const TensorView& view, TileAt at, int lanes, int64_t steps,
                       int64_t pitch = V::width) {
  if (V::width == 1 || at.lane == 1 || at.step == 1)
    return with_format<V>(
        view, [&](auto format, auto* data) { write_tile<V>(format, tile, data + at.offset, at, lanes, steps, pitch); });
  for (int64_t s = 0; s < steps; ++s) write_row<V>(tile + s * pitch, view, at.offset + s * at.step, at.lane, lanes);
}

// out[c, r] = in[r, c]; rows of the result are padded with zeros to whole vectors.
template <class V>
inline void transpose(typename V::scalar* out, int64_t out_pitch, const typename V::scalar* in, int64_t in_pitch,
                      int64_t rows, int64_t columns) {
  vectors<V>(rows, [&](int64_t r, int lanes) {
    read_tile<V>(Plain<V>(), out + r, in + r * in_pitch, {0, in_pitch, 1}, lanes, columns, out_pitch);
  });
}

}  // namespace fastlvm::FASTLVM_ISA
