// Small drawn inverted-list indexes, searched with every instruction set that runs here: the kernels and whole searches
// against plain double precision, on several threads and by several callers at once, in memory that ends where the
// arrays do. The targets test-sanitize and test-arm of the Makefile build and run it:
//   searches [CASES]      that many indexes
//   searches CASES SEED   from this seed on
#include <cstdio>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <thread>

#include "arrays.h"
#include "common/dispatch.h"
#include "common/threads.h"
#include "search/searcher.h"

using namespace fastlvm;
using namespace fastlvm::test;

constexpr double eps = std::numeric_limits<float>::epsilon();
constexpr int64_t queries = 70, scored = 3;  // centroids for every list that is searched

static int failures = 0;

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

struct Found {
  std::vector<float> scores;
  std::vector<int64_t> ids;
  bool operator==(const Found&) const = default;

  Found part(int64_t first, int64_t count, int64_t k) const {
    return {{scores.begin() + first * k, scores.begin() + (first + count) * k},
            {ids.begin() + first * k, ids.begin() + (first + count) * k}};
  }
};

static std::vector<int64_t> draw_sizes(Draws& draw, bool large) {
  const int64_t nlist = large ? draw.pick("lists of a large one", {2, 300}) : draw.pick("lists", {1, 2, 3, 7, 20});
  std::vector<int64_t> sizes;
  for (int64_t l = 0; l < nlist; ++l)
    sizes.push_back(large ? draw.below(3) : draw.pick("size", {0, 0, 1, 5, 31, 32, 33, 64, 65}));
  if (large) sizes[static_cast<size_t>(draw.below(nlist))] = draw.pick("large size", {1023, 1025, 2100});
  if (std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == 0) sizes[0] = 1;
  return sizes;
}

class Case {
 public:
  Case(uint64_t seed, Coverage& coverage)
      : seed_(seed),
        draw_(seed, &coverage),
        large_(draw_.pick("large", {0, 0, 0, 0, 1}) != 0),
        dim_(large_ ? draw_.pick("dim of a large one", {1, 7, 16, 33})
                    : draw_.pick("dim", {1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 48, 64, 79, 100, 130})),
        sizes_(draw_, draw_sizes(draw_, large_)),
        rows_(std::accumulate(sizes_.data(), sizes_.data() + sizes_.count(), int64_t{0})),
        signs_(draw_, rotation_rounds * dim_, [&] { return draw_.below(2) ? 1 : -1; }),
        centroids_(draw_, nlist() * dim_, [&] { return draw_.below(255) - 127; }),
        centroid_scales_(draw_, nlist(), [&] { return 0.01 * draw_.uniform(); }),
        level_(draw_, 1, [&] { return 0.5 + draw_.uniform(); }),
        bits_(draw_, blocks() * columns() * block_rows, [&] { return draw_.next() >> 56; }),  // of no rows as well
        factors_(draw_, rows_, [&] { return draw_.below(8) ? draw_.uniform() : 0; }),
        codes_(draw_, rows_ * dim_, [&] { return draw_.below(255) - 127; }),
        scales_(draw_, rows_, [&] { return 0.01 * draw_.uniform(); }),
        ids_(draw_, rows_, [i = 0]() mutable { return i++; }),
        queries_(draw_, queries * dim_, [&] { return draw_.normal(); }) {
    for (int64_t i = rows_ - 1; i > 0; --i) std::swap(ids_[i], ids_[draw_.below(i + 1)]);
    for (int64_t l = 0; l < nlist(); ++l)
      for (int64_t i = 0; i < sizes_[l]; ++i) list_.push_back(l);
    place_.resize(static_cast<size_t>(rows_));
    for (int64_t i = 0; i < rows_; ++i) place_[static_cast<size_t>(ids_[i])] = i;
  }

