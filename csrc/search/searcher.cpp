#include "search/searcher.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <stdexcept>

#include "common/dispatch.h"
#include "common/phases.h"
#include "common/threads.h"

namespace fastlvm {
namespace {

constexpr int64_t most_of_scan = 1024;  // rows, a multiple of a block
constexpr int64_t scored_at_once = 16;
constexpr int64_t queries_at_once = 64;

// Scores as whole numbers in the same order, and then positions, the smallest first: a greater key comes first. No two
// rows have the same, so that the best of them do not depend on who found them.
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

// The best `most` of the keys to the front.
void best_first(uint64_t* keys, int64_t count, int64_t most) {
  if (count > most) std::nth_element(keys, keys + most, keys + count, std::greater<>());
}

template <class F>
void job(int64_t count, F f) {
  run_tasks(count, [](void* context, int64_t index) { (*static_cast<F*>(context))(index); }, &f);
}

}  // namespace

Searcher::Searcher(const ListsSource& source) : lists_(source) {
  int64_t first = 0, block = 0;
  for (int64_t l = 0; l < source.nlist; ++l) {
    const int64_t rows = source.sizes[l];
    if (rows < 0 || rows > source.rows - first) throw std::invalid_argument("sizes: wants those of all rows together");
    list_.push_back({first, rows, block});
    first += rows, block += (rows + block_rows - 1) / block_rows;
  }
  if (first != source.rows) throw std::invalid_argument("sizes: wants those of all rows together");
  centroids_ = std::make_unique<Model>(1, source.dim, [&](Builder& builder) {
    builder.last();
    builder.linear({Precision::int8, source.nlist, source.dim, source.centroids, source.centroid_scales, nullptr});
  });
}

// One query, answered by a team that goes through it in phases.
class Searcher::Query {
 public:
  Query(const Searcher& searcher, const float* query, const float* near, const int64_t* excluded,
        const SearchOptions& options, int seats, Workspace& workspace, float* scores, int64_t* ids)
      : lists_(searcher.lists_),
        list_(searcher.list_),
        kernels_(active_kernels().search),
        query_(query),
        near_(near),
        excluded_(excluded),
        options_(options),
        seats_(seats),
        workspace_(workspace),
        scores_(scores),
        ids_(ids) {
    const int64_t pairs = pairs_of(lists_.dim);
    table_.entries = take<uint8_t>(pairs * 128);
    kernels_.fill(query_, lists_.dim, pairs, table_);
    order_ = take<uint64_t>(lists_.nlist);
    for (int64_t l = 0; l < lists_.nlist; ++l) order_[l] = key_of(near_[l], static_cast<uint32_t>(l));
    best_first(order_, lists_.nlist, options_.nprobe);
    std::sort(order_, order_ + options_.nprobe, std::greater<>());
    per_seat_ = (options_.nprobe + seats_ - 1) / seats_;
    room_ = 2 * options_.candidates + most_of_scan;
    found_ = take<Found>(seats_);
    for (int seat = 0; seat < seats_; ++seat) {
      found_[seat] = {take<uint64_t>(room_), 0, take<float>(most_of_scan), take<int32_t>(most_of_scan)};
    }
    best_ = take<uint64_t>(seats_ * room_);
    positions_ = take<int32_t>(options_.candidates);
    scored_ = take<float>(options_.candidates);
    const int64_t parts[] = {per_seat_ * seats_, 1, (options_.candidates + scored_at_once - 1) / scored_at_once, 1};
    phases_ = new (take<Phases>(1))
        Phases(take<uint8_t>(static_cast<int64_t>(Phases::bytes(count, seats_))), seats_, parts, count);
  }

  void work(int seat) {
    each(scan, seat, [&](int64_t part) {
      const int64_t turn = part % per_seat_ * seats_ + part / per_seat_;  // the nearest lists go to all seats
      if (turn < options_.nprobe) scan_list(place_of(order_[turn]), score_of(order_[turn]), found_[seat]);
    });
    each(gather, seat, [&](int64_t) { gather_best(); });
    each(score, seat, [&](int64_t part) {
      const int64_t first = part * scored_at_once, rows = std::min(scored_at_once, best_count_ - first);
      if (rows > 0)
        kernels_.score({lists_.dim, rows, query_, lists_.codes, lists_.scales, positions_ + first, scored_ + first});
    });
    each(finish, seat, [&](int64_t) { write(); });
  }

 private:
  enum { scan, gather, score, finish, count };

  struct Found {
    uint64_t* keys;  // [room_]
    int64_t count;
    float* scores;
    int32_t* positions;  // [most_of_scan]
  };

  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(workspace_.take(static_cast<size_t>(n) * sizeof(T)));
  }

  template <class F>
  void each(int phase, int seat, F f) {
    int64_t done = 0;
    for (int64_t part; (part = phases_->claim(phase, seat)) >= 0; ++done) f(part);
    phases_->finish(phase, done);
  }

