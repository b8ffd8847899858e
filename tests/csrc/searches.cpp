// Small drawn inverted-list indexes, searched with every instruction set that runs here: the kernels and whole searches
// against plain double precision, on several threads and by several callers at once, in memory that ends where the
// arrays do. The targets test-sanitize and test-arm of the Makefile build and run it:
//   searches [CASES]      that many indexes
//   searches CASES SEED   from this seed on
#include <cstdio>
#include <memory>
#include <set>
#include <thread>

#include "common/threads.h"
#include "drawn_lists.h"

using namespace fastlvm;
using namespace fastlvm::test;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t own_count = 2, rows_of_own = 8;

static int failures = 0;

struct Found {
  std::vector<float> scores;
  std::vector<int64_t> ids;
  bool operator==(const Found&) const = default;

  Found part(int64_t first, int64_t count, int64_t k) const {
    return {{scores.begin() + first * k, scores.begin() + (first + count) * k},
            {ids.begin() + first * k, ids.begin() + (first + count) * k}};
  }
};

class Case : DrawnLists {
 public:
  using DrawnLists::DrawnLists;

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
      own_rows(searcher);
    }
  }

 private:
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
    const int64_t most = std::min<int64_t>(rows_, 40);
    const Numbers<int32_t> positions(draw_, most, [&] { return draw_.below(rows_); });
    for (const int64_t count : {int64_t{0}, std::min<int64_t>(most, 1), most / 2, most})
      for (const int64_t following : {int64_t{0}, most - count}) {
        const Numbers<int32_t> given(draw_, positions.data(), count + following);
        const Numbers<float> scores(draw_, count);
        kernel.score(
            {dim_, count, following, query.data(), codes_.data(), scales_.data(), given.data(), scores.data()});
        for (int64_t i = 0; i < count; ++i) {
          const Estimate want = score(q, positions[i]);
          expect(std::fabs(scores[i] - want.value) <= want.off, "a score by int8 codes");
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
    const int64_t room = blocks_of(rows) * block_rows;
    const Numbers<uint8_t> blocks(draw_, blocks_.data() + block * block_bytes(), blocks_of(rows) * block_bytes());
    const auto scan = [&](float threshold) {
      const Numbers<uint64_t> keys(draw_, room);
      const int64_t kept = kernel.scan({rows, pairs(), blocks.data(), blocks.data(), table, 0.25f, threshold,
                                        static_cast<int32_t>(first), keys.data()});
      return std::vector<uint64_t>(keys.data(), keys.data() + std::min(kept, room));
    };
    std::vector<int64_t> whole;
    for (int64_t row = first; row < first + rows; ++row)
      if (there(row)) whole.push_back(row);
    const std::vector<uint64_t> all = scan(-infinity);
    if (!expect(all.size() == whole.size(), "all rows are kept but those that were removed")) return;
    const double off = table_off(q);
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t row = whole[i];
      const double got = score_of(all[i]), want = 0.25 + factor(row) * signed_sum(q, row);
      expect(place_of(all[i]) == row && std::fabs(got - want) <= factor(row) * off + 2 * eps * std::fabs(want),
             "an estimate");
      expect(all[i] == key_of(score_of(all[i]), place_of(all[i])), "a key");
    }
    for (size_t at = 0; at < all.size(); at += 1 + all.size() / 3) {
      std::vector<uint64_t> good;
      for (const uint64_t key : all)
        if (score_of(key) >= score_of(all[at])) good.push_back(key);
      expect(scan(score_of(all[at])) == good, "rows that reach a threshold");
    }
  }

  // -- Whole searches.

  struct Asked {
    int64_t k, nprobe, candidates;
    int threads = 1;
    int64_t own = -1;  // the first of own_count queries that are own vectors of the first one searched, and so on
    float own_score = 0, own_tie = 0;
  };

  Found search(const Searcher& searcher, int64_t first, int64_t n, const Asked& asked, int64_t tail,
               const std::vector<int64_t>& excluded = {}) {
    return search(draw_, searcher, first, n, asked, tail, excluded);
  }
  Found search(Draws& draw, const Searcher& searcher, int64_t first, int64_t n, const Asked& asked, int64_t tail,
               const std::vector<int64_t>& excluded = {}) const {
    const Numbers<float> given(draw, queries_.data() + first * dim_, n * dim_), scores(draw, n * asked.k);
    const Numbers<int64_t> ids(draw, n * asked.k), out(draw, excluded.data(), static_cast<int64_t>(excluded.size()));
    SearchOptions options{};
    options.k = asked.k, options.nprobe = asked.nprobe, options.candidates = asked.candidates;
    options.threads = asked.threads, options.tail = tail;
    options.excluded = out.data(), options.excluded_count = n > 0 ? out.count() / n : 0;
    const int64_t vectors = asked.own < 0 ? 0 : own_count;
    const Numbers<float> own(draw, queries_.data() + std::max<int64_t>(asked.own, 0) * dim_, n * vectors * dim_);
    options.own = own.data(), options.own_count = vectors;
    options.own_score = asked.own_score, options.own_tie = asked.own_tie;
    searcher.search(given.data(), n, options, scores.data(), ids.data());
    return {scores.values(), ids.values()};
  }

  int64_t place(int64_t id) const {
    return id >= 0 && id < static_cast<int64_t>(place_.size()) ? place_[static_cast<size_t>(id)] : -1;
  }

  // All rows that were not removed, scored and in order.
  void everything(const Searcher& searcher) {
    const int64_t k = all_rows() + 2;
    for (const int threads : {1, 3})
      for (int64_t first = 0; first < 4; first += 3)
        everything(search(searcher, first, 2 - first / 3, {k, nlist(), all_rows() + 1, threads}, tail_), first, k);
  }
  void everything(const Found& found, int64_t first, int64_t k) {
    for (int64_t query = first; query < first + static_cast<int64_t>(found.ids.size()) / k; ++query) {
      const std::vector<float> q = rotated(query);
      const float* const scores = found.scores.data() + (query - first) * k;
      const int64_t* const ids = found.ids.data() + (query - first) * k;
      expect(std::set<int64_t>(ids, ids + there_).size() == static_cast<size_t>(there_), "every row once");
      expect(std::is_sorted(scores, scores + k, std::greater<>()), "the best first");
      for (int64_t i = 0; i < there_; ++i) {
        const int64_t row = place(ids[i]);
        if (!expect(row >= 0 && there(row), "a row that was not removed")) return;
        const Estimate want = score(q, row);
        expect(std::fabs(scores[i] - want.value) <= want.off, "the score of a row");
      }
      for (int64_t i = there_; i < k; ++i) expect(ids[i] == -1 && scores[i] == -infinity, "nothing beyond the rows");
    }
  }

  // And the tail, whatever lists are searched.
  void nearest_lists(const Searcher& searcher) {
    std::vector<int64_t> whole;
    for (int64_t l = 0; l < nlist(); ++l) whole.push_back(there_in(l));
    int64_t of_tail = 0;
    for (int64_t row = rows_; row < all_rows(); ++row) of_tail += there(row);
    for (int64_t query = 0; query < 8; ++query) {
      const int64_t nprobe = query % 2 ? (nlist() + 7) / 8 : 1, k = all_rows() + 1;
      const Found found = search(searcher, query, 1, {k, nprobe, k, static_cast<int>(1 + query % 3)}, tail_);
      std::vector<int64_t> rows(static_cast<size_t>(nlist()));
      int64_t late = 0;
      for (const int64_t id : found.ids)
        if (id >= tail_first_)
          ++late;
        else if (id >= 0)
          ++rows[static_cast<size_t>(list_[static_cast<size_t>(place(id))])];
      expect(late == of_tail, "the tail is searched whole");
      int64_t probed = 0, empty = 0;
      for (size_t l = 0; l < rows.size(); ++l) {
        expect(rows[l] == 0 || rows[l] == whole[l], "lists are searched whole");
        probed += rows[l] > 0, empty += whole[l] == 0;
      }
      expect(probed <= nprobe && probed + empty >= nprobe, "as many lists as are asked for");
      nearest(rotated(query), rows, whole, (5 * nprobe + 3) / 4);
    }
  }

  // A list that is searched can be among the best estimates, and one that is nearer than it and is not can be beyond.
  void nearest(const std::vector<float>& q, const std::vector<int64_t>& rows, const std::vector<int64_t>& whole,
               int64_t scored_lists) {
    const std::vector<Estimate> estimates = near_estimates(q);
    double least = infinity;
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
      else if (whole[static_cast<size_t>(l)] > 0 && score.value - score.off > least)
        expect(perhaps >= scored_lists, "the nearest lists");
    }
  }

  void best_estimates(const Searcher& searcher) {
    const std::vector<float> q = rotated(0);
    for (const int64_t wanted : {1, 9, 50})
      for (const int threads : {1, 4}) {
        const int64_t candidates = std::min(wanted, there_);
        if (candidates == 0) return;
        const Found found = search(searcher, 0, 1, {candidates, nlist(), candidates, threads}, tail_);
        const std::set<int64_t> taken(found.ids.begin(), found.ids.end());
        expect(taken.size() == static_cast<size_t>(candidates) && !taken.count(-1), "as many as are asked for");
        double least = infinity, most = -infinity;
        for (int64_t row = 0; row < all_rows(); ++row) {
          if (!there(row)) continue;
          const Estimate e = rank(q, row);
          if (taken.count(id(row)))
            least = std::min(least, e.value + e.off);
          else
            most = std::max(most, e.value - e.off);
        }
        expect(least >= most, "candidates are the best by the estimate, of the tail by the score");
      }
  }

  // A result depends on its query alone, to the last bit.
  void alone_or_together(const Searcher& searcher) {
    const int64_t k = std::min<int64_t>(all_rows() + 1, 5), nprobe = (nlist() + 1) / 2;
    for (const int64_t candidates : {7, 12}) {
      const auto found = [&](int64_t first, int64_t n, int threads) {
        return search(searcher, first, n, {k, nprobe, candidates, threads}, tail_);
      };
      const Found want = found(0, queries, 1);
      for (const int threads : {2, 3, 4}) {
        expect(found(0, queries, threads) == want, "a batch on several threads");
        for (const int64_t i : {int64_t{0}, int64_t{9}, int64_t{33}, queries - 1})
          expect(found(i, 1, threads) == want.part(i, 1, k), "a query alone");
      }
      expect(found(3, 0, 2).ids.empty(), "no queries");
      callers(searcher, {k, nprobe, candidates}, want);
    }
  }

  // Several at once, while rows come that none of them searches.
  void callers(const Searcher& searcher, const Asked& asked, const Found& want) {
    constexpr int callers = 3;
    std::vector<std::thread> threads;
    Draws draws[callers] = {Draws(seed_), Draws(seed_ + 1), Draws(seed_ + 2)};
    bool good[callers] = {true, true, true};
    for (int caller = 0; caller < callers; ++caller)
      threads.emplace_back([&, caller] {
        for (int64_t turn = 0; turn < 4; ++turn) {
          const int64_t n = 1 + turn % 2 * (caller + 1), first = 5 * caller + turn;
          const Asked mine{asked.k, asked.nprobe, asked.candidates, 1 + caller};
          good[caller] =
              good[caller] && search(draws[caller], searcher, first, n, mine, tail_) == want.part(first, n, asked.k);
        }
      });
    for (int64_t i = tail_; i < room_; ++i) {
      tail_scales_[i] = 1e5f;
      std::memset(&tail_codes_[i * dim_], 0x7f, static_cast<size_t>(dim_));
    }
    for (std::thread& thread : threads) thread.join();
    for (const bool each : good) expect(each, "several callers at once");
  }

  void exclusions(const Searcher& searcher) {
    const int64_t k = std::min<int64_t>(there_, 4), most = std::min<int64_t>(there_, 11);
    if (there_ == 0) return;
    const Found whole = search(searcher, 0, 2, {most, nlist(), 20}, tail_);
    std::vector<int64_t> excluded;
    for (int64_t query = 0; query < 2; ++query) {
      for (int64_t i = 0; i < most - k; ++i) excluded.push_back(whole.ids[query * most + draw_.below(most)]);
      excluded.push_back(-1);
    }
    const int64_t each = most - k + 1;
    const Found found = search(searcher, 0, 2, {k, nlist(), 20, 2}, tail_, excluded);
    for (int64_t query = 0; query < 2; ++query) {
      std::vector<int64_t> want;
      for (int64_t i = query * most; i < (query + 1) * most; ++i) {
        const auto begin = excluded.begin() + query * each, end = begin + each;
        if (std::find(begin, end, whole.ids[i]) == end) want.push_back(whole.ids[i]);
      }
      want.resize(static_cast<size_t>(k));
      expect(found.part(query, 1, k).ids == want, "what filtering would leave");
    }
    const Found best = search(searcher, 0, 1, {most, nlist(), most}, tail_);
    const std::vector<int64_t> but(best.ids.begin(), best.ids.end() - k);
    expect(search(searcher, 0, 1, {k, nlist(), 1, 2}, tail_, but).ids ==
               std::vector<int64_t>(best.ids.end() - k, best.ids.end()),
           "as many candidates as are left out, and k");
    std::vector<int64_t> late(static_cast<size_t>(tail_));
    std::iota(late.begin(), late.end(), tail_first_);
    expect(search(searcher, 0, 1, {k, nlist(), all_rows(), 2}, tail_, late) ==
               search(searcher, 0, 1, {k, nlist(), all_rows(), 2}, 0),
           "without its ids, what is found without the tail");
    std::vector<int64_t> all(static_cast<size_t>(tail_first_ + tail_));
    std::iota(all.begin(), all.end(), 0);
    for (const int64_t id : search(searcher, 0, 1, {k, nlist(), 20, 2}, tail_, all).ids)
      expect(id == -1, "all are left out");
  }

  // Of the first k + 8 rows for each own vector; likeness may be on either side of a bound that it is close to.
  void own_rows(const Searcher& searcher) {
    const int64_t k = std::min<int64_t>(there_ + 1, 5), most = k + own_count * rows_of_own, first = queries - 7;
    const Found whole = search(searcher, 0, 3, {most, nlist(), most}, tail_);
    for (int64_t query = 0; query < 3; ++query) {
      std::vector<float> own[own_count];
      double best[own_count], some = 0;
      for (int64_t j = 0; j < own_count; ++j) {
        own[j] = rotated(first + own_count * query + j), best[j] = -infinity;
        for (int64_t i = query * most; i < (query + 1) * most; ++i)
          if (whole.ids[i] >= 0) best[j] = std::max(best[j], some = score(own[j], place(whole.ids[i])).value);
      }
      const float bounds[][2] = {{-1e9f, 1e9f},
                                 {1e9f, 1e9f},
                                 {-1e9f, 1e-6f},
                                 {static_cast<float>(some), 1e9f},
                                 {static_cast<float>(some), static_cast<float>(0.5 * std::fabs(some))}};
      for (const auto& [least, tie] : bounds) {
        const auto is_own = [&](int64_t row, double slack) {
          for (int64_t j = 0; j < own_count; ++j) {
            const Estimate likeness = score(own[j], row);
            const double scale = row < rows_ ? scales_[row] : tail_scales_[row - rows_];
            const double off = 6 / std::sqrt(12.0) * scale, add = slack * (4 * likeness.off + 8 * eps * off);
            if (likeness.value + add >= least - off &&
                likeness.value + add + slack * 16 * eps * (std::fabs(best[j]) + tie) >= best[j] - tie - 2 * off)
              return true;
          }
          return false;
        };
        for (const int64_t n : {1, 3}) {
          const int64_t from = n == 1 ? query : 0;
          Asked asked{k, nlist(), most, n == 1 ? 3 : 2, first + own_count * from, least, tie};
          const Found found = search(searcher, from, n, asked, tail_).part(query - from, 1, k);
          int64_t kept = 0;
          for (int64_t i = query * most; i < (query + 1) * most && kept < k && whole.ids[i] >= 0; ++i) {
            const bool taken = found.ids[kept] == whole.ids[i] && found.scores[kept] == whole.scores[i];
            const int64_t row = place(whole.ids[i]);
            expect(taken ? !is_own(row, -1) : is_own(row, 1), "rows that are no own ones");
            kept += taken;
          }
          for (; kept < k; ++kept) expect(found.ids[kept] == -1 && found.scores[kept] == -infinity, "and no others");
        }
      }
    }
  }

  bool expect(bool good, const char* what) {
    if (good) return true;
    std::fprintf(stderr, "failed: index %llu %s %s  (%s)\n", static_cast<unsigned long long>(seed_), isa_.c_str(), what,
                 draw_.text().c_str());
    ++failures;
    return false;
  }

  std::string isa_;
};

