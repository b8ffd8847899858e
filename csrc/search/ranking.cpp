#include "search/ranking.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

namespace fastlvm {

float score_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

uint32_t place_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

// By a histogram, and a selection in the bin that the last one falls into: std::nth_element over all of the keys takes
// five times as long.
void best_to_front(uint64_t* keys, int64_t count, int64_t most) {
  constexpr int bins = 1024;
  if (count <= most) return;
  if (count < bins / 4) return std::nth_element(keys, keys + most, keys + count, std::greater<>());
  uint64_t least = keys[0], greatest = keys[0];
  for (int64_t i = 1; i < count; ++i) least = std::min(least, keys[i]), greatest = std::max(greatest, keys[i]);
  const int shift = std::max(0, static_cast<int>(std::bit_width(greatest - least)) - 10);
  const auto bin_of = [&](uint64_t key) { return (key - least) >> shift; };
  int32_t counts[bins] = {};
  for (int64_t i = 0; i < count; ++i) ++counts[bin_of(keys[i])];
  int64_t above = 0;
  uint64_t bin = bins - 1;
  for (; above + counts[bin] < most; --bin) above += counts[bin];
  int64_t kept = 0;  // those of the bin after those above it
  int64_t end = count;
  for (int64_t i = 0; i < end;) {
    const uint64_t of = bin_of(keys[i]);
    if (of > bin)
      std::swap(keys[kept++], keys[i++]);
    else if (of < bin)
      std::swap(keys[i], keys[--end]);
    else
      ++i;
  }
  std::nth_element(keys + kept, keys + most, keys + end, std::greater<>());
}

Ranking::Ranking(const Coded& rows, const SearchKernels& kernels, int seats, int64_t most, int64_t unsorted,
                 Workspace& workspace)
    : rows_(rows), kernels_(kernels), seats_(seats), most_(most), unsorted_(unsorted) {
  const auto take = [&]<class T>(T*& to, int64_t n) {
    to = static_cast<T*>(workspace.take(static_cast<size_t>(n) * sizeof(T)));
  };
  const int64_t room = std::min(unsorted, rows.count + rows.exact) + of_scan;  // every row is found once
  take(found_, seats);
  for (int seat = 0; seat < seats; ++seat) {
    Found& found = found_[seat] = {};
    take(found.keys, room);
  }
  take(best_, seats * room);
  take(positions_, most), take(scores_, most);
}

void Ranking::scan(int seat, const Table& table, const RowSpan& rows, float centroid, const RowSpan& next) {
  Found& found = found_[seat];
  const auto at = [&](int64_t block) { return rows_.blocks + block * bytes_of_block(rows_.pairs); };
  for (int64_t row = 0; row < rows.count; row += of_scan) {
    const int64_t first = rows.first + row, block = rows.block + row / block_rows;
    const int64_t then = row + of_scan < rows.count ? block + of_scan / block_rows : next.block;
    found.count += kernels_.scan({std::min(of_scan, rows.count - row), rows_.pairs, at(block), at(then), table,
                                  centroid, threshold_.load(std::memory_order_relaxed), static_cast<int32_t>(first),
                                  found.keys + found.count});
    if (found.count > unsorted_) shrink(found);
  }
}

void Ranking::score_exact(int seat, const float* query, const int8_t* codes, const float* scales, int64_t first,
                          int64_t count) {
  Found& found = found_[seat];
  const float threshold = threshold_.load(std::memory_order_relaxed);
  int32_t positions[at_once];
  float found_scores[at_once];
  for (int32_t i = 0; i < count; ++i) positions[i] = i;
  kernels_.score({rows_.dim, count, 0, query, codes, scales, positions, found_scores});
  for (int64_t i = 0; i < count; ++i)
    if (found_scores[i] >= threshold)
      found.keys[found.count++] = key_of(found_scores[i], static_cast<uint32_t>(rows_.count + first + i));
  if (found.count > unsorted_) shrink(found);
}

// What a seat keeps are its best; the worst of them is no better than the worst of the best of all.
void Ranking::shrink(Found& found) {
  best_to_front(found.keys, found.count, most_);
  found.count = most_;
  const float worst = score_of(*std::min_element(found.keys, found.keys + found.count));
  float threshold = threshold_.load(std::memory_order_relaxed);
  while (worst > threshold && !threshold_.compare_exchange_weak(threshold, worst, std::memory_order_relaxed)) {
  }
}

void Ranking::settle(int seat) {
  Found& found = found_[seat];
  best_to_front(found.keys, found.count, most_);
  found.count = std::min(found.count, most_);
}

void Ranking::gather() {
  int64_t all = 0;
  for (int seat = 0; seat < seats_; ++seat) {
    std::copy_n(found_[seat].keys, found_[seat].count, best_ + all);
    all += found_[seat].count;
  }
  best_to_front(best_, all, most_);
  count_ = std::min(all, most_);
  int64_t end = count_;  // what has its score already comes last
  scored_ = 0;
  for (int64_t i = 0; i < count_; ++i) {
    const uint32_t place = place_of(best_[i]);
    const bool exact = place >= rows_.count;
    const int64_t at = exact ? --end : scored_++;
    positions_[at] = static_cast<int32_t>(place);
    if (exact) scores_[at] = score_of(best_[i]);
  }
}

void Ranking::score(int64_t part, const float* query) {
  const int64_t first = part * at_once, rows = std::min(at_once, scored_ - first);
  if (rows > 0)
    kernels_.score({rows_.dim, rows, scored_ - first - rows, query, rows_.codes, rows_.scales, positions_ + first,
                    scores_ + first});
}

int64_t Ranking::sort_best(int64_t count, int64_t wanted, int64_t sorted) {
  best_to_front(best_, count, wanted);
  wanted = std::min(count, wanted);
  best_to_front(best_, wanted, sorted);
  std::sort(best_, best_ + std::min(wanted, sorted), std::greater<>());
  return wanted;
}

}  // namespace fastlvm
