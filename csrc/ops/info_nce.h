// InfoNCE over tiles: the loss, with its gradients where all losses weigh the same; and the gradient for any weights.
//
// With B queries and M keys of D numbers a product takes B M D multiply-adds; the loss takes one, both gradients two
// more. Nothing of size B M is ever in memory.
// - Loss alone: chunks of keys go by a block of queries; sums of exp are kept by chunk, each relative to the largest
//   logit of its chunk, and put together at the end.
// - Loss and gradients: the logits of a block are kept for all keys (32 MB), as exp relative to the largest of a chunk.
//   When the sums are known, a factor for every chunk and query makes probabilities of them.
// - Gradient alone: logits are computed again, and the sums are given; for weights that are known only then, and for
//   both directions, whose sums over queries are known after the last block.
// The chunked sum of exp is that of Cheng et al., "Breaking the Memory Barrier: Near Infinite Batch Size Scaling for
// Contrastive Loss" (2024); gradients in the forward are as in Liger's fused linear cross entropy (2024).
#pragma once

#include "ops/info_nce_tiles.h"

namespace fastlvm::FASTLVM_ISA::nce {

template <class V>
class Loss {
 public:
  using T = typename V::scalar;
  using Tile = Tiles<V>;

  explicit Loss(const InfoNce& in)
      : in_(in),
        gradients_(given(in.dqueries) || given(in.dkeys)),
        tiles_(in, gradients_, given(in.dkeys)),
        most_(tiles_.chunks() * tiles_.block()),
        sums_(tiles_.chunks() * tiles_.block()),
        positives_(in.batch),
        losses_(in.batch),
        keys_most_(in.symmetric ? in.keys_count : 0, Tile::lowest),
        keys_sums_(in.symmetric ? in.keys_count : 0, 0.0) {}

  void run() {
    tiles_.each_block([&] {
      tiles_.share(tiles_.chunks(), [&](int64_t chunk) { add_chunk(chunk); });
      tiles_.share(tiles_.lane_panels(), [&](int64_t panel) { finish_queries(panel); });
      if (!gradients_) return;
      tiles_.share(tiles_.chunks(), [&](int64_t chunk) {
        weigh(chunk);
        tiles_.pass_on(in_.dkeys, in_.dqueries, tiles_.logits_of(chunk), chunk);
      });
      if (given(in_.dqueries)) tiles_.sum_over_keys(in_.dqueries);
    });
    if (in_.symmetric) finish_keys();
    if (in_.batch == 0) clear<V>(in_.dkeys);
    double total = 0;
    for (int64_t i = 0; i < in_.batch; ++i) {
      total += losses_[i];
      if (given(in_.loss)) static_cast<T*>(in_.loss.data)[i] = static_cast<T>(losses_[i]);
    }
    if (given(in_.total)) *static_cast<T*>(in_.total.data) = static_cast<T>(total);
  }

 private:
  void add_chunk(int64_t chunk) {
    T* const logits = tiles_.score(chunk);
    tiles_.each_positive(logits, chunk, [&](const T* at, int64_t i) { positives_[tiles_.first() + i] = *at; });
    if (in_.symmetric) add_to_keys_sums(logits, chunk);
    const int64_t count = tiles_.count(chunk), pitch = tiles_.pitch();
    constexpr int N = panel_vectors<V>, W = V::width;
    for (int64_t i = 0; i < tiles_.rows(); i += Tile::width) {
      V most[N], sums[N];
      FASTLVM_UNROLL
      for (int v = 0; v < N; ++v) most[v] = V::set1(Tile::lowest), sums[v] = V::zero();
      for (int64_t j = 0; j < count; ++j) {
        FASTLVM_UNROLL
        for (int v = 0; v < N; ++v) most[v] = V::max(V::load(logits + j * pitch + i + v * W), most[v]);
      }
      for (int64_t j = 0; j < count; ++j) {
        FASTLVM_UNROLL
        for (int v = 0; v < N; ++v) {
          T* const at = logits + j * pitch + i + v * W;
          const V e = exp2(V::load(at) - most[v]);
          sums[v] = sums[v] + e;
          if (gradients_) e.store(at);
        }
      }
      FASTLVM_UNROLL
      for (int v = 0; v < N; ++v) {
        most[v].store(most_ + chunk * tiles_.block() + i + v * W);
        sums[v].store(sums_ + chunk * tiles_.block() + i + v * W);
      }
    }
  }

  // The sums of the queries of a panel; with gradients, what makes probabilities of a chunk's exp, times the scale.
  void finish_queries(int64_t panel) {
    const int64_t block = tiles_.block(), begin = panel * Tile::width;
    for (int64_t i = begin; i < smaller(begin + Tile::width, tiles_.rows()); ++i) {
      double most = Tile::lowest, sum = 0;
      for (int64_t c = 0; c < tiles_.chunks(); ++c) most = most_[c * block + i] > most ? most_[c * block + i] : most;
      for (int64_t c = 0; c < tiles_.chunks(); ++c) sum += sums_[c * block + i] * ::exp2(most_[c * block + i] - most);
      const double log_sum = most + ::log2(sum);
      const int64_t query = tiles_.first() + i;
      losses_[query] = (log_sum - positives_[query]) * ln2;
      if (given(in_.log_sums)) static_cast<T*>(in_.log_sums.data)[query] = static_cast<T>(log_sum);
      if (gradients_)
        for (int64_t c = 0; c < tiles_.chunks(); ++c)
          most_[c * block + i] = static_cast<T>(in_.scale * ::exp2(most_[c * block + i] - log_sum));
    }
  }

