// What the layers of a forward pass work with: the stream, memory, products shared by the team, time.
#pragma once

#include "common/phases.h"
#include "common/vmath.h"
#include "common/workspace.h"
#include "predictor/network.h"
#include "predictor/product.h"

namespace fastlvm::FASTLVM_ISA::predict {

constexpr int64_t work_worth_sharing = 1 << 17;  // multiply-adds of weights: some µs of one core
constexpr int64_t tasks_per_thread = 8;

constexpr int64_t padded(int64_t dim) { return round_up(dim, block_outputs); }

struct Rows {
  float* data;
  int64_t count, dim;
  int64_t stride() const { return padded(dim); }
  float* row(int64_t r) const { return data + r * stride(); }
};

// One forward pass: its memory and its clock.
class Run {
 public:
  explicit Run(const Prediction& args) : args(args) {
    if (args.nanoseconds) since_ = nanoseconds_now();
  }

  // Memory until the Scratch goes.
  template <class T>
  T* take(int64_t count) const {
    return static_cast<T*>(args.workspace->take(static_cast<size_t>(count) * sizeof(T)));
  }
  Rows rows(int64_t count, int64_t dim) const { return {take<float>(count * padded(dim)), count, dim}; }

  // What was done since the last call counts as `phase`.
  void lap(Phase phase) {
    if (!args.nanoseconds) return;
    const int64_t now = nanoseconds_now();
    args.nanoseconds[layer * phases + static_cast<int>(phase)] += now - since_;
    since_ = now;
  }

  const Prediction& args;
  int64_t layer = 0;  // of the model's list, for the clock

 private:
  int64_t since_ = 0;
};

class Scratch {
 public:
  explicit Scratch(const Run& run) : workspace_(*run.args.workspace), mark_(workspace_.mark()) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { workspace_.release(mark_); }

 private:
  Workspace& workspace_;
  size_t mark_;
};

// The stream: rows of all positions of all windows, or one row a window once only the newest is left. A layer that
// changes its width writes to `other` and turns.
struct Stream {
  Rows now;
  float* other;
  int64_t windows, positions;

  Rows next(int64_t dim) const { return {other, now.count, dim}; }
  void turn(Rows to) {
    other = now.data;
    now = to;
  }
};

// f(begin, end) over ranges of `count`, whole multiples of `grain` but for the last.
template <class F>
inline void ranges(int64_t count, int64_t grain, bool share, F f) {
  const int64_t grains = div_up(count, grain);
  const int64_t tasks = share ? smaller(grains, tasks_per_thread * threads_of_job()) : 1;
  parallel(tasks, share, [&](int64_t task) {
    const int64_t begin = grains * task / tasks * grain, end = smaller(count, grains * (task + 1) / tasks * grain);
    if (begin < end) f(begin, end);
  });
}

template <class F>
inline void each_row(int64_t rows, int64_t dim, F f) {
  ranges(rows, 1, rows * dim > work_worth_sharing, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

inline const Product& product_of(const Run& run, const Matrix& m) {
  return *run.args.products->of[static_cast<int>(m.precision)];
}

// Rows as the products of `m` read them: the first m.inputs numbers of each, whatever the rows' own width is.
class Prepared {
 public:
  Prepared(const Run& run, const Matrix& m, const Rows& x) : product_(product_of(run, m)), x_(x), inputs_(m.inputs) {
    const int64_t stride = round_up(m.inputs, 64) * product_.element;
    if (product_.prepare)
      all_ = {x.count, stride, run.take<uint8_t>(x.count * stride), run.take<float>(x.count), 1};
    else
      all_ = {x.count, x.stride() * product_.element, reinterpret_cast<const uint8_t*>(x.data), nullptr, 0};
  }

  void prepare(int64_t begin, int64_t end) const {
    if (product_.prepare)
      product_.prepare(x_.row(begin), x_.stride(), end - begin, inputs_,
                       const_cast<uint8_t*>(all_.data) + begin * all_.stride, all_.stride,
                       const_cast<float*>(all_.scale) + begin);
  }

  const Activations& all() const { return all_; }

 private:
  const Product& product_;
  Rows x_;
  int64_t inputs_;
  Activations all_;
};

inline Activations activations(const Run& run, const Matrix& m, const Rows& x) {
  const Prepared prepared(run, m, x);
  ranges(x.count, 1, x.count * m.inputs > work_worth_sharing,
         [&](int64_t begin, int64_t end) { prepared.prepare(begin, end); });
  return prepared.all();
}

// The newest position of every window alone.
inline Activations newest(const Activations& a, int64_t windows) {
  const int64_t positions = a.rows / windows;
  return {windows, a.stride * positions, a.data + (positions - 1) * a.stride,
          a.scale ? a.scale + (positions - 1) * a.scale_stride : nullptr, a.scale_stride * positions};
}

inline bool worth_sharing(const Matrix& m, int64_t rows) {
  return m.inputs * m.outputs * smaller(rows, 4) > work_worth_sharing;
}

constexpr int64_t grain = 2;  // blocks: the widest tile

// y (+)= x Wᵀ + bias, spread over the team; then(begin, end) follows for the outputs of a task.
template <class Then>
inline void multiply(const Run& run, const Matrix& m, const Activations& a, const Rows& y, bool add, Then then) {
  const Product& product = product_of(run, m);
  ranges(product::blocks_of(m), grain, worth_sharing(m, a.rows), [&](int64_t begin, int64_t end) {
    product.multiply(m, a, begin, end, y.data, y.stride(), add);
    then(begin * block_outputs, end * block_outputs);
  });
}

inline void multiply(const Run& run, const Matrix& m, const Activations& a, const Rows& y, bool add = false) {
  multiply(run, m, a, y, add, [](int64_t, int64_t) {});
}

inline float sum_of_squares(const float* x, int64_t dim) {
  Vec sum = Vec::zero();
  vectors<Vec>(dim, [&](int64_t i, int n) {
    const Vec v = Vec::load_first(x + i, n);
    sum = Vec::fma(v, v, sum);
  });
  return Vec::sum(sum);
}

inline void norm_row(const Norm& norm, const float* x, float* out) {
  const int64_t dim = norm.dim;
  float mean = 0;
  if (norm.centred) {
    Vec sum = Vec::zero();
    vectors<Vec>(dim, [&](int64_t i, int n) { sum = sum + Vec::load_first(x + i, n); });
    mean = Vec::sum(sum) / static_cast<float>(dim);
  }
  Vec squares = Vec::zero();
  vectors<Vec>(dim, [&](int64_t i, int n) {
    const Vec v = Vec::first(Vec::load_first(x + i, n) - Vec::set1(mean), n);
    squares = Vec::fma(v, v, squares);
  });
  const Vec scale = Vec::set1(1.0f / sqrtf(Vec::sum(squares) / static_cast<float>(dim) + norm.eps));
  for (int64_t i = 0; i < padded(dim); i += Vec::width) {  // the weights beyond dim are zero
    Vec v = (Vec::load(x + i) - Vec::set1(mean)) * scale * Vec::load(norm.weight + i);
    if (norm.bias) v = v + Vec::load(norm.bias + i);
    v.store(out + i);
  }
}

inline void apply(const Norm& norm, const Rows& x, const Rows& out) {
  each_row(x.count, x.dim, [&](int64_t r) { norm_row(norm, x.row(r), out.row(r)); });
}

}  // namespace fastlvm::FASTLVM_ISA::predict
