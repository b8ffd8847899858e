// The best rows of a scan: by estimate, found by a team of threads, and then by score.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "predictor/workspace.h"
#include "search/lists.h"

namespace fastlvm {

// Scores as whole numbers in the same order, and then places, the smallest first: a greater key comes first. No two
// rows have the same, so that the best of them do not depend on who found them.
uint64_t key_of(float score, uint32_t place);
float score_of(uint64_t key);
uint32_t place_of(uint64_t key);

// The `most` greatest of the keys to the front, in no order.
void best_to_front(uint64_t* keys, int64_t count, int64_t most);

// Coded rows that a scan ranks.
struct Coded {
  int64_t dim, pairs, count;
  const uint8_t* bits;
  const float* factors;
  const int8_t* codes;
  const float* scales;
};

// Rows [first, first + count), whose bits begin with `block`.
struct RowSpan {
  int64_t first, count, block;
};

class Ranking {
 public:
  Ranking(const Coded& rows, const SearchKernels& kernels, int seats, int64_t most, Workspace& workspace);

  // By any thread: some rows, <q, c> of their centroid, and the rows that `seat`, the caller's own, scans afterwards.
  void scan(int seat, const Table& table, const RowSpan& rows, float centroid, const RowSpan& next);
  // By one thread, after all scans: settles which rows are scored.
  void gather();
  int64_t count() const { return count_; }
  // By any thread, after that: parts [0, parts()).
  int64_t parts() const { return (most_ + at_once - 1) / at_once; }
  void score(int64_t part, const float* query);
  // By one thread, after all parts: the keys of the `wanted` best that `left_out(position)` spares, in order; returns
  // how many there are.
  template <class LeftOut>
  int64_t order(int64_t wanted, LeftOut left_out) {
    int64_t left = 0;
    for (int64_t i = 0; i < count_; ++i)
      if (!left_out(positions_[i])) best_[left++] = key_of(scores_[i], static_cast<uint32_t>(positions_[i]));
    return sort_best(left, wanted);
  }
  uint64_t operator[](int64_t i) const { return best_[i]; }

 private:
  static constexpr int64_t of_scan = 1024;  // rows, a multiple of a block
  static constexpr int64_t at_once = 16;

  struct Found {
    uint64_t* keys;  // [room]
    int64_t count;
    float* scores;
    int32_t* positions;  // [of_scan]
  };

  void shrink(Found& found);
  int64_t sort_best(int64_t count, int64_t wanted);

  const Coded& rows_;
  const SearchKernels& kernels_;
  int seats_;
  int64_t most_, count_ = 0;
  Found* found_;
  uint64_t* best_;
  int32_t* positions_;
  float* scores_;
  std::atomic<float> threshold_{-std::numeric_limits<float>::infinity()};
};

}  // namespace fastlvm