  // Gradients of the logits, from exp.
  void weigh(int64_t chunk) {
    T* const logits = tiles_.logits_of(chunk);
    const int64_t pitch = tiles_.pitch();
    for (int64_t j = 0; j < tiles_.count(chunk); ++j)
      for (int64_t i = 0; i < tiles_.rows(); i += V::width) {
        T* const at = logits + j * pitch + i;
        (V::load(at) * V::load(most_ + chunk * tiles_.block() + i)).store(at);
      }
    tiles_.each_positive(logits, chunk, [&](T* at, int64_t) { *at -= static_cast<T>(in_.scale); });
  }

  // The sums over queries of a chunk's keys take a block more.
  void add_to_keys_sums(const T* logits, int64_t chunk) {
    for (int64_t j = 0; j < tiles_.count(chunk); ++j, logits += tiles_.pitch()) {
      V most = V::set1(Tile::lowest), sum = V::zero();
      for (int64_t i = 0; i < tiles_.rows(); i += V::width) most = V::max(V::load(logits + i), most);
      T lanes[V::width];
      most.store(lanes);
      const int64_t key = tiles_.begin(chunk) + j;
      T top = keys_most_[key];
      for (int v = 0; v < V::width; ++v) top = lanes[v] > top ? lanes[v] : top;
      for (int64_t i = 0; i < tiles_.rows(); i += V::width) sum = sum + exp2(V::load(logits + i) - V::set1(top));
      const double before = keys_sums_[key] * ::exp2(static_cast<double>(keys_most_[key]) - top);
      keys_sums_[key] = before + V::sum(sum);
      keys_most_[key] = top;
    }
  }

  void finish_keys() {
    for (int64_t j = 0; j < in_.keys_count; ++j) {
      const double log_sum = keys_most_[j] + ::log2(keys_sums_[j]);
      losses_[j] = 0.5 * (losses_[j] + (log_sum - positives_[j]) * ln2);
      if (given(in_.log_sums)) static_cast<T*>(in_.log_sums.data)[in_.batch + j] = static_cast<T>(log_sum);
    }
  }

  const InfoNce& in_;
  const bool gradients_;
  Tile tiles_;
  Buffer<T> most_, sums_;  // [chunks, block]
  Buffer<T> positives_;    // [B], in units of log 2
  Buffer<double> losses_;  // [B]
  Buffer<T> keys_most_;    // [M], of all blocks so far
  Buffer<double> keys_sums_;
};

template <class V>
class Gradient {
 public:
  using T = typename V::scalar;

  explicit Gradient(const InfoNceBwd& args)
      : args_(args),
        in_(args.forward),
        tiles_(in_, given(args.dqueries), given(args.dkeys)),
        weights_(in_.batch),
        query_weights_(tiles_.block() + Tiles<V>::width, T(0)),
        query_sums_(tiles_.block() + Tiles<V>::width, T(0)) {}

  void run() {
    if (in_.batch == 0) return clear<V>(args_.dkeys);
    read_row<V>(weights_.get(), args_.grad, 0, args_.grad.stride[0], in_.batch);
    const T share = static_cast<T>(in_.symmetric ? 0.5 * in_.scale : in_.scale);
    for (int64_t i = 0; i < in_.batch; ++i) weights_[i] *= share;
    tiles_.each_block([&] {
      copy(query_weights_.get(), weights_ + tiles_.first(), tiles_.rows());
      copy(query_sums_.get(), static_cast<const T*>(in_.log_sums.data) + tiles_.first(), tiles_.rows());
      tiles_.share(tiles_.chunks(), [&](int64_t chunk) {
        T* const logits = tiles_.score(chunk);
        weigh(logits, chunk);
        tiles_.pass_on(args_.dkeys, args_.dqueries, logits, chunk);
      });
      if (given(args_.dqueries)) tiles_.sum_over_keys(args_.dqueries);
    });
  }

 private:
  // Gradients of the logits, in their place.
  void weigh(T* logits, int64_t chunk) {
    const T* const keys_sums = static_cast<const T*>(in_.log_sums.data) + in_.batch;
    for (int64_t j = 0; j < tiles_.count(chunk); ++j) {
      const int64_t key = tiles_.begin(chunk) + j;
      for (int64_t i = 0; i < tiles_.rows(); i += V::width) {
        T* const at = logits + j * tiles_.pitch() + i;
        const V logit = V::load(at);
        V sum = V::load(query_weights_ + i) * exp2(logit - V::load(query_sums_ + i));
        if (in_.symmetric) sum = V::fma(V::set1(weights_[key]), exp2(logit - V::set1(keys_sums[key])), sum);
        sum.store(at);
      }
    }
    const T directions = T(in_.symmetric ? 2 : 1);
    tiles_.each_positive(logits, chunk, [&](T* at, int64_t i) { *at -= directions * query_weights_[i]; });
  }

  const InfoNceBwd& args_;
  const InfoNce& in_;
  Tiles<V> tiles_;
  Buffer<T> weights_;                     // [B]: grad / temperature, halved for each of two directions
  Buffer<T> query_weights_, query_sums_;  // of the block
};

}  // namespace fastlvm::FASTLVM_ISA::nce
