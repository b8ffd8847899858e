// InfoNCE and its backward: see ops.h.
#pragma once

#include "common/dispatch.h"
#include "inputs.h"
#include "plain.h"

namespace fastlvm::test {

// Small ones, and one of several blocks of queries, chunks of keys and threads.
struct NceSizes {
  int64_t B, M, D;

  NceSizes(Draws& draw, bool symmetric) {
    const bool large = draw.pick("kind", {0, 0, 0, 0, 0, 1}) == 1;
    B = large ? draw.pick("B large", {130, 270}) : draw.pick("B", {0, 1, 2, 5, 17, 40});
    D = large ? draw.pick("D large", {9, 33, 144}) : draw.pick("D", {0, 1, 3, 5, 16, 17, 65, 144});
    const int64_t more = large ? draw.pick("M large", {0, 260}) : draw.pick("M - B", {0, 1, 7, 50});
    M = symmetric ? B : B + more;
  }
};

// The inputs that info_nce and info_nce_bwd share.
struct NceInputs {
  bool symmetric;
  NceSizes sizes;
  double scale;
  const Product* tiles;  // of bfloat16, null where both inputs have a dtype of their own
  Tensor *queries, *keys;
  std::vector<uint8_t> mask;
  int64_t mask_stride[2] = {0, 0};
  int64_t G = 0;
  std::vector<int64_t> query_labels, key_labels;

  explicit NceInputs(Case& c)
      : symmetric(c.draw.coin("symmetric")),
        sizes(c.draw, symmetric),
        scale(0.2 * static_cast<double>(c.draw.pick("scale", {1, 2, 5}))),
        tiles(c.draw.coin("bfloat16 in tiles") ? product(c) : nullptr) {
    queries = &input(c, "queries", {sizes.B, sizes.D});
    keys = &input(c, "keys", {sizes.M, sizes.D});
    const int64_t kind = c.draw.pick("mask", {0, 0, 1, 2, 3});
    if (kind == 1 || kind == 2) {  // by rows, by columns; one byte more, for the address of an empty one
      mask_stride[0] = kind == 1 ? sizes.M : 1, mask_stride[1] = kind == 1 ? 1 : sizes.B;
      for (int64_t i = 0; i < sizes.B * sizes.M + 1; ++i) mask.push_back(c.draw.below(3) == 0);
    }
    if (kind != 3) return;
    G = c.draw.pick("G", {1, 3, 16});
    const int64_t values = c.draw.pick("labels", {1, 4, 1000});
    for (int64_t i = 0; i < sizes.B * G + 1; ++i) query_labels.push_back(c.draw.below(values + 2) - 2);
    for (int64_t i = 0; i < sizes.M * G + 1; ++i) key_labels.push_back(c.draw.below(values + 2) - 2);
  }

  static const Product* product(const Case& c) {
    const Product* const found = active_products().of[static_cast<int>(Precision::bf16)];
    return !c.float64 && found->tiles && &c.kernels(drawn) == &active_kernels() ? found : nullptr;
  }

  Tensor& input(Case& c, const char* name, const Array::Shape& shape) const {
    return tiles ? c.input_of(DType::bf16, name, shape) : c.input(name, shape);
  }

  // In tiles the gradients of logits are rounded to bfloat16.
  const Tensor* gradient(Case& c, const char* name, const Tensor* of) const {
    Tensor* const found = c.gradient(name, of);
    if (found && tiles) found->tolerance = 0x1p-8;
    return found;
  }

  InfoNce args(const Case& c, Variant v) const {
    InfoNce args{};
    args.bf16 = v == drawn ? tiles : nullptr;
    args.batch = sizes.B, args.keys_count = sizes.M, args.dim = sizes.D;
    args.float64 = c.wide(v), args.symmetric = symmetric, args.scale = scale;
    args.queries = queries->view(v), args.keys = keys->view(v);
    args.mask = mask.empty() ? nullptr : mask.data();
    args.mask_stride[0] = mask_stride[0], args.mask_stride[1] = mask_stride[1];
    args.query_labels = query_labels.empty() ? nullptr : query_labels.data();
    args.key_labels = key_labels.empty() ? nullptr : key_labels.data();
    args.label_columns = G;
    return args;
  }
};

// Plain loops over float64 arrays: truth, or for `sizes` how large the terms of every result are, with the size of the
// logits as part of them, whose error is that of exp.
class PlainNce {
 public:
  PlainNce(const InfoNce& in, bool sizes) : in_(in), sizes_(sizes) {
    for (int64_t i = 0; i < in.batch; ++i)
      for (int64_t j = 0; j < in.keys_count; ++j) {
        double sum = 0, size = 0;
        for (int64_t d = 0; d < in.dim; ++d) {
          const double term = in.scale * plain::at(in.queries, {i, d}) * plain::at(in.keys, {j, d});
          sum += term, size += std::fabs(term);
        }
        largest_ = std::max(largest_, size + 1);
        logits_.push_back(left_out(i, j) ? -INFINITY : sum);
      }
    for (int64_t i = 0; i < in.batch; ++i) rows_.push_back(log_sum(in.keys_count, [&](int64_t j) { return at(i, j); }));
    for (int64_t j = 0; in.symmetric && j < in.batch; ++j)
      columns_.push_back(log_sum(in.batch, [&](int64_t i) { return at(i, j); }));
  }