  void run() {
    const Searcher searcher(source());
    for (const std::string& isa : available_isas()) {
      set_isa(isa);
      isa_ = isa;
      kernels();
      everything(searcher);
      nearest_lists(searcher);
      best_estimates(searcher);
      alone_or_together(searcher);
      exclusions(searcher);
    }
  }

 private:
  struct Estimate {
    double value, off;
  };

  int64_t nlist() const { return sizes_.count(); }
  int64_t pairs() const { return Searcher::pairs_of(dim_); }
  int64_t columns() const { return 2 * pairs(); }
  int64_t blocks() const {
    int64_t count = 0;
    for (int64_t l = 0; l < nlist(); ++l) count += blocks_of(sizes_[l]);
    return count;
  }
  static int64_t blocks_of(int64_t rows) { return (rows + block_rows - 1) / block_rows; }

  ListsSource source() const {
    return {dim_,          nlist(),       rows_,        signs_.data(),   centroids_.data(), centroid_scales_.data(),
            level_.data(), sizes_.data(), bits_.data(), factors_.data(), codes_.data(),     scales_.data(),
            ids_.data()};
  }

  // -- Plain arithmetic.

  std::vector<float> rotated(int64_t query) {
    Numbers<float> moved(draw_, queries_.data() + query * dim_, dim_);
    active_kernels().search.rotate({dim_, signs_.data()}, moved.data());
    return moved.values();
  }

  // <q, sign r> of a row; bit i of its code is coordinate i.
  double signed_sum(const std::vector<float>& q, int64_t row) const {
    int64_t first = 0, block = 0;
    for (int64_t l = 0; l < list_[static_cast<size_t>(row)]; ++l) first += sizes_[l], block += blocks_of(sizes_[l]);
    const int64_t at = row - first;
    const uint8_t* const bits = bits_.data() + (block + at / block_rows) * columns() * block_rows + at % block_rows;
    double sum = 0;
    for (int64_t i = 0; i < dim_; ++i) sum += bits[i / 8 * block_rows] >> i % 8 & 1 ? q[i] : -double{q[i]};
    return sum;
  }

