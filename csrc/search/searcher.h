// Searches an inverted-list index of lists.h: probes the nearest lists, ranks their rows by the estimates of their
// codes and scores the best of them by int8 codes of the rows themselves.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/workspace.h"
#include "search/lists.h"
#include "search/ranking.h"

namespace fastlvm {

// The arrays of an index, which have to outlive the searcher; a row's position is its place in the lists.
struct ListsSource {
  int64_t dim, nlist, rows;
  const float* signs;            // [rotation_rounds, dim]
  const int8_t* centroids;       // [nlist, dim], rotated
  const float* centroid_scales;  // [nlist]
  const float* level;            // [1]: rows are coded by what they differ from their centroid times this
  const int64_t* sizes;          // [nlist], rows together
  const uint8_t* blocks;         // [.., bytes_of_block]: every list begins with one of its own
  const int8_t* codes;           // [rows, dim], rotated
  const float* scales;           // [rows]
  const int32_t* ids;            // [rows], 0 or more
  // Rows that came after those: in no list, scored in every search. Their positions and ids follow on `rows` and
  // `tail_first`.
  const int8_t* tail_codes;  // [.., dim], rotated
  const float* tail_scales;  // [..], NaN for one that was removed
  int64_t tail_room, tail_first;
};

// How a query is answered: the k best of the `candidates` best estimates in the `nprobe` nearest lists.
struct SearchOptions {
  int64_t k, nprobe, candidates;
  const int64_t* excluded;  // ids [n, excluded_count] that are left out; negative: none
  int64_t excluded_count;
  int threads;   // 0: as many as all kernels use
  int64_t tail;  // rows of the tail that are searched
  // Vectors [n, own_count, dim] whose own rows are left out as well: those of length 1 that score at least `own_score`
  // with one of them, and no less than its best but for `own_tie`, their codes' rounding apart.
  const float* own;
  int64_t own_count;
  float own_score, own_tie;
};

class Searcher {
 public:
  explicit Searcher(const ListsSource& source);  // throws std::invalid_argument for sizes that do not fit

  int64_t dim() const { return lists_.dim; }
  int64_t rows() const { return lists_.rows; }
  int64_t nlist() const { return lists_.nlist; }
  int64_t tail_room() const { return lists_.tail_room; }

  // queries [n, dim] → scores and ids [n, k], best first; -inf and -1 where fewer rows are found. A result depends on
  // its query alone: not on the threads, nor on the queries beside it.
  void search(const float* queries, int64_t n, const SearchOptions& options, float* scores, int64_t* ids) const;

  static int64_t pairs_of(int64_t dim) { return (dim + 15) / 16; }

 private:
  class Query;

  void code_centroids();
  void answer(const float* query, const SearchOptions& options, int seats, float* scores, int64_t* ids) const;

  ListsSource lists_;
  std::vector<RowSpan> list_;
  std::vector<uint8_t> centroid_blocks_;
  mutable Workspaces idle_;
};

}  // namespace fastlvm
