// What loss and gradient of InfoNCE share: blocks of queries against chunks of keys, packed, and their logits.
//
// Logits lie as [keys, queries], lanes over the queries, so that one packed chunk of keys serves both products with it:
// read one element at a time for the logits, in vectors for the gradient of the queries. They are in units of log 2.
#pragma once

#include "common/labels.h"
#include "common/panels.h"
#include "common/vmath.h"
#include "ops/info_nce_halves.h"
#include "ops/kernels.h"

namespace fastlvm::FASTLVM_ISA::nce {

constexpr int64_t work_worth_sharing = 1 << 20;  // multiply-adds of one product
constexpr int64_t logits_at_once = 32 << 20;     // bytes, where those of a block are kept for all keys

// In a block and in a chunk, and what the keys of a chunk are a multiple of where there are enough.
struct Limits {
  int64_t queries, keys, least_keys, wanted_chunks, multiple;
};
constexpr Limits by_panels = {256, 240, 24, 8, 6};
// Of bfloat16 in tiles: an instruction takes 32 keys, and sums are read and written once for a block and a chunk.
constexpr Limits by_tiles = {512, 512, 128, 4, 32};
constexpr double ln2 = 0.6931471805599453;

// How the work is cut: by the shapes alone, so that no bit depends on the threads.
struct Cut {
  int64_t chunk, chunks;  // keys in a chunk
  int64_t block;          // queries in a block, in whole panels
  int64_t pitch;          // of a row of logits: no power of two, which would meet itself in the first cache

  Cut(const InfoNce& in, int64_t width, int64_t size, bool kept, const Limits& limits) {
    const int64_t even = round_up(div_up(in.keys_count, limits.wanted_chunks), limits.multiple);
    chunk = smaller(larger(1, in.keys_count), smaller(limits.keys, larger(limits.least_keys, even)));
    chunks = div_up(in.keys_count, chunk);
    const int64_t fits = kept ? logits_at_once / (size * larger(1, in.keys_count)) / width * width : limits.queries;
    block = larger(width, smaller(round_up(in.batch, width), smaller(limits.queries / width * width, fits)));
    pitch = block + 16;
  }
};

template <class V>
class Tiles {
 public:
  using T = typename V::scalar;
  static constexpr int64_t width = panel_width<V>;
  static constexpr T lowest = T(-3e38);  // below every logit, but for those left out: exp2(-inf - lowest) is 0

  // `kept`: logits stay for all keys of a block, not only while a chunk is worked on. `to_keys`: whether the keys'
  // gradient is wanted.
  Tiles(const InfoNce& in, bool kept, bool to_keys)
      : in_(in),
        cut_(in, width, sizeof(T), kept, Halves<V>::usable(in) ? by_tiles : by_panels),
        kept_(kept),
        seats_(threads_of_job()),
        same_seats_(seats_),
        halves_(in, cut_.block, cut_.chunk, seats_, to_keys),
        panels_(halves_.used() ? 0 : div_up(in.dim, width)),
        across_(halves_.used() ? 0 : cut_.block * in.dim),
        along_(panels_ * cut_.block * width),
        keys_(seats_ * keys_size()),
        logits_((kept ? in.keys_count : seats_ * cut_.chunk) * cut_.pitch),
        labels_(in.key_labels, in.keys_count, in.label_columns),
        ranges_(in.query_labels ? in.label_columns * cut_.block : 0) {}

  int64_t first() const { return first_; }  // query of the block
  int64_t rows() const { return rows_; }    // queries in the block
  int64_t block() const { return cut_.block; }
  int64_t pitch() const { return cut_.pitch; }
  int64_t chunks() const { return cut_.chunks; }
  int64_t begin(int64_t chunk) const { return chunk * cut_.chunk; }  // its first key
  int64_t count(int64_t chunk) const { return smaller(cut_.chunk, in_.keys_count - begin(chunk)); }
  int64_t lane_panels() const { return div_up(rows_, width); }

  // f(0) … f(count - 1) over the team
  template <class F>
  void share(int64_t count, F f) const {
    parallel(count, rows_ * in_.keys_count * larger(1, in_.dim) > work_worth_sharing, [&](int64_t i) {
      const FlushSubnormals<V> flush;
      f(i);
    });
  }

  // f() for every block of queries
  template <class F>
  void each_block(F f) {
    for (first_ = 0; first_ < in_.batch; first_ += cut_.block) {
      rows_ = smaller(cut_.block, in_.batch - first_);
      share(lane_panels(), [&](int64_t panel) { read_queries(panel); });
      f();
    }
  }