  double score(const std::vector<float>& q, int64_t row, double& off) const {
    double sum = 0, all = 0;
    for (int64_t i = 0; i < dim_; ++i) {
      const double term = double{q[i]} * codes_[row * dim_ + i] * scales_[row];
      sum += term, all += std::fabs(term);
    }
    off = (dim_ + 2) * eps * all;
    return sum;
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

  // -- The kernels.

  void kernels() {
    const SearchKernels& kernel = active_kernels().search;
    const std::vector<float> q = rotated(0);
    rotation(q);
    Numbers<float> query(draw_, q.data(), dim_);
    Numbers<uint8_t> entries(draw_, pairs() * 128);
    Table table{entries.data(), 0, 0};
    kernel.fill(query.data(), dim_, pairs(), table);
    entries_of(q, table);
    int64_t first = 0, block = 0;
    for (int64_t l = 0; l < nlist(); first += sizes_[l], block += blocks_of(sizes_[l]), ++l)
      list(kernel, q, table, first, block, sizes_[l]);
    Numbers<int32_t> positions(draw_, std::min<int64_t>(rows_, 40), [&] { return draw_.below(rows_); });
    for (const int64_t count : {int64_t{0}, int64_t{1}, positions.count()}) {
      Numbers<float> scores(draw_, count);
      kernel.score({dim_, count, query.data(), codes_.data(), scales_.data(), positions.data(), scores.data()});
      for (int64_t i = 0; i < count; ++i) {
        double off;
        const double want = score(q, positions[i], off);
        expect(std::fabs(scores[i] - want) <= off, "a score by int8 codes");
      }
    }
  }

  // Each level of a transform rounds a vector by half of eps, and dividing by the root by as much as two more.
  void rotation(const std::vector<float>& got) {
    std::vector<double> x(queries_.data(), queries_.data() + dim_);
    int64_t size = 1, levels = 0;
    while (2 * size <= dim_) size *= 2, ++levels;
    double length = 0, off = 0;
    for (const double v : x) length += v * v;
    for (int64_t round = 0; round < rotation_rounds; ++round) {
      for (int64_t i = 0; i < dim_; ++i) x[i] *= signs_[round * dim_ + i];
      double* const part = x.data() + (round % 2 ? dim_ - size : 0);
      std::vector<double> sums(static_cast<size_t>(size));
      for (int64_t i = 0; i < size; ++i)
        for (int64_t k = 0; k < size; ++k) sums[i] += __builtin_parityll(i & k) ? -part[k] : part[k];
      for (int64_t i = 0; i < size; ++i) part[i] = sums[i] / std::sqrt(static_cast<double>(size));
    }
    for (int64_t i = 0; i < dim_; ++i) off += (got[i] - x[i]) * (got[i] - x[i]);
    const double allowed = rotation_rounds * static_cast<double>(levels + 3) * eps / 2;
    expect(std::sqrt(off) <= allowed * std::sqrt(length), "the rotation");
  }

  // The sum of the coordinates that four bits select, above the least, in whole steps.
  void entries_of(const std::vector<float>& q, const Table& table) {
    double base = 0, most = 0;
    for (const float x : q) base -= std::fabs(double{x});
    expect(std::fabs(table.base - base) <= (dim_ + 4) * -base * eps, "the base of a table");
    for (int64_t g = 0; g < 4 * pairs(); ++g) {
      double size = 0;
      for (int64_t i = 4 * g; i < std::min(4 * g + 4, dim_); ++i) size += std::fabs(double{q[i]});
      most = std::max(most, size);
    }
    const double step = 2 * most / static_cast<double>(std::min<int64_t>(63, 65535 / (4 * pairs())));
    expect(std::fabs(table.step - step) <= 8 * eps * step, "the step of a table");
    for (int64_t g = 0; g < 4 * pairs(); ++g)
      for (int code = 0; code < 16; ++code) {
        double sum = 0;
        for (int j = 0; j < 4; ++j) {
          const double x = 4 * g + j < dim_ ? q[4 * g + j] : 0;
          sum += code >> j & 1 ? std::max(x, 0.0) : std::max(-x, 0.0);
        }
        const uint8_t* const at = table.entries + g / 4 * 128 + g % 2 * 64 + g / 2 % 2 * 32 + code;
        expect(at[0] == at[16] && std::fabs(at[0] - 2 * sum / step) <= 0.5 + 512 * eps, "an entry of a table");
      }
  }

  void list(const SearchKernels& kernel, const std::vector<float>& q, const Table& table, int64_t first, int64_t block,
            int64_t rows) {
    const Numbers<float> factors(draw_, factors_.data() + first, rows);
    const int64_t block_bytes = columns() * block_rows, room = blocks_of(rows) * block_rows;
    const Numbers<uint8_t> bits(draw_, bits_.data() + block * block_bytes, blocks_of(rows) * block_bytes);
    const auto scan = [&](float threshold, const Numbers<float>& scores, const Numbers<int32_t>& positions) {
      return kernel.scan({rows, pairs(), bits.data(), factors.data(), bits.data(), factors.data(), table, 0.25f,
                          threshold, static_cast<int32_t>(first), scores.data(), positions.data()});
    };
    const Numbers<float> all(draw_, room), some(draw_, room);
    const Numbers<int32_t> every(draw_, room), which(draw_, room);
    if (!expect(scan(-std::numeric_limits<float>::infinity(), all, every) == rows, "all rows are kept")) return;
    const double off = table_off(q);
    for (int64_t i = 0; i < rows; ++i) {
      const double want = 0.25 + factors[i] * signed_sum(q, first + i);
      expect(every[i] == first + i && std::fabs(all[i] - want) <= factors[i] * off + 2 * eps * std::fabs(want),
             "an estimate");
    }
    for (int64_t at = 0; at < rows; at += 1 + rows / 3) {
      const int64_t kept = scan(all[at], some, which);
      int64_t good = 0;
      for (int64_t i = 0; i < rows; ++i)
        if (all[i] >= all[at] && good < kept && some[good] == all[i] && which[good] == every[i]) ++good;
      expect(
          good == kept && kept == std::count_if(all.data(), all.data() + rows, [&](float x) { return x >= all[at]; }),
          "rows that reach a threshold");
    }
  }

  // -- Whole searches.

  Found search(const Searcher& searcher, int64_t first, int64_t n, int64_t k, int64_t nprobe, int64_t candidates,
               int threads, const std::vector<int64_t>& excluded = {}) {
    const Numbers<float> given(draw_, queries_.data() + first * dim_, n * dim_), scores(draw_, n * k);
    const Numbers<int64_t> ids(draw_, n * k), out(draw_, excluded.data(), static_cast<int64_t>(excluded.size()));
    const int64_t each = n > 0 ? out.count() / n : 0;
    searcher.search(given.data(), n, {k, nprobe, candidates, out.data(), each, threads}, scores.data(), ids.data());
    return {scores.values(), ids.values()};
  }

  // All rows, scored and in order.
  void everything(const Searcher& searcher) {
    const int64_t k = rows_ + 2;
    const Found found = search(searcher, 0, 2, k, nlist(), rows_, 3);
    for (int64_t query = 0; query < 2; ++query) {
      const std::vector<float> q = rotated(query);
      const float* const scores = found.scores.data() + query * k;
      const int64_t* const ids = found.ids.data() + query * k;
      expect(std::set<int64_t>(ids, ids + rows_).size() == static_cast<size_t>(rows_), "every row once");
      expect(std::is_sorted(scores, scores + k, std::greater<>()), "the best first");
      for (int64_t i = 0; i < rows_; ++i) {
        if (!expect(ids[i] >= 0 && ids[i] < rows_, "an id")) return;
        double off;
        const double want = score(q, place_[static_cast<size_t>(ids[i])], off);
        expect(std::fabs(scores[i] - want) <= off, "the score of a row");
      }
      for (int64_t i = rows_; i < k; ++i) expect(ids[i] == -1 && scores[i] < -1e38f, "nothing beyond the rows");
    }
  }

  void nearest_lists(const Searcher& searcher) {
    for (int64_t query = 0; query < 8; ++query) {
      const int64_t nprobe = query % 2 ? (nlist() + 7) / 8 : 1;
      const Found found = search(searcher, query, 1, rows_, nprobe, rows_, static_cast<int>(1 + query % 3));
      std::vector<int64_t> rows(static_cast<size_t>(nlist()));
      for (const int64_t id : found.ids)
        if (id >= 0) ++rows[static_cast<size_t>(list_[static_cast<size_t>(place_[static_cast<size_t>(id)])])];
      int64_t probed = 0, empty = 0;
      for (int64_t l = 0; l < nlist(); ++l) {
        const int64_t count = rows[static_cast<size_t>(l)];
        expect(count == 0 || count == sizes_[l], "lists are searched whole");
        probed += count > 0, empty += sizes_[l] == 0;
      }
      expect(probed <= nprobe && probed + empty >= nprobe, "as many lists as are asked for");
      nearest(rotated(query), rows, scored * nprobe);
    }
  }

  // A list that is searched can be among the best estimates, and one that is nearer than it and is not can be beyond.
  void nearest(const std::vector<float>& q, const std::vector<int64_t>& rows, int64_t scored_lists) {
    const std::vector<Estimate> estimates = near_estimates(q);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t l = 0; l < nlist(); ++l)
      if (rows[static_cast<size_t>(l)] > 0) least = std::min(least, near(q, l).value + near(q, l).off);
    for (int64_t l = 0; l < nlist(); ++l) {
      const Estimate mine = estimates[static_cast<size_t>(l)], score = near(q, l);
      int64_t above = 0, perhaps = -1;
      for (const Estimate& e : estimates) {
        above += e.value - e.off > mine.value + mine.off;
        perhaps += e.value + e.off >= mine.value - mine.off;
      }
      if (rows[static_cast<size_t>(l)] > 0)
        expect(above < scored_lists, "a list among the best estimates");
      else if (sizes_[l] > 0 && score.value - score.off > least)
        expect(perhaps >= scored_lists, "the nearest lists");
    }
  }

