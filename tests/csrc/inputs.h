// What the cases of several ops draw: sizes, packed sequences, step sizes and decays.
#pragma once

#include "cases.h"

namespace fastlvm::test {

// Sizes of one call: mostly small, sometimes enough to be shared among threads or long with few channels.
struct Sizes {
  int64_t batch, dim, length;
};

inline Sizes draw_sizes(Draws& draw, int64_t width) {
  switch (draw.pick("kind", {0, 0, 0, 0, 0, 0, 1, 2})) {
    case 1:  // enough work for several threads
      return {draw.pick("B large", {1, 2}), draw.pick("D large", {24, 34}),
              width > 40 ? 33 : draw.pick("L large", {71, 130})};
    case 2:
      return {1, draw.pick("D of a long", {1, 2, 6}), draw.pick("L long", {513, 1030})};
    default:
      return {draw.pick("B", {0, 1, 1, 2, 3}), draw.pick("D", {0, 1, 2, 4, 6, 17, 18, 33}),
              draw.pick("L", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70})};
  }
}

// The offsets of packed sequences, of which some are empty, in memory of exactly their size; null when not drawn.
class Offsets {
 public:
  Offsets(Draws& draw, Sizes& sizes) : memory_(8 * 5, Memory::heap) {
    if (!draw.coin("packed")) return;
    const int64_t count = draw.pick("sequences", {0, 1, 2, 4});
    if (count == 0) sizes.length = 0;
    given_ = true;
    sizes.batch = count;
    std::vector<int64_t> cuts(1, 0);
    for (int64_t i = 1; i < count; ++i) cuts.push_back(draw.below(sizes.length + 1));
    if (count > 0) cuts.push_back(sizes.length);
    std::sort(cuts.begin(), cuts.end());
    start_ = memory_.data() + memory_.size() - 8 * cuts.size();
    std::memcpy(start_, cuts.data(), 8 * cuts.size());
  }
  const int64_t* get() const { return given_ ? reinterpret_cast<const int64_t*>(start_) : nullptr; }
  int64_t batch(const Sizes& sizes) const { return given_ ? 1 : sizes.batch; }  // of arrays of time

 private:
  Memory memory_;
  unsigned char* start_ = nullptr;
  bool given_ = false;
};

// Positive once the kernel has taken softplus of them or not.
inline Tensor& time_steps(Case& c, const char* name, const Array::Shape& shape, bool softplus) {
  if (softplus) return c.input(name, shape, [&c] { return c.draw.normal(); }, true);
  return c.input(name, shape, [&c] { return 0.02 + c.draw.uniform(); });
}

inline Tensor& decay(Case& c, const Array::Shape& shape) {
  return c.input("A", shape, [&c] { return -std::exp(c.draw.normal()); }, true);
}

// D of the SSD ops, [H] or [H, P]; null when not drawn.
inline Tensor* maybe_skip(Case& c, int64_t heads, int64_t dim) {
  const int64_t rank = c.draw.pick("D rank", {0, 1, 2});
  if (rank == 0) return nullptr;
  return rank == 1 ? &c.input("D skip", {heads}) : &c.input("D skip", {heads, dim});
}

}  // namespace fastlvm::test