// Sizes that do not fit leave an exception and no memory.
static void refuses(std::initializer_list<int64_t> given) {
  const std::vector<float> numbers(64);
  const std::vector<int8_t> codes(64);
  const std::vector<int32_t> ids(8);
  const std::vector<uint8_t> blocks(8 * static_cast<size_t>(bytes_of_block(1)));
  const std::vector<int64_t> sizes(given);
  try {
    const Searcher searcher({4, static_cast<int64_t>(sizes.size()), 8, numbers.data(), codes.data(), numbers.data(),
                             numbers.data(), sizes.data(), blocks.data(), codes.data(), numbers.data(), ids.data(),
                             codes.data(), numbers.data(), 2, 8});
  } catch (const std::invalid_argument&) {
    return;
  }
  std::fprintf(stderr, "failed: sizes of other rows are taken\n");
  ++failures;
}

// Keys are in the order of scores, and of places from the last to the first where those are equal.
static void order_of_keys() {
  const float scores[] = {-infinity, -3e38f, -1, -0.999f, -1e-45f, 0, 1e-45f, 1e-30f, 0.5f, 2, 3e38f, infinity};
  uint64_t last = 0;
  for (const float score : scores)
    for (const uint32_t place : {0xfffffffeu, 0x80000000u, 0x7fffffffu, 77u, 1u, 0u}) {
      const uint64_t key = key_of(score, place);
      if (key > last && score_of(key) == score && place_of(key) == place) {
        last = key;
        continue;
      }
      std::fprintf(stderr, "failed: the key of %g and %u\n", static_cast<double>(score), place);
      ++failures;
    }
}

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  refuses({4, 3}), refuses({4, 5}), refuses({-1, 9}), refuses({9, -1}), refuses({most, most, 10}), refuses({0});
  order_of_keys();
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
