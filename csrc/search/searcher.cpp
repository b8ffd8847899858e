#include "search/searcher.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "common/dispatch.h"
#include "common/phases.h"
#include "common/threads.h"
#include "search/ranking.h"

namespace fastlvm {
namespace {

constexpr int64_t centroids_at_once = 256;
// Centroids that are scored for every four lists that are probed: by estimates alone a list too many would be missed.
constexpr int64_t centroids_scored = 5;
constexpr int64_t most_unsorted = 1 << 14;  // centroids
constexpr int64_t lists_in_order = 32;      // the nearest, whose rows make a threshold for the others
constexpr int64_t rows_of_own = 8;          // that a vector of SearchOptions::own may have
// Six standard deviations of what rounding a code's components to whole steps does to its score with a vector of
// length 1, in steps.
constexpr float rounding = 1.7320508f;

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
  code_centroids();
}

// Codes of the centroids as if they were the rows of one list, whose <q, c> is the same for all and left out.
void Searcher::code_centroids() {
  const int64_t dim = lists_.dim, nlist = lists_.nlist, pairs = pairs_of(dim);
  std::vector<float> mean(static_cast<size_t>(dim));
  const auto at = [&](int64_t l, int64_t i) {
    return static_cast<float>(lists_.centroids[l * dim + i]) * lists_.centroid_scales[l];
  };
  for (int64_t l = 0; l < nlist; ++l)
    for (int64_t i = 0; i < dim; ++i) mean[static_cast<size_t>(i)] += at(l, i) / static_cast<float>(nlist);
  centroid_blocks_.assign(static_cast<size_t>((nlist + block_rows - 1) / block_rows * bytes_of_block(pairs)), 0);
  for (int64_t l = 0; l < nlist; ++l) {
    float square = 0, size = 0;
    uint8_t* const block = &centroid_blocks_[static_cast<size_t>(l / block_rows * bytes_of_block(pairs))];
    for (int64_t i = 0; i < dim; ++i) {
      const float r = at(l, i) - mean[static_cast<size_t>(i)];
      square += r * r, size += std::fabs(r);
      if (r > 0) block[i / 8 * block_rows + l % block_rows] |= static_cast<uint8_t>(1 << i % 8);
    }
    const float factor = size > 0 ? square / size : 0.0f;
    std::memcpy(block + code_bytes(pairs) + l % block_rows * sizeof factor, &factor, sizeof factor);
  }
}

// One query, answered by a team that goes through it in phases.
class Searcher::Query {
 public:
  // The query and options.own are rotated.
  Query(const Searcher& searcher, const float* query, const SearchOptions& options, int seats, Workspace& workspace,
        float* scores, int64_t* ids)
      : searcher_(searcher),
        lists_(searcher.lists_),
        query_(query),
        options_(options),
        seats_(seats),
        centroids_{lists_.dim,       pairs_of(lists_.dim),  lists_.nlist, 0, searcher.centroid_blocks_.data(),
                   lists_.centroids, lists_.centroid_scales},
        rows_{lists_.dim, centroids_.pairs, lists_.rows, options.tail, lists_.blocks, lists_.codes, lists_.scales},
        near_(centroids_, kernels_, seats, scored(options.nprobe, lists_.nlist),
              std::max(most_unsorted, 2 * scored(options.nprobe, lists_.nlist)), workspace),
        best_(rows_, kernels_, seats, options.candidates, 2 * options.candidates, workspace),
        scores_(scores),
        ids_(ids) {
    table_.entries = static_cast<uint8_t*>(workspace.take(static_cast<size_t>(centroids_.pairs * 128)));
    kernels_.fill(query_, lists_.dim, centroids_.pairs, table_);
    checked_ = options.own_count > 0 ? options.k + rows_of_own * options.own_count : 0;
    likeness_ =
        static_cast<float*>(workspace.take(static_cast<size_t>((checked_ + 1) * options.own_count) * sizeof(float)));
    per_seat_ = (options_.nprobe + seats_ - 1) / seats_;
    const int64_t parts[] = {(lists_.nlist + centroids_at_once - 1) / centroids_at_once,
                             1,
                             near_.parts(),
                             1,
                             (options.tail + Ranking::at_once - 1) / Ranking::at_once,
                             per_seat_ * seats_,
                             1,
                             best_.parts(),
                             1};
    phases_ =
        new (workspace.take(sizeof(Phases))) Phases(workspace.take(Phases::bytes(count, seats)), seats, parts, count);
  }

