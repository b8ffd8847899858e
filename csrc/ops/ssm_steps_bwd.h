// The inner loops of the backward of the selective scan: a few states of one block through a chunk and back.
#pragma once

#include "ops/ssm_parts.h"

namespace fastlvm::FASTLVM_ISA::ssm {

// The rows of a block over a chunk that only the backward needs. In `z` is the gradient of silu(z) times its slope.
template <class V>
class GradRows : public Rows<V> {
 public:
  using T = typename V::scalar;
  static constexpr int64_t count = Rows<V>::count + 4;

  GradRows(const SsmScan& args, T* memory, int64_t chunk)
      : Rows<V>(args, memory, chunk), size_(chunk * V::width), rows_(memory + Rows<V>::count * size_) {}

  T* slope() const { return rows_; }                // dδ / d delta
  T* grad_y() const { return rows_ + size_; }       // before the gate
  T* along_B() const { return rows_ + 2 * size_; }  // Σ_n g B
  T* along_A() const { return rows_ + 3 * size_; }  // Σ_n g exp(δ A) h_{t-1} A

 private:
  int64_t size_;
  T* rows_;
};

// What `Count` states leave behind on their way through a chunk of one block, and the sums over the blocks of a slice
// that grow on the way back. Rows are [steps, V::width].
template <class V, int Count>
struct Trail {
  using T = typename V::scalar;
  static constexpr int64_t size = (checkpoint_steps + 1) * V::width;

  Trail() : memory(4 * Count * size) {}
  T* h() const { return memory.get(); }  // row t: the state before step t
  T* factor() const { return memory + Count * size; }
  T* dB() const { return memory + 2 * Count * size; }
  T* dC() const { return memory + 3 * Count * size; }

