// The best rows of a scan: by estimate, found by a team of threads, and then by score.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "common/workspace.h"
#include "search/lists.h"

namespace fastlvm {

// What a key was made of.
float score_of(uint64_t key);
uint32_t place_of(uint64_t key);

// The `most` greatest of the keys to the front, in no order.
void best_to_front(uint64_t* keys, int64_t count, int64_t most);

// Coded rows that a scan ranks; `exact` others are scored at once, their places following on those of the coded.
struct Coded {
  int64_t dim, pairs, count, exact;
  const uint8_t* blocks;
  const int8_t* codes;
  const float* scales;
};

// Rows [first, first + count), which begin with `block`.
struct RowSpan {
  int64_t first, count, block;
};

class Ranking {
 public:
  static constexpr int64_t at_once = 16;

  // `unsorted`: so many may be found before a seat looks for the best of them; more than `most`.
  Ranking(const Coded& rows, const SearchKernels& kernels, int seats, int64_t most, int64_t unsorted,
          Workspace& workspace);

  // By any thread: some rows, <q, c> of their centroid, and the rows that `seat`, the caller's own, scans afterwards.
  void scan(int seat, const Table& table, const RowSpan& rows, float centroid, const RowSpan& next);
  // As well: `count` of the exact rows from `first` on, at most at_once, whose codes and scales begin there.
  void score_exact(int seat, const float* query, const int8_t* codes, const float* scales, int64_t first,
                   int64_t count);
  // By any thread, after the scans of a seat, its own.
  void settle(int seat);
  // By one thread, after that: settles which rows are scored.
  void gather();
  int64_t count() const { return count_; }
  // By any thread, after that: parts [0, parts()).
  int64_t parts() const { return (most_ + at_once - 1) / at_once; }
  void score(int64_t part, const float* query);
  // By one thread, after all parts: the keys of the `wanted` best that `left_out(position)` spares, the first `sorted`
  // of them in order; returns how many there are.
  template <class LeftOut>
  int64_t order(int64_t wanted, int64_t sorted, LeftOut left_out) {
    int64_t left = 0;
    for (int64_t i = 0; i < count_; ++i)
      if (!left_out(positions_[i])) best_[left++] = key_of(scores_[i], static_cast<uint32_t>(positions_[i]));
    return sort_best(left, wanted, sorted);
  }
  uint64_t operator[](int64_t i) const { return best_[i]; }

 private:
  static constexpr int64_t of_scan = 1024;  // rows, a multiple of a block

  struct Found {
    uint64_t* keys;  // [room]
    int64_t count;
  };

  void shrink(Found& found);
  int64_t sort_best(int64_t count, int64_t wanted, int64_t sorted);

  const Coded& rows_;
  const SearchKernels& kernels_;
  int seats_;
  int64_t most_, unsorted_, count_ = 0, scored_ = 0;
  Found* found_;
  uint64_t* best_;
  int32_t* positions_;
  float* scores_;
  std::atomic<float> threshold_{-std::numeric_limits<float>::infinity()};
};

}  // namespace fastlvm
