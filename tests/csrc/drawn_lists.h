// A small drawn inverted-list index with a tail, in memory that ends where its arrays do, and what plain double
// precision says of its rows: searches.cpp holds searches to that.
#pragma once

#include <limits>
#include <numeric>

#include "arrays.h"
#include "common/dispatch.h"
#include "search/searcher.h"

namespace fastlvm::test {

constexpr double eps = std::numeric_limits<float>::epsilon();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t queries = 70;

// Numbers of one kind in memory of exactly their size, against either end of it.
template <class T>
class Numbers {
 public:
  Numbers(Draws& draw, int64_t count)
      : memory_(static_cast<size_t>(count) * sizeof(T), static_cast<Memory::Place>(draw.below(3))), count_(count) {}
  template <class F>
  Numbers(Draws& draw, int64_t count, F value) : Numbers(draw, count) {
    for (int64_t i = 0; i < count; ++i) data()[i] = static_cast<T>(value());
  }
  Numbers(Draws& draw, const T* from, int64_t count) : Numbers(draw, count) {
    if (count > 0) std::memcpy(data(), from, memory_.size());
  }
  Numbers(Draws& draw, const std::vector<T>& from) : Numbers(draw, from.data(), static_cast<int64_t>(from.size())) {}

  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t count() const { return count_; }
  std::vector<T> values() const { return {data(), data() + count_}; }

 private:
  Memory memory_;
  int64_t count_;
};

inline std::vector<int64_t> draw_sizes(Draws& draw, bool large) {
  const int64_t nlist = large ? draw.pick("lists of a large one", {2, 300}) : draw.pick("lists", {1, 2, 3, 7, 20});
  std::vector<int64_t> sizes;
  for (int64_t l = 0; l < nlist; ++l)
    sizes.push_back(large ? draw.below(3) : draw.pick("size", {0, 0, 1, 5, 31, 32, 33, 64, 65}));
  if (large) sizes[static_cast<size_t>(draw.below(nlist))] = draw.pick("large size", {1023, 1025, 2100});
  if (draw.pick("rows in lists", {0, 1, 1, 1, 1, 1, 1, 1}) == 0)
    sizes.assign(sizes.size(), 0);
  else if (std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == 0)
    sizes[0] = 1;
  return sizes;
}

// A row's position is its place in the lists, and after those in the tail. Rows that were removed have NaN for a factor
// or a scale.
class DrawnLists {
 public:
  DrawnLists(uint64_t seed, Coverage& coverage)
      : seed_(seed),
        draw_(seed, &coverage),
        large_(draw_.pick("large", {0, 0, 0, 0, 1}) != 0),
        dim_(large_ ? draw_.pick("dim of a large one", {1, 7, 16, 33})
                    : draw_.pick("dim", {1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 48, 64, 79, 100, 130})),
        sizes_(draw_, draw_sizes(draw_, large_)),
        rows_(std::accumulate(sizes_.data(), sizes_.data() + sizes_.count(), int64_t{0})),
        tail_(draw_.pick("tail", {0, 1, 15, 16, 17, 40})),
        room_(tail_ + draw_.pick("room that is left", {0, 0, 9})),
        tail_first_(rows_ + draw_.pick("ids without a row", {0, 0, 6})),
        signs_(draw_, rotation_rounds * dim_, [&] { return draw_.below(2) ? 1 : -1; }),
        centroids_(draw_, nlist() * dim_, [&] { return draw_.below(255) - 127; }),
        centroid_scales_(draw_, nlist(), [&] { return 0.01 * draw_.uniform(); }),
        level_(draw_, 1, [&] { return 0.5 + draw_.uniform(); }),
        blocks_(draw_, all_blocks() * block_bytes(), [&] { return draw_.next() >> 56; }),  // of no rows as well
        codes_(draw_, rows_ * dim_, [&] { return draw_.below(255) - 127; }),
        scales_(draw_, rows_, [&] { return 0.01 * draw_.uniform(); }),
        ids_(draw_, rows_),
        tail_codes_(draw_, room_ * dim_, [&] { return draw_.below(255) - 127; }),
        tail_scales_(draw_, room_, [&] { return draw_.below(5) ? 0.01 * draw_.uniform() : nan; }),
        queries_(draw_, queries * dim_, [&] { return draw_.normal(); }) {
    std::vector<int32_t> numbers(static_cast<size_t>(tail_first_));
    std::iota(numbers.begin(), numbers.end(), 0);
    place_.assign(static_cast<size_t>(tail_first_ + tail_), -1);
    for (int64_t i = 0; i < rows_; ++i) {
      std::swap(numbers[i], numbers[i + draw_.below(tail_first_ - i)]);
      ids_[i] = numbers[i];
      place_[ids_[i]] = i;
    }
    for (int64_t i = 0; i < tail_; ++i) place_[tail_first_ + i] = rows_ + i;
    int64_t block = 0;
    for (int64_t l = 0; l < nlist(); block += blocks_of(sizes_[l]), ++l)
      for (int64_t i = 0; i < sizes_[l]; ++i) {
        list_.push_back(l);
        slot_.push_back(block * block_rows + i);
        const double factor = draw_.below(8) ? draw_.uniform() : 0;
        put_factor(static_cast<int64_t>(slot_.size()) - 1, static_cast<float>(draw_.below(9) ? factor : nan));
      }
    for (int64_t row = 0; row < rows_ + tail_; ++row) there_ += there(row);
    // Rows beyond those that are searched would be found first.
    for (int64_t i = tail_; i < room_; ++i) tail_scales_[i] = 1e6f;
  }