  // The logits of a chunk [count, pitch], those left out -inf, as are those of queries beyond the last one.
  T* score(int64_t chunk) {
    T* const keys = keys_ + seat_of_thread() * keys_size();
    T* const out = logits_of(chunk);
    if (halves_.used()) {
      halves_.score(out, cut_.pitch, begin(chunk), count(chunk), rows_);
    } else {
      pack_panels<V>(keys, cut_.chunk, in_.keys, begin(chunk), count(chunk), 0, in_.dim);
      for (int64_t panel = 0; panel < lane_panels(); ++panel)
        multiply_panel<V>(count(chunk), in_.dim, {keys, width, 1, width, cut_.chunk * width},
                          across_ + panel * in_.dim * width, {out + panel * width, cut_.pitch, width, false});
    }
    const int64_t padded = round_up(rows_, V::width);
    for (int64_t j = 0; j < count(chunk); ++j)
      for (int64_t i = rows_; i < padded; ++i) out[j * cut_.pitch + i] = T(-INFINITY);
    leave_out(out, chunk);
    return out;
  }

  T* logits_of(int64_t chunk) const {
    return logits_ + (kept_ ? begin(chunk) : seat_of_thread() * cut_.chunk) * cut_.pitch;
  }

  // f(where query i meets key i, i in the block) for the positives of a chunk
  template <class F>
  void each_positive(T* logits, int64_t chunk, F f) const {
    const int64_t from = larger(first_, begin(chunk)), to = smaller(first_ + rows_, begin(chunk) + count(chunk));
    for (int64_t i = from; i < to; ++i) f(logits + (i - begin(chunk)) * cut_.pitch + i - first_, i - first_);
  }

  // The gradients of a chunk's logits go where they are wanted: to the keys at once, to the queries by `sum_over_keys`.
  void pass_on(const TensorView& dkeys, const TensorView& dqueries, T* dlogits, int64_t chunk) const {
    if (given(dkeys)) add_to_keys(dkeys, dlogits, chunk);
    if (halves_.used() && given(dqueries)) halves_.turn(dlogits, cut_.pitch, count(chunk), rows_, seat_of_thread());
  }

  // dqueries of the block from the gradients of all logits, which were kept
  void sum_over_keys(const TensorView& dqueries) const {
    if (halves_.used()) return sum_over_pairs(dqueries);
    const int64_t wanted = seats_ == 1 ? 1 : 2 * seats_;
    const int64_t panels = larger(1, panels_ / wanted), columns = div_up(panels_, panels);
    const int64_t rows = round_up(div_up(rows_, div_up(wanted, larger(1, columns))), panel_rows<V>);
    share(columns * div_up(rows_, rows), [&](int64_t task) {
      const int64_t p = task % columns * panels, i = task / columns * rows, column = p * width;
      T* const keys = keys_ + seat_of_thread() * keys_size();
      T* const out = static_cast<T*>(dqueries.data) + (first_ + i) * in_.dim + column;
      const int64_t all = smaller(panels * width, in_.dim - column);
      for (int64_t j = 0; j < in_.keys_count; j += by_panels.keys) {
        const int64_t count = smaller(by_panels.keys, in_.keys_count - j);
        pack_panels<V>(keys, count, in_.keys, j, count, column, all);
        for (int64_t at = 0; at < all; at += width)
          multiply_panel<V>(smaller(rows, rows_ - i), count, {logits_ + j * cut_.pitch + i, 1, cut_.pitch},
                            keys + at * count, {out + at, in_.dim, smaller(width, all - at), j > 0});
      }
    });
  }

 private:
  void add_to_keys(const TensorView& dkeys, const T* dlogits, int64_t chunk) const {
    T* const out = static_cast<T*>(dkeys.data) + begin(chunk) * in_.dim;
    if (halves_.used())
      return halves_.add_to_keys(out, dlogits, cut_.pitch, count(chunk), rows_, first_ > 0, seat_of_thread());
    for (int64_t p = 0; p < panels_; ++p)
      multiply_panel<V>(count(chunk), rows_, {dlogits, cut_.pitch, 1}, along_ + p * cut_.block * width,
                        {out + p * width, in_.dim, smaller(width, in_.dim - p * width), first_ > 0});
  }

