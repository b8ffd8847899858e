#include "common/labels.h"

#include <algorithm>
#include <numeric>

#include "common/memory.h"

namespace fastlvm {

LabelIndex::LabelIndex(const int64_t* labels, int64_t keys, int64_t columns) : keys_(labels ? keys : 0) {
  const int64_t count = keys_ * columns;
  if (count == 0) return;
  sorted_ = static_cast<int64_t*>(aligned_allocate(2 * static_cast<size_t>(count) * sizeof(int64_t)));
  labels_ = sorted_ + count;
  for (int64_t column = 0; column < columns; ++column) {
    int64_t* const order = sorted_ + column * keys;
    std::iota(order, order + keys, int64_t{0});
    std::sort(order, order + keys, [&](int64_t a, int64_t b) {
      const int64_t x = labels[a * columns + column], y = labels[b * columns + column];
      return x != y ? x < y : a < b;
    });
    for (int64_t i = 0; i < keys; ++i) labels_[column * keys + i] = labels[order[i] * columns + column];
  }
}

LabelIndex::~LabelIndex() {
  if (sorted_) aligned_release(sorted_);
}

LabelIndex::Range LabelIndex::find(int64_t column, int64_t label) const {
  if (!sorted_ || label < 0) return {nullptr, nullptr};
  const int64_t *const first = labels_ + column * keys_, *const order = sorted_ + column * keys_;
  const auto [begin, end] = std::equal_range(first, first + keys_, label);
  return {order + (begin - first), order + (end - first)};
}

}  // namespace fastlvm