  void best_estimates(const Searcher& searcher) {
    const std::vector<float> q = rotated(0);
    const double table = table_off(q);
    for (const int64_t candidates : {int64_t{1}, std::min<int64_t>(rows_, 9), std::min<int64_t>(rows_, 50)})
      for (const int threads : {1, 4}) {
        const Found found = search(searcher, 0, 1, candidates, nlist(), candidates, threads);
        const std::set<int64_t> taken(found.ids.begin(), found.ids.end());
        expect(taken.size() == static_cast<size_t>(candidates) && !taken.count(-1), "as many as are asked for");
        double least = std::numeric_limits<double>::infinity(), most = -least;
        for (int64_t row = 0; row < rows_; ++row) {
          const Estimate c = near(q, list_[static_cast<size_t>(row)]);
          const double value = level_[0] * c.value + factors_[row] * signed_sum(q, row);
          const double off = level_[0] * c.off + factors_[row] * table + 4 * eps * std::fabs(value);
          if (taken.count(ids_[row]))
            least = std::min(least, value + off);
          else
            most = std::max(most, value - off);
        }
        expect(least >= most, "candidates are the best by the estimate");
      }
  }

  // A result depends on its query alone, to the last bit.
  void alone_or_together(const Searcher& searcher) {
    const int64_t k = std::min<int64_t>(rows_, 5), nprobe = (nlist() + 1) / 2;
    const Found want = search(searcher, 0, queries, k, nprobe, 7, 1);
    for (const int threads : {2, 3, 4}) {
      expect(search(searcher, 0, queries, k, nprobe, 7, threads) == want, "a batch on several threads");
      for (const int64_t i : {int64_t{0}, queries - 1})
        expect(search(searcher, i, 1, k, nprobe, 7, threads) == want.part(i, 1, k), "a query alone");
    }
    expect(search(searcher, 3, 0, k, nprobe, 7, 2).ids.empty(), "no queries");
    constexpr int callers = 3;
    std::vector<std::thread> threads;
    Draws draws[callers] = {Draws(seed_), Draws(seed_ + 1), Draws(seed_ + 2)};
    bool good[callers] = {true, true, true};
    for (int caller = 0; caller < callers; ++caller)
      threads.emplace_back([&, caller] {
        for (int64_t turn = 0; turn < 4; ++turn) {
          const int64_t n = 1 + turn % 2 * (caller + 1), first = 5 * caller + turn;
          const Numbers<float> given(draws[caller], queries_.data() + first * dim_, n * dim_);
          const Numbers<float> scores(draws[caller], n * k);
          const Numbers<int64_t> ids(draws[caller], n * k);
          searcher.search(given.data(), n, {k, nprobe, 7, nullptr, 0, 1 + caller}, scores.data(), ids.data());
          good[caller] = good[caller] && Found{scores.values(), ids.values()} == want.part(first, n, k);
        }
      });
    for (std::thread& thread : threads) thread.join();
    for (const bool each : good) expect(each, "several callers at once");
  }

