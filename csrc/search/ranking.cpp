#include "search/ranking.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

namespace fastlvm {

uint64_t key_of(float score, uint32_t place) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (~place & 0xffffffffu);
}

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

Ranking::Ranking(const Coded& rows, const SearchKernels& kernels, int seats, int64_t most, Workspace& workspace)
    : rows_(rows), kernels_(kernels), seats_(seats), most_(most) {
  const auto take = [&]<class T>(T*& to, int64_t n) {
    to = static_cast<T*>(workspace.take(static_cast<size_t>(n) * sizeof(T)));
  };
  const int64_t room = std::min(2 * most, rows.count) + of_scan;  // every row is found once
  take(found_, seats);
  for (int seat = 0; seat < seats; ++seat) {
    Found& found = found_[seat] = {};
    take(found.keys, room), take(found.scores, of_scan), take(found.positions, of_scan);
  }
  take(best_, seats * room);
  take(positions_, most), take(scores_, most);
}

void Ranking::scan(int seat, const Table& table, const RowSpan& rows, float centroid, const RowSpan& next) {
  Found& found = found_[seat];
  const auto bits = [&](int64_t block) { return rows_.bits + block * 2 * rows_.pairs * block_rows; };
  for (int64_t row = 0; row < rows.count; row += of_scan) {
    const int64_t first = rows.first + row, block = rows.block + row / block_rows;
    const RowSpan then = row + of_scan < rows.count ? RowSpan{first + of_scan, 0, block + of_scan / block_rows} : next;
    const int64_t kept = kernels_.scan({std::min(of_scan, rows.count - row), rows_.pairs, bits(block),
                                        rows_.factors + first, bits(then.block), rows_.factors + then.first, table,
                                        centroid, threshold_.load(std::memory_order_relaxed),
                                        static_cast<int32_t>(first), found.scores, found.positions});
    for (int64_t i = 0; i < kept; ++i)
      found.keys[found.count + i] = key_of(found.scores[i], static_cast<uint32_t>(found.positions[i]));
    found.count += kept;
    if (found.count > 2 * most_) shrink(found);
  }
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

void Ranking::gather() {
  int64_t all = 0;
  for (int seat = 0; seat < seats_; ++seat) {
    std::copy_n(found_[seat].keys, found_[seat].count, best_ + all);
    all += found_[seat].count;
  }
  best_to_front(best_, all, most_);
  count_ = std::min(all, most_);
  for (int64_t i = 0; i < count_; ++i) positions_[i] = static_cast<int32_t>(place_of(best_[i]));
}

void Ranking::score(int64_t part, const float* query) {
  const int64_t first = part * at_once, rows = std::min(at_once, count_ - first);
  if (rows > 0)
    kernels_.score({rows_.dim, rows, query, rows_.codes, rows_.scales, positions_ + first, scores_ + first});
}

int64_t Ranking::sort_best(int64_t count, int64_t wanted) {
  best_to_front(best_, count, wanted);
  wanted = std::min(count, wanted);
  std::sort(best_, best_ + wanted, std::greater<>());
  return wanted;
}

}  // namespace fastlvm
