#include "search/searcher.h"

#include <algorithm>
#include <cmath>
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
// Centroids that are scored for every list that is probed: by estimates alone a list too many would be missed.
constexpr int64_t centroids_scored = 3;

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
  const int64_t dim = lists_.dim, nlist = lists_.nlist, columns = 2 * pairs_of(dim);
  std::vector<float> mean(static_cast<size_t>(dim));
  const auto at = [&](int64_t l, int64_t i) {
    return static_cast<float>(lists_.centroids[l * dim + i]) * lists_.centroid_scales[l];
  };
  for (int64_t l = 0; l < nlist; ++l)
    for (int64_t i = 0; i < dim; ++i) mean[static_cast<size_t>(i)] += at(l, i) / static_cast<float>(nlist);
  centroid_bits_.assign(static_cast<size_t>((nlist + block_rows - 1) / block_rows * columns * block_rows), 0);
  centroid_factors_.resize(static_cast<size_t>(nlist));
  for (int64_t l = 0; l < nlist; ++l) {
    float square = 0, size = 0;
    uint8_t* const bits = &centroid_bits_[static_cast<size_t>(l / block_rows * columns * block_rows + l % block_rows)];
    for (int64_t i = 0; i < dim; ++i) {
      const float r = at(l, i) - mean[static_cast<size_t>(i)];
      square += r * r, size += std::fabs(r);
      if (r > 0) bits[i / 8 * block_rows] |= static_cast<uint8_t>(1 << i % 8);
    }
    centroid_factors_[static_cast<size_t>(l)] = size > 0 ? square / size : 0.0f;
  }
}

// One query, answered by a team that goes through it in phases.
class Searcher::Query {
 public:
  Query(const Searcher& searcher, const float* query, const int64_t* excluded, const SearchOptions& options, int seats,
        Workspace& workspace, float* scores, int64_t* ids)
      : searcher_(searcher),
        lists_(searcher.lists_),
        query_(query),
        excluded_(excluded),
        options_(options),
        seats_(seats),
        centroids_{lists_.dim,
                   pairs_of(lists_.dim),
                   lists_.nlist,
                   searcher.centroid_bits_.data(),
                   searcher.centroid_factors_.data(),
                   lists_.centroids,
                   lists_.centroid_scales},
        rows_{lists_.dim, centroids_.pairs, lists_.rows, lists_.bits, lists_.factors, lists_.codes, lists_.scales},
        near_(centroids_, kernels_, seats, std::min(lists_.nlist, centroids_scored * options.nprobe), workspace),
        best_(rows_, kernels_, seats, options.candidates, workspace),
        scores_(scores),
        ids_(ids) {
    table_.entries = static_cast<uint8_t*>(workspace.take(static_cast<size_t>(centroids_.pairs * 128)));
    kernels_.fill(query_, lists_.dim, centroids_.pairs, table_);
    per_seat_ = (options_.nprobe + seats_ - 1) / seats_;
    const int64_t parts[] = {(lists_.nlist + centroids_at_once - 1) / centroids_at_once,
                             1,
                             near_.parts(),
                             1,
                             per_seat_ * seats_,
                             1,
                             best_.parts(),
                             1};
    phases_ =
        new (workspace.take(sizeof(Phases))) Phases(workspace.take(Phases::bytes(count, seats)), seats, parts, count);
  }

  void work(int seat) {
    each(scan_centroids, seat, [&](int64_t part) {
      const int64_t first = part * centroids_at_once, rows = std::min(centroids_at_once, lists_.nlist - first);
      near_.scan(seat, table_, {first, rows, first / block_rows}, 0, {first + rows, 0, (first + rows) / block_rows});
    });
    each(gather_centroids, seat, [&](int64_t) { near_.gather(); });
    each(score_centroids, seat, [&](int64_t part) { near_.score(part, query_); });
    each(order_lists, seat, [&](int64_t) { probed_ = near_.order(options_.nprobe, [](int32_t) { return false; }); });
    each(scan, seat, [&](int64_t part) {
      const int64_t turn = part % per_seat_ * seats_ + part / per_seat_;  // the nearest lists go to all seats
      if (turn >= probed_) return;
      best_.scan(seat, table_, list(turn), *lists_.level * score_of(near_[turn]),
                 list(std::min(turn + seats_, probed_ - 1)));
    });
    each(gather, seat, [&](int64_t) { best_.gather(); });
    each(score, seat, [&](int64_t part) { best_.score(part, query_); });
    each(finish, seat, [&](int64_t) { write(); });
  }

 private:
  enum { scan_centroids, gather_centroids, score_centroids, order_lists, scan, gather, score, finish, count };

  template <class F>
  void each(int phase, int seat, F f) {
    int64_t done = 0;
    for (int64_t part; (part = phases_->claim(phase, seat)) >= 0; ++done) f(part);
    phases_->finish(phase, done);
  }

  const RowSpan& list(int64_t turn) const { return searcher_.list_[place_of(near_[turn])]; }

  void write() {
    const int64_t* const end = excluded_ + options_.excluded_count;
    const int64_t found = best_.order(options_.k, [&](int32_t position) {
      return std::find(excluded_, end, static_cast<int64_t>(lists_.ids[position])) != end;
    });
    for (int64_t i = 0; i < options_.k; ++i) {
      scores_[i] = i < found ? score_of(best_[i]) : -std::numeric_limits<float>::infinity();
      ids_[i] = i < found ? lists_.ids[place_of(best_[i])] : -1;
    }
  }

  const Searcher& searcher_;
  const ListsSource& lists_;
  const SearchKernels& kernels_ = active_kernels().search;
  const float* query_;
  const int64_t* excluded_;
  const SearchOptions& options_;
  int seats_;
  Coded centroids_, rows_;
  Ranking near_, best_;  // of the centroids, and of the rows
  float* scores_;
  int64_t* ids_;

  Table table_{};
  int64_t per_seat_, probed_ = 0;
  Phases* phases_;
};

void Searcher::search(const float* queries, int64_t n, const SearchOptions& given, float* scores, int64_t* ids) const {
  const ThreadCount count(given.threads);
  SearchOptions options = given;
  options.nprobe = std::min(options.nprobe, lists_.nlist);
  options.candidates = std::min(std::max(options.candidates, options.k + options.excluded_count), lists_.rows);
  const int seats = n > 1 ? 1 : threads_of_job();
  const auto one = [&](int64_t i) {
    answer(queries + i * lists_.dim, options.excluded + i * options.excluded_count, options, seats,
           scores + i * options.k, ids + i * options.k);
  };
  if (n > 1)
    job(n, one);
  else if (n == 1)
    one(0);
}

void Searcher::answer(const float* query, const int64_t* excluded, const SearchOptions& options, int seats,
                      float* scores, int64_t* ids) const {
  std::unique_ptr<Workspace> workspace = idle_.take();
  const size_t before = workspace->mark();
  auto* const rotated = static_cast<float*>(workspace->take(static_cast<size_t>(lists_.dim) * sizeof(float)));
  std::copy_n(query, lists_.dim, rotated);
  active_kernels().search.rotate({lists_.dim, lists_.signs}, rotated);
  {
    Query team(*this, rotated, excluded, options, seats, *workspace, scores, ids);
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