  void work(int seat) {
    const auto settle = [&](Ranking& ranking) { return [&, seat] { ranking.settle(seat); }; };
    each(
        scan_centroids, seat,
        [&](int64_t part) {
          const int64_t first = part * centroids_at_once, rows = std::min(centroids_at_once, lists_.nlist - first);
          near_.scan(seat, table_, {first, rows, first / block_rows}, 0,
                     {first + rows, 0, (first + rows) / block_rows});
        },
        settle(near_));
    each(gather_centroids, seat, [&](int64_t) { near_.gather(); });
    each(score_centroids, seat, [&](int64_t part) { near_.score(part, query_); });
    each(order_lists, seat,
         [&](int64_t) { probed_ = near_.order(options_.nprobe, lists_in_order, [](int32_t) { return false; }); });
    each(
        score_tail, seat,
        [&](int64_t part) {
          const int64_t first = part * Ranking::at_once;
          best_.score_exact(seat, query_, lists_.tail_codes + first * lists_.dim, lists_.tail_scales + first, first,
                            std::min(Ranking::at_once, options_.tail - first));
        },
        settle(best_));
    each(
        scan, seat,
        [&](int64_t part) {
          const int64_t turn = part % per_seat_ * seats_ + part / per_seat_;  // the nearest lists go to all seats
          if (turn >= probed_) return;
          best_.scan(seat, table_, list(turn), *lists_.level * score_of(near_[turn]),
                     list(std::min(turn + seats_, probed_ - 1)));
        },
        settle(best_));
    each(gather, seat, [&](int64_t) { best_.gather(); });
    each(score, seat, [&](int64_t part) { best_.score(part, query_); });
    each(finish, seat, [&](int64_t) { write(); });
  }

 private:
  enum {
    scan_centroids,
    gather_centroids,
    score_centroids,
    order_lists,
    score_tail,
    scan,
    gather,
    score,
    finish,
    count
  };

  static int64_t scored(int64_t nprobe, int64_t nlist) { return std::min(nlist, (centroids_scored * nprobe + 3) / 4); }

  template <class F, class Last>
  void each(int phase, int seat, F f, Last last) {
    int64_t done = 0;
    for (int64_t part; (part = phases_->claim(phase, seat)) >= 0; ++done) f(part);
    if (done > 0) last();  // nobody waits for a seat that did nothing
    phases_->finish(phase, done);
  }
  template <class F>
  void each(int phase, int seat, F f) {
    each(phase, seat, f, [] {});
  }

  const RowSpan& list(int64_t turn) const { return searcher_.list_[place_of(near_[turn])]; }

  void write() {
    const int64_t *const excluded = options_.excluded, *const end = excluded + options_.excluded_count;
    const auto id = [&](int64_t position) {
      return position < lists_.rows ? lists_.ids[position] : lists_.tail_first + position - lists_.rows;
    };
    const int64_t wanted = std::max(options_.k, checked_);
    const int64_t found = best_.order(wanted, wanted, [&](int32_t position) {
      return excluded != end && std::find(excluded, end, id(position)) != end;
    });
    const int64_t checked = std::min(found, checked_);
    compare(checked);
    int64_t kept = 0;
    for (int64_t i = 0; i < found && kept < options_.k; ++i) {
      if (i < checked && is_own(i, checked)) continue;
      scores_[kept] = score_of(best_[i]);
      ids_[kept++] = id(place_of(best_[i]));
    }
    for (; kept < options_.k; ++kept) scores_[kept] = -std::numeric_limits<float>::infinity(), ids_[kept] = -1;
  }