  void write_losses() const {
    double total = 0;
    for (int64_t i = 0; i < in_.batch; ++i) {
      const double row = rows_[i] - at(i, i), column = in_.symmetric ? columns_[i] - at(i, i) : row;
      const double loss = sizes_ ? 2 * largest_ + std::log(1.0 + static_cast<double>(in_.keys_count)) : (row + column) / 2;
      total += loss;
      plain::set(in_.loss, {i}, loss);
      plain::set(in_.log_sums, {0, i}, sizes_ ? 2 * loss : rows_[i] / std::log(2.0));
      if (in_.symmetric) plain::set(in_.log_sums, {1, i}, sizes_ ? 2 * loss : columns_[i] / std::log(2.0));
    }
    plain::set(in_.total, {}, total);
  }

  // For weights grad [B], 1 if not given.
  void write_gradients(const TensorView& grad, const TensorView& dqueries, const TensorView& dkeys) const {
    const auto weight = [&](int64_t i) { return grad.dtype == DType::none ? 1 : plain::at(grad, {i}); };
    for (int64_t j = 0; j < in_.keys_count; ++j)
      for (int64_t d = 0; d < in_.dim; ++d) plain::set(dkeys, {j, d}, 0);
    for (int64_t i = 0; i < in_.batch; ++i)
      for (int64_t d = 0; d < in_.dim; ++d) plain::set(dqueries, {i, d}, 0);
    for (int64_t i = 0; i < in_.batch; ++i)
      for (int64_t j = 0; j < in_.keys_count; ++j) {
        const double half = in_.symmetric ? 0.5 : 1, own = i == j ? 1 : 0, sign = sizes_ ? -1 : 1;
        const auto part = [&](int64_t of, double log_sum) {
          const double w = sizes_ ? std::fabs(weight(of)) * largest_ : weight(of);
          return half * in_.scale * w * (std::exp(at(i, j) - log_sum) - sign * own);
        };
        const double dlogit = part(i, rows_[i]) + (in_.symmetric ? part(j, columns_[j]) : 0);
        for (int64_t d = 0; d < in_.dim; ++d) {
          const double q = plain::at(in_.queries, {i, d}), k = plain::at(in_.keys, {j, d});
          add(dqueries, {i, d}, dlogit * (sizes_ ? std::fabs(k) : k));
          add(dkeys, {j, d}, dlogit * (sizes_ ? std::fabs(q) : q));
        }
      }
  }

 private:
  static void add(const TensorView& view, std::initializer_list<int64_t> index, double x) {
    plain::set(view, index, plain::at(view, index) + x);
  }

  double at(int64_t i, int64_t j) const { return logits_[static_cast<size_t>(i * in_.keys_count + j)]; }

  bool left_out(int64_t i, int64_t j) const {
    if (i == j) return false;
    if (in_.mask && in_.mask[i * in_.mask_stride[0] + j * in_.mask_stride[1]]) return true;
    for (int64_t g = 0; in_.query_labels && g < in_.label_columns; ++g) {
      const int64_t label = in_.query_labels[i * in_.label_columns + g];
      if (label >= 0 && label == in_.key_labels[j * in_.label_columns + g]) return true;
    }
    return false;
  }

  template <class F>
  static double log_sum(int64_t count, F logit) {
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j < count; ++j) most = std::max(most, logit(j));
    for (int64_t j = 0; j < count; ++j) sum += std::exp(logit(j) - most);
    return most + std::log(sum);
  }

  const InfoNce& in_;
  const bool sizes_;
  double largest_ = 1;
  std::vector<double> logits_, rows_, columns_;
};

inline void info_nce(Case& c) {
  const NceInputs in(c);
  const Tensor* loss = c.draw.coin("loss") ? &c.dense("loss", {in.sizes.B}, c.forward_tolerance) : nullptr;
  const Tensor* total = c.draw.coin("total") ? &c.dense("total", {}, c.forward_tolerance) : nullptr;
  const Tensor& log_sums = c.dense("log_sums", {in.symmetric ? 2 : 1, in.sizes.B}, c.forward_tolerance);
  const Tensor* dqueries = in.symmetric ? nullptr : in.gradient(c, "dqueries", in.queries);
  const Tensor* dkeys = in.symmetric ? nullptr : in.gradient(c, "dkeys", in.keys);
  c.run([&](Variant v) {
    InfoNce args = in.args(c, v == sizes ? exact : v);
    args.loss = view(loss, v), args.total = view(total, v), args.log_sums = log_sums.view(v);
    args.dqueries = view(dqueries, v), args.dkeys = view(dkeys, v);
    if (v == drawn) return c.kernels(v).info_nce(args);
    const PlainNce truth(args, v == sizes);
    truth.write_losses();
    truth.write_gradients({}, args.dqueries, args.dkeys);
  });
}

inline void info_nce_bwd(Case& c) {
  const NceInputs in(c);
  const Tensor& grad = c.input("grad", {in.sizes.B});
  const Tensor& log_sums = c.scratch("log_sums", {in.symmetric ? 2 : 1, in.sizes.B});
  const Tensor *dqueries = in.gradient(c, "dqueries", in.queries), *dkeys = in.gradient(c, "dkeys", in.keys);
  c.run([&](Variant v) {
    InfoNceBwd args{};
    args.forward = in.args(c, v == sizes ? exact : v);
    args.grad = grad.view(v == sizes ? exact : v), args.dqueries = view(dqueries, v), args.dkeys = view(dkeys, v);
    if (v != drawn)
      return PlainNce(args.forward, v == sizes).write_gradients(args.grad, args.dqueries, args.dkeys);
    args.forward.log_sums = log_sums.view(v);
    c.kernels(v).info_nce(args.forward);
    c.kernels(v).info_nce_bwd(args);
  });
}

}  // namespace fastlvm::test