  Buffer<T> memory;
};

// Steps [begin, length) of the states; y is added to where it is wanted.
template <class V, int Count, bool Grows, class B, class C>
FASTLVM_INLINE void retrace(const GradRows<V>& rows, const Trail<V, Count>& trail, V (&h)[Count], const V (&a)[Count],
                            B b, C c, int64_t n, int64_t begin, int64_t length, bool want_y) {
  using T = typename V::scalar;
  constexpr int64_t W = V::width, size = Trail<V, Count>::size;
  const T *const deltas = rows.delta(), *const inputs = rows.input();
  T *const hs = trail.h(), *const factors = trail.factor(), *const ys = rows.y();
  for (int64_t t = begin; t < length; ++t) {
    const V delta = V::load(deltas + t * W), input = V::load(inputs + t * W);
    for (int j = 0; j < Count; ++j) {
      const V x = delta * a[j];
      if constexpr (Grows) {
        h[j] = V::fma(input, b.at(n + j, t), times_any_exp2(h[j], x));
      } else {
        const V factor = exp2(x);
        factor.store(factors + j * size + t * W);
        h[j] = V::fma(factor, h[j], input * b.at(n + j, t));
      }
      h[j].store(hs + j * size + (t + 1) * W);
    }
    if (!want_y) continue;
    V y = V::load(ys + t * W);
    for (int j = 0; j < Count; ++j) y = V::fma(h[j], c.at(n + j, t), y);
    y.store(ys + t * W);
  }
}

// One block's `Count` states from n on through a chunk and back. Grows: a factor may exceed one, or be far below what a
// float holds while the state is large, and is never formed alone. In `carry` is the gradient of the states after the
// chunk, then of those before it. From_zero: nothing came before the chunk and nobody asks for the gradient of it.
template <class V, int Count, bool Grows, class B, class C>
inline void there_and_back(const GradRows<V>& rows, const Trail<V, Count>& trail, const typename V::scalar* A,
                           const typename V::scalar* start, typename V::scalar* carry, typename V::scalar* dA, B b, C c,
                           int64_t n, int64_t length, bool from_zero, bool want_y) {
  using T = typename V::scalar;
  constexpr int64_t W = V::width, size = Trail<V, Count>::size;
  const int64_t first = from_zero ? 1 : 0;
  V h[Count], a[Count], g[Count], sum_A[Count];
  for (int j = 0; j < Count; ++j) {
    a[j] = V::load(A + (n + j) * W);
    h[j] = from_zero ? V::load(rows.input()) * b.at(n + j, 0) : V::load(start + (n + j) * W);
    h[j].store(trail.h() + j * size + first * W);
    g[j] = V::load(carry + (n + j) * W);
    sum_A[j] = V::load(dA + (n + j) * W);
  }
  if (from_zero && want_y) {
    V y = V::load(rows.y());
    for (int j = 0; j < Count; ++j) y = V::fma(h[j], c.at(n + j, 0), y);
    y.store(rows.y());
  }
  retrace<V, Count, Grows>(rows, trail, h, a, b, c, n, first, length, want_y);

  const T *const hs = trail.h(), *const factors = trail.factor(), *const deltas = rows.delta();
  const T *const inputs = rows.input(), *const grad_ys = rows.grad_y();
  T *const dB = trail.dB(), *const dC = trail.dC(), *const along_Bs = rows.along_B(), *const along_As = rows.along_A();
  for (int64_t t = length - 1; t >= first; --t) {
    const V grad_y = V::load(grad_ys + t * W), input = V::load(inputs + t * W), delta = V::load(deltas + t * W);
    V along_B = V::load(along_Bs + t * W), along_A = V::load(along_As + t * W);
    for (int j = 0; j < Count; ++j) {
      const int64_t at = j * size + t * W;
      V::fma(grad_y, h[j], V::load(dC + at)).store(dC + at);
      g[j] = V::fma(grad_y, c.at(n + j, t), g[j]);
      V::fma(input, g[j], V::load(dB + at)).store(dB + at);
      along_B = V::fma(g[j], b.at(n + j, t), along_B);
      h[j] = V::load(hs + at);  // the state before, and below its gradient
      V slope;
      if constexpr (Grows) {
        slope = g[j] * times_any_exp2(h[j], delta * a[j]);
        g[j] = times_any_exp2(g[j], delta * a[j]);
      } else {
        g[j] = g[j] * V::load(factors + at);
        slope = g[j] * h[j];
      }
      along_A = V::fma(slope, a[j], along_A);
      sum_A[j] = V::fma(delta, slope, sum_A[j]);
    }
    along_B.store(along_Bs + t * W);
    along_A.store(along_As + t * W);
  }
  for (int j = 0; j < Count; ++j) {
    if (from_zero) {
      const V grad_y = V::load(grad_ys);
      V::fma(grad_y, h[j], V::load(dC + j * size)).store(dC + j * size);
      g[j] = V::fma(grad_y, c.at(n + j, 0), g[j]);
      V::fma(V::load(inputs), g[j], V::load(dB + j * size)).store(dB + j * size);
      V::fma(g[j], b.at(n + j, 0), V::load(along_Bs)).store(along_Bs);
    }
    g[j].store(carry + (n + j) * W);
    sum_A[j].store(dA + (n + j) * W);
  }
}

// The same for a whole sequence of `Length` steps from a zero state, all of it in registers; the sums over the blocks
// are added to dB and dC. `b` and `c` are the state's projections, `g` the gradient of its final value.
template <class V, int Length>
FASTLVM_INLINE void there_and_back_short(const GradRows<V>& rows, V a, V g, V& sum_A, V (&dB)[Length], V (&dC)[Length],
                                         const typename V::scalar (&b)[Length], const typename V::scalar (&c)[Length],
                                         bool want_y) {
  using T = typename V::scalar;
  constexpr int64_t W = V::width;
  const T *const deltas = rows.delta(), *const inputs = rows.input(), *const grad_ys = rows.grad_y();
  T *const along_Bs = rows.along_B(), *const along_As = rows.along_A(), *const ys = rows.y();
  V h[Length], factor[Length];
  h[0] = V::load(inputs) * V::set1(b[0]);
  for (int t = 1; t < Length; ++t) {
    factor[t] = exp2(V::load(deltas + t * W) * a);
    h[t] = V::fma(factor[t], h[t - 1], V::load(inputs + t * W) * V::set1(b[t]));
  }
  if (want_y)
    for (int t = 0; t < Length; ++t) V::fma(h[t], V::set1(c[t]), V::load(ys + t * W)).store(ys + t * W);
  for (int t = Length - 1; t >= 0; --t) {
    const V grad_y = V::load(grad_ys + t * W);
    dC[t] = V::fma(grad_y, h[t], dC[t]);
    g = V::fma(grad_y, V::set1(c[t]), g);
    dB[t] = V::fma(V::load(inputs + t * W), g, dB[t]);
    V::fma(g, V::set1(b[t]), V::load(along_Bs + t * W)).store(along_Bs + t * W);
    if (t == 0) break;
    g = g * factor[t];
    const V slope = g * h[t - 1];
    V::fma(slope, a, V::load(along_As + t * W)).store(along_As + t * W);
    sum_A = V::fma(V::load(deltas + t * W), slope, sum_A);
  }
}

// Sums over the lanes of rows [length, V::width].
template <class V>
inline void sum_lanes(const typename V::scalar* rows, typename V::scalar* out, int64_t length) {
  constexpr int W = V::width;
  if constexpr (W == 1) return copy(out, rows, length);
  int64_t t = 0;
  for (; t + W <= length; t += W) {
    V square[W];
    for (int i = 0; i < W; ++i) square[i] = V::load(rows + (t + i) * W);
    V::transpose(square);
    for (int span = W / 2; span > 0; span /= 2)
      for (int i = 0; i < span; ++i) square[i] = square[i] + square[i + span];
    square[0].store(out + t);
  }
  for (; t < length; ++t) out[t] = V::sum(V::load(rows + t * W));
}

}  // namespace fastlvm::FASTLVM_ISA::ssm