  void scan_list(int64_t l, float centroid, Found& found) {
    const List& list = list_[static_cast<size_t>(l)];
    const int64_t pairs = pairs_of(lists_.dim), block_bytes = 2 * pairs * block_rows;
    for (int64_t row = 0; row < list.rows; row += most_of_scan) {
      const int64_t first = list.first + row;
      const int64_t kept = kernels_.scan(
          {std::min(most_of_scan, list.rows - row), pairs, lists_.bits + (list.block + row / block_rows) * block_bytes,
           lists_.factors + first, table_, centroid, threshold_.load(std::memory_order_relaxed),
           static_cast<int32_t>(first), found.scores, found.positions});
      for (int64_t i = 0; i < kept; ++i)
        found.keys[found.count++] = key_of(found.scores[i], static_cast<uint32_t>(found.positions[i]));
      if (found.count > 2 * options_.candidates) shrink(found);
    }
  }

  // What a seat keeps are its best estimates; nobody's worst of them can be among the best of all.
  void shrink(Found& found) {
    best_first(found.keys, found.count, options_.candidates);
    found.count = options_.candidates;
    const float worst = score_of(*std::min_element(found.keys, found.keys + found.count));
    float threshold = threshold_.load(std::memory_order_relaxed);
    while (worst > threshold && !threshold_.compare_exchange_weak(threshold, worst, std::memory_order_relaxed)) {
    }
  }

  void gather_best() {
    int64_t all = 0;
    for (int seat = 0; seat < seats_; ++seat) {
      std::copy_n(found_[seat].keys, found_[seat].count, best_ + all);
      all += found_[seat].count;
    }
    best_first(best_, all, options_.candidates);
    best_count_ = std::min(all, options_.candidates);
    for (int64_t i = 0; i < best_count_; ++i) positions_[i] = static_cast<int32_t>(place_of(best_[i]));
  }

  void write() {
    int64_t left = 0;
    for (int64_t i = 0; i < best_count_; ++i) {
      const int64_t* const end = excluded_ + options_.excluded_count;
      if (std::find(excluded_, end, lists_.ids[positions_[i]]) != end) continue;
      best_[left++] = key_of(scored_[i], static_cast<uint32_t>(positions_[i]));
    }
    const int64_t wanted = std::min(left, options_.k);
    std::partial_sort(best_, best_ + wanted, best_ + left, std::greater<>());
    for (int64_t i = 0; i < options_.k; ++i) {
      scores_[i] = i < wanted ? score_of(best_[i]) : -std::numeric_limits<float>::infinity();
      ids_[i] = i < wanted ? lists_.ids[place_of(best_[i])] : -1;
    }
  }

  const ListsSource& lists_;
  const std::vector<List>& list_;
  const SearchKernels& kernels_;
  const float *query_, *near_;
  const int64_t* excluded_;
  const SearchOptions& options_;
  int seats_;
  Workspace& workspace_;
  float* scores_;
  int64_t* ids_;

  Table table_{};
  uint64_t* order_;  // lists, the nearest first
  int64_t per_seat_, room_;
  Found* found_;
  std::atomic<float> threshold_{-std::numeric_limits<float>::infinity()};
  uint64_t* best_;
  int64_t best_count_ = 0;
  int32_t* positions_;
  float* scored_;
  Phases* phases_;
};

void Searcher::search(const float* queries, int64_t n, const SearchOptions& given, float* scores, int64_t* ids) const {
  const ThreadCount count(given.threads);
  SearchOptions options = given;
  options.nprobe = std::min(options.nprobe, lists_.nlist);
  options.candidates = std::min(std::max(options.candidates, options.k + options.excluded_count), lists_.rows);
  std::unique_ptr<Workspace> workspace = idle_.take();
  const size_t before = workspace->mark();
  for (int64_t first = 0; first < n; first += queries_at_once) {
    const int64_t some = std::min(queries_at_once, n - first), dim = lists_.dim;
    auto* const rotated = static_cast<float*>(workspace->take(static_cast<size_t>(some * dim) * sizeof(float)));
    auto* const near = static_cast<float*>(workspace->take(static_cast<size_t>(some * lists_.nlist) * sizeof(float)));
    std::copy_n(queries + first * dim, some * dim, rotated);
    for (int64_t i = 0; i < some; ++i) active_kernels().search.rotate({dim, lists_.signs}, rotated + i * dim);
    centroids_->run(rotated, some, near, 0, nullptr);
    const auto one = [&](int64_t i, int seats) {
      answer(rotated + i * dim, near + i * lists_.nlist, first + i, options, seats, scores, ids);
    };
    if (some > 1)
      job(some, [&](int64_t i) { one(i, 1); });
    else
      one(0, threads_of_job());
    workspace->release(before);
  }
  idle_.give(std::move(workspace));
}

void Searcher::answer(const float* query, const float* near, int64_t row, const SearchOptions& options, int seats,
                      float* scores, int64_t* ids) const {
  std::unique_ptr<Workspace> workspace = idle_.take();
  const size_t before = workspace->mark();
  {
    Query one(*this, query, near, options.excluded + row * options.excluded_count, options, seats, *workspace,
              scores + row * options.k, ids + row * options.k);
    const ThreadCount of_job(seats);
    if (seats > 1)
      job(seats, [&](int64_t) { one.work(seat_of_thread() % seats); });
    else
      one.work(0);
  }
  workspace->release(before);
  idle_.give(std::move(workspace));
}

}  // namespace fastlvm