  // The same where the gradients lie turned, in pairs of keys.
  void sum_over_pairs(const TensorView& dqueries) const {
    constexpr int64_t unit = 2 * block_outputs;  // the widest tile of a product
    const int64_t columns = round_up(div_up(in_.dim, seats_ == 1 ? 1 : 2 * seats_), unit);
    share(div_up(in_.dim, columns), [&](int64_t task) {
      const int64_t column = task * columns, count_of = smaller(columns, in_.dim - column);
      T* const out = static_cast<T*>(dqueries.data) + first_ * in_.dim;
      for (int64_t c = 0; c < chunks(); ++c)
        halves_.add_to_queries(out, logits_of(c), begin(c), count(c), rows_, column, count_of, c > 0, seat_of_thread());
    });
  }

  int64_t keys_size() const { return panels_ * smaller(by_panels.keys, in_.keys_count) * width; }

  // A panel of lanes of the block: along D as read, across it in units of the logits.
  void read_queries(int64_t panel) {
    const int64_t i = panel * width, rows = smaller(width, rows_ - i);
    find_labels(i, rows);
    if (halves_.used()) return halves_.read_queries(i, i + width, first_, rows_);
    T* const across = across_ + i * in_.dim;
    pack_panels<V>(along_ + i * width, cut_.block, in_.queries, first_ + i, rows, 0, in_.dim);
    if (rows < width) fill_zero(across, in_.dim * width);
    for (int64_t p = 0; p < panels_; ++p)
      transpose<V>(across + p * width * width, width, along_ + (p * cut_.block + i) * width, width, rows,
                   smaller(width, in_.dim - p * width));
    const V scale = V::set1(static_cast<T>(in_.scale * log2e));
    for (int64_t k = 0; k < in_.dim * width; k += V::width) (scale * V::load(across + k)).store(across + k);
  }

  void find_labels(int64_t i, int64_t rows) {
    if (!in_.query_labels) return;
    for (int64_t g = 0; g < in_.label_columns; ++g)
      for (int64_t r = i; r < i + rows; ++r)
        ranges_[g * cut_.block + r] = labels_.find(g, in_.query_labels[(first_ + r) * in_.label_columns + g]);
  }

  void leave_out(T* logits, int64_t chunk) const {
    const int64_t begin = this->begin(chunk), end = begin + count(chunk);
    for (int64_t i = 0; in_.mask && i < rows_; ++i) {
      const uint8_t* const row = in_.mask + (first_ + i) * in_.mask_stride[0];
      for (int64_t j = begin; j < end;) {
        uint64_t several = 1;  // most are zeros
        if (in_.mask_stride[1] == 1 && j + 8 <= end) memcpy(&several, row + j, sizeof several);
        if (several == 0) {
          j += 8;
          continue;
        }
        if (row[j * in_.mask_stride[1]] && j != first_ + i) logits[(j - begin) * cut_.pitch + i] = T(-INFINITY);
        ++j;
      }
    }
    if (!in_.query_labels) return;
    for (int64_t g = 0; g < in_.label_columns; ++g)
      for (int64_t i = 0; i < rows_; ++i) {
        const auto range = ranges_[g * cut_.block + i];
        for (const int64_t* key = first_of(range, begin); key < range.end && *key < end; ++key)
          if (*key != first_ + i) logits[(*key - begin) * cut_.pitch + i] = T(-INFINITY);
      }
  }

  // The first key of a range that is not below `key`.
  static const int64_t* first_of(LabelIndex::Range range, int64_t key) {
    const int64_t* low = range.begin;
    for (int64_t size = range.end - range.begin; size > 0;) {
      const int64_t half = size / 2;
      if (low[half] < key)
        low += half + 1, size -= half + 1;
      else
        size = half;
    }
    return low;
  }

  const InfoNce& in_;
  const Cut cut_;
  const bool kept_;
  const int seats_;
  const ThreadCount same_seats_;  // every job has as many threads as there is scratch for
  const Halves<V> halves_;
  const int64_t panels_;  // of D, 0 where pairs are multiplied
  int64_t first_ = 0, rows_ = 0;
  Buffer<T> across_;  // [lane panels, D, width]: queries times scale / ln 2
  Buffer<T> along_;   // [panels, block, width]: queries
  Buffer<T> keys_;    // [seats, panels, chunk, width]
  Buffer<T> logits_;  // [M, pitch] or [seats, chunk, pitch]
  const LabelIndex labels_;
  Buffer<LabelIndex::Range> ranges_;  // [G, block]
};

// Zeros for a gradient that gets nothing from anywhere.
template <class V>
inline void clear(const TensorView& view) {
  if (given(view)) fill_zero(static_cast<typename V::scalar*>(view.data), view.shape[0] * view.shape[1]);
}

}  // namespace fastlvm::FASTLVM_ISA::nce