 protected:
  struct Estimate {
    double value, off;
  };

  int64_t nlist() const { return sizes_.count(); }
  int64_t all_rows() const { return rows_ + tail_; }
  int64_t pairs() const { return Searcher::pairs_of(dim_); }
  int64_t block_bytes() const { return bytes_of_block(pairs()); }
  static int64_t blocks_of(int64_t rows) { return (rows + block_rows - 1) / block_rows; }
  int64_t all_blocks() const {
    int64_t count = 0;
    for (int64_t l = 0; l < nlist(); ++l) count += blocks_of(sizes_[l]);
    return count;
  }

  ListsSource source() const {
    return {dim_,
            nlist(),
            rows_,
            signs_.data(),
            centroids_.data(),
            centroid_scales_.data(),
            level_.data(),
            sizes_.data(),
            blocks_.data(),
            codes_.data(),
            scales_.data(),
            ids_.data(),
            tail_codes_.data(),
            tail_scales_.data(),
            room_,
            tail_first_};
  }

  int64_t id(int64_t row) const { return row < rows_ ? ids_[row] : tail_first_ + row - rows_; }
  bool there(int64_t row) const { return !std::isnan(row < rows_ ? factor(row) : tail_scales_[row - rows_]); }
  float factor(int64_t row) const {
    float value;
    std::memcpy(&value, factor_at(row), sizeof value);
    return value;
  }
  int64_t there_in(int64_t list) const {
    int64_t count = 0;
    for (int64_t row = 0; row < rows_; ++row) count += list_[static_cast<size_t>(row)] == list && there(row);
    return count;
  }

  std::vector<float> rotated(int64_t query) {
    Numbers<float> moved(draw_, queries_.data() + query * dim_, dim_);
    active_kernels().search.rotate({dim_, signs_.data(), false}, moved.data());
    return moved.values();
  }

  // <q, sign r> of a row of a list; bit i of its code is coordinate i.
  double signed_sum(const std::vector<float>& q, int64_t row) const {
    const int64_t slot = slot_[static_cast<size_t>(row)];
    const uint8_t* const bits = blocks_.data() + slot / block_rows * block_bytes() + slot % block_rows;
    double sum = 0;
    for (int64_t i = 0; i < dim_; ++i) sum += bits[i / 8 * block_rows] >> i % 8 & 1 ? q[i] : -double{q[i]};
    return sum;
  }

  // By int8 codes, of a row of a list or of the tail.
  Estimate score(const std::vector<float>& q, int64_t row) const {
    const int8_t* const code = row < rows_ ? &codes_[row * dim_] : &tail_codes_[(row - rows_) * dim_];
    const double scale = row < rows_ ? scales_[row] : tail_scales_[row - rows_];
    double sum = 0, all = 0;
    for (int64_t i = 0; i < dim_; ++i) {
      const double term = double{q[i]} * code[i] * scale;
      sum += term, all += std::fabs(term);
    }
    return {sum, (dim_ + 2) * eps * all};
  }