  float scale(int64_t i) const {
    const int64_t position = place_of(best_[i]);
    return position < lists_.rows ? lists_.scales[position] : lists_.tail_scales[position - lists_.rows];
  }

  // likeness_ [own_count, rows] of the first rows in order, and the best of each own_count.
  void compare(int64_t rows) {
    if (rows == 0) return;
    for (int64_t i = 0; i < rows; ++i) {
      int32_t position = static_cast<int32_t>(place_of(best_[i]));
      const bool late = position >= lists_.rows;
      if (late) position -= static_cast<int32_t>(lists_.rows);
      for (int64_t own = 0; own < options_.own_count; ++own)
        kernels_.score({lists_.dim, 1, 0, options_.own + own * lists_.dim, late ? lists_.tail_codes : lists_.codes,
                        late ? lists_.tail_scales : lists_.scales, &position, likeness_ + own * rows + i});
    }
    float* const best = likeness_ + options_.own_count * rows;
    for (int64_t own = 0; own < options_.own_count; ++own)
      best[own] = *std::max_element(likeness_ + own * rows, likeness_ + (own + 1) * rows);
  }

  bool is_own(int64_t i, int64_t rows) const {
    const float off = rounding * scale(i);
    const float* const best = likeness_ + options_.own_count * rows;
    for (int64_t own = 0; own < options_.own_count; ++own) {
      const float likeness = likeness_[own * rows + i];
      if (likeness >= options_.own_score - off && likeness >= best[own] - options_.own_tie - 2 * off) return true;
    }
    return false;
  }

  const Searcher& searcher_;
  const ListsSource& lists_;
  const SearchKernels& kernels_ = active_kernels().search;
  const float* query_;
  const SearchOptions& options_;
  int seats_;
  Coded centroids_, rows_;
  Ranking near_, best_;  // of the centroids, and of the rows
  float* scores_;
  int64_t* ids_;

  Table table_{};
  int64_t per_seat_, probed_ = 0;
  int64_t checked_;  // rows of the result that may be own ones
  float* likeness_;
  Phases* phases_;
};

void Searcher::search(const float* queries, int64_t n, const SearchOptions& given, float* scores, int64_t* ids) const {
  const ThreadCount count(given.threads);
  SearchOptions options = given;
  options.nprobe = std::min(options.nprobe, lists_.nlist);
  const int64_t left_out = options.excluded_count + rows_of_own * options.own_count;
  options.candidates =
      std::min(std::max(options.candidates, options.k + left_out), std::max<int64_t>(1, lists_.rows + options.tail));
  const int seats = n > 1 ? 1 : threads_of_job();
  const auto one = [&](int64_t i) {
    SearchOptions own = options;
    own.excluded += i * options.excluded_count, own.own += i * options.own_count * lists_.dim;
    answer(queries + i * lists_.dim, own, seats, scores + i * options.k, ids + i * options.k);
  };
  if (n > 1)
    job(n, one);
  else if (n == 1)
    one(0);
}

void Searcher::answer(const float* query, const SearchOptions& given, int seats, float* scores, int64_t* ids) const {
  std::unique_ptr<Workspace> workspace = idle_.take();
  const size_t before = workspace->mark();
  const int64_t dim = lists_.dim, vectors = 1 + given.own_count;
  auto* const rotated = static_cast<float*>(workspace->take(static_cast<size_t>(vectors * dim) * sizeof(float)));
  std::copy_n(query, dim, rotated);
  std::copy_n(given.own, given.own_count * dim, rotated + dim);
  for (int64_t i = 0; i < vectors; ++i) active_kernels().search.rotate({dim, lists_.signs, false}, rotated + i * dim);
  SearchOptions options = given;
  options.own = rotated + dim;
  {
    Query team(*this, rotated, options, seats, *workspace, scores, ids);
    const ThreadCount of_job(seats);
    if (seats > 1)
      job(seats, [&](int64_t) { team.work(seat_of_thread() % seats); });
    else
      team.work(0);
  }
  workspace->release(before);
  idle_.give(std::move(workspace));
}

}  // namespace fastlvm