  void exclusions(const Searcher& searcher) {
    const int64_t k = std::min<int64_t>(rows_, 4), most = std::min<int64_t>(rows_, 11);
    const Found whole = search(searcher, 0, 2, most, nlist(), 20, 1);
    std::vector<int64_t> excluded;
    for (int64_t query = 0; query < 2; ++query) {
      for (int64_t i = 0; i < most - k; ++i) excluded.push_back(whole.ids[query * most + draw_.below(most)]);
      excluded.push_back(-1);
    }
    const int64_t each = most - k + 1;
    const Found found = search(searcher, 0, 2, k, nlist(), 20, 2, excluded);
    for (int64_t query = 0; query < 2; ++query) {
      std::vector<int64_t> want;
      for (int64_t i = query * most; i < (query + 1) * most; ++i) {
        const auto begin = excluded.begin() + query * each, end = begin + each;
        if (std::find(begin, end, whole.ids[i]) == end) want.push_back(whole.ids[i]);
      }
      want.resize(static_cast<size_t>(k));
      expect(found.part(query, 1, k).ids == want, "what filtering would leave");
    }
    const Found best = search(searcher, 0, 1, most, nlist(), most, 1);
    const std::vector<int64_t> but(best.ids.begin(), best.ids.end() - k);
    expect(
        search(searcher, 0, 1, k, nlist(), 1, 2, but).ids == std::vector<int64_t>(best.ids.end() - k, best.ids.end()),
        "as many candidates as are left out, and k");
    std::vector<int64_t> all(static_cast<size_t>(rows_));
    std::iota(all.begin(), all.end(), 0);
    for (const int64_t id : search(searcher, 0, 1, k, nlist(), 20, 2, all).ids) expect(id == -1, "all are left out");
  }