  // What a row is a candidate by.
  Estimate rank(const std::vector<float>& q, int64_t row) const {
    if (row >= rows_) return score(q, row);
    const Estimate c = near(q, list_[static_cast<size_t>(row)]);
    const double value = level_[0] * c.value + factor(row) * signed_sum(q, row);
    return {value, level_[0] * c.off + factor(row) * table_off(q) + 4 * eps * std::fabs(value)};
  }

  double centroid(int64_t list, int64_t i) const {
    return double{centroid_scales_[list]} * centroids_[list * dim_ + i];
  }

  Estimate near(const std::vector<float>& q, int64_t list) const {
    double sum = 0, sizes = 0;
    for (int64_t i = 0; i < dim_; ++i) sum += q[i] * centroid(list, i), sizes += std::fabs(q[i] * centroid(list, i));
    return {sum, (dim_ + 2) * eps * sizes};
  }

  // What centroids are ranked by before the best are scored: as if they were the rows of one list, at their mean.
  std::vector<Estimate> near_estimates(const std::vector<float>& q) const {
    std::vector<double> mean(static_cast<size_t>(dim_));
    double most = 0, all = 0, at_mean = 0;
    for (int64_t i = 0; i < dim_; ++i) {
      for (int64_t l = 0; l < nlist(); ++l)
        mean[i] += centroid(l, i) / static_cast<double>(nlist()), most = std::max(most, std::fabs(centroid(l, i)));
      all += std::fabs(double{q[i]}), at_mean += q[i] * mean[i];
    }
    std::vector<Estimate> found;
    for (int64_t l = 0; l < nlist(); ++l) {
      double square = 0, size = 0, sum = 0, off = table_off(q) + static_cast<double>(2 * dim_) * eps * all;
      for (int64_t i = 0; i < dim_; ++i) {
        const double r = centroid(l, i) - mean[i];
        square += r * r, size += std::fabs(r), sum += r > 0 ? q[i] : -double{q[i]};
        if (std::fabs(r) <= static_cast<double>(2 * nlist()) * eps * most) off += 2 * std::fabs(double{q[i]});
      }
      const double factor = size > 0 ? square / size : 0,
                   rounding = static_cast<double>(dim_ + nlist()) * eps * most * all;
      found.push_back({at_mean + factor * sum, factor * off + rounding});
    }
    return found;
  }

  // Entries of the table are off by half a step, and there is one for four coordinates.
  double table_off(const std::vector<float>& q) const {
    double most = 0, all = 0;
    for (int64_t g = 0; g < dim_; g += 4) {
      double four = 0;
      for (int64_t i = g; i < std::min(g + 4, dim_); ++i) four += std::fabs(double{q[i]});
      most = std::max(most, four), all += four;
    }
    const double step = 2 * most / static_cast<double>(std::min<int64_t>(63, 65535 / (4 * pairs())));
    return static_cast<double>((dim_ + 3) / 4) * (0.5 + 512 * eps) * step + (dim_ + 8) * eps * all;
  }

  uint64_t seed_;
  Draws draw_;
  bool large_;
  int64_t dim_;
  Numbers<int64_t> sizes_;
  int64_t rows_, tail_, room_, tail_first_;  // in lists, searched of the tail, that the tail has; its first id
  Numbers<float> signs_;
  Numbers<int8_t> centroids_;
  Numbers<float> centroid_scales_;
  Numbers<float> level_;
  Numbers<uint8_t> blocks_;
  Numbers<int8_t> codes_;
  Numbers<float> scales_;
  Numbers<int32_t> ids_;
  Numbers<int8_t> tail_codes_;
  Numbers<float> tail_scales_;
  Numbers<float> queries_;
  std::vector<int64_t> list_, slot_, place_;  // of positions, and of ids: -1 where there is no row
  int64_t there_ = 0;                         // rows that were not removed

 private:
  uint8_t* factor_at(int64_t row) const {
    const int64_t slot = slot_[static_cast<size_t>(row)];
    return blocks_.data() + slot / block_rows * block_bytes() + code_bytes(pairs()) +
           slot % block_rows * static_cast<int64_t>(sizeof(float));
  }
  void put_factor(int64_t row, float value) { std::memcpy(factor_at(row), &value, sizeof value); }
};

}  // namespace fastlvm::test