  bool expect(bool good, const char* what) {
    if (good) return true;
    std::fprintf(stderr, "failed: index %llu %s %s  (%s)\n", static_cast<unsigned long long>(seed_), isa_.c_str(), what,
                 draw_.text().c_str());
    ++failures;
    return false;
  }

  uint64_t seed_;
  Draws draw_;
  bool large_;
  int64_t dim_;
  Numbers<int64_t> sizes_;
  int64_t rows_;
  Numbers<float> signs_;
  Numbers<int8_t> centroids_;
  Numbers<float> centroid_scales_;
  Numbers<float> level_;
  Numbers<uint8_t> bits_;
  Numbers<float> factors_;
  Numbers<int8_t> codes_;
  Numbers<float> scales_;
  Numbers<int32_t> ids_;
  Numbers<float> queries_;
  std::vector<int64_t> list_, place_;  // of a position, and of an id
  std::string isa_;
};

// Sizes that do not fit leave an exception and no memory.
static void refuses(std::initializer_list<int64_t> given) {
  const std::vector<float> numbers(64);
  const std::vector<int8_t> codes(64);
  const std::vector<int32_t> ids(8);
  const std::vector<uint8_t> bits(8 * 64);
  const std::vector<int64_t> sizes(given);
  try {
    const Searcher searcher({4, static_cast<int64_t>(sizes.size()), 8, numbers.data(), codes.data(), numbers.data(),
                             numbers.data(), sizes.data(), bits.data(), numbers.data(), codes.data(), numbers.data(),
                             ids.data()});
  } catch (const std::invalid_argument&) {
    return;
  }
  std::fprintf(stderr, "failed: sizes of other rows are taken\n");
  ++failures;
}

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  refuses({4, 3}), refuses({4, 5}), refuses({-1, 9}), refuses({9, -1}), refuses({most, most, 10}), refuses({0});
  Coverage coverage;
  for (uint64_t seed = first; seed < first + cases; ++seed) Case(seed, coverage).run();
  for (const auto& [what, values] : coverage)
    for (const auto& [value, times] : values)
      if (times == 0 && cases >= 40) {
        std::fprintf(stderr, "failed: no index has %s = %lld, ask for more\n", what.c_str(),
                     static_cast<long long>(value));
        ++failures;
      }
  shutdown_threads();
  std::printf("%s: %llu indexes with", failures ? "failed" : "ok", static_cast<unsigned long long>(cases));
  for (const std::string& isa : available_isas()) std::printf(" %s", isa.c_str());
  std::printf("\n");
  return failures > 0;
}
