// One token of the selective scan, in place on the state. Vectors run over the state dimension N.
#pragma once

#include "ops/step.h"

namespace fastlvm::FASTLVM_ISA::ssm_one {

using namespace one_token;

constexpr int64_t work_worth_sharing = 1 << 17;  // elements b·D·N, as in the scan
constexpr int64_t work_of_a_task = 1 << 13;

// Channels [first, first + count) of row i, whose state is `slot`.
template <class V>
inline void advance_panel(const SsmStep& args, int64_t i, int64_t slot, int64_t first, int64_t count) {
  using T = typename V::scalar;
  T x[panel], delta[panel], input[panel], y[panel];
  fill_zero(y, count);
  const auto write = [&] { write_row<V>(y, args.out, offset_of(args.out, i, first), args.out.stride[1], count); };
  if (slot < 0) return write();
  const auto read = [&](T* out, const TensorView& view) {
    read_row<V>(out, view, offset_of(view, i, first), view.stride[1], count);
  };
  read(x, args.x);
  read(delta, args.delta);
  for (int64_t c = 0; c < count; ++c) delta[c] += optional_element<T>(args.delta_bias, first + c);
  vectors<V>(count, [&](int64_t c, int n) {
    const V raw = V::load_first(delta + c, n), d = args.delta_softplus ? softplus(raw) : raw;
    d.store_first(delta + c, n);
    (d * V::load_first(x + c, n)).store_first(input + c, n);
  });

  Row<V> A_row, state_row;
  Projection<V> B_row(args.B, i, args.dim), C_row(args.C, i, args.dim);
  const int64_t along = args.state.stride[2];
  for (int64_t n = 0; n < args.state_size; n += stretch) {
    const int64_t length = smaller(stretch, args.state_size - n);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t d = first + c;
      const T* const A = A_row.read(args.A, offset_of(args.A, d, n), args.A.stride[1], length);
      const T *const B = B_row.row(d, n, length), *const C = C_row.row(d, n, length);
      const V time = V::set1(delta[c] * static_cast<T>(log2e)), in = V::set1(input[c]);
      y[c] += state_row.update(args.state, offset_of(args.state, slot, d) + n * along, along, length, [&](T* h) {
        return advance<V>(C, h, length, [&](int64_t k, V before, int lanes) {
          const V t = time * Plain<V>::load(A + k, lanes);
          const V kept = are_normal_powers(t) ? times_exp2(before, t) : times_any_exp2(before, t);
          return V::fma(in, Plain<V>::load(B + k, lanes), kept);
        });
      });
    }
  }

  if (given(args.D))
    for (int64_t c = 0; c < count; ++c) y[c] += optional_element<T>(args.D, first + c) * x[c];
  if (given(args.z)) {
    read(x, args.z);
    gate<V>(y, x, count);
  }
  write();
}

template <class V>
inline void forward(const SsmStep& args) {
  // A task is a run of panels of a row, tasks go row by row: the states are read in the order in which they lie.
  const int64_t size = larger(1, args.state_size), run = panel * larger(1, work_of_a_task / (panel * size));
  const int64_t runs = div_up(args.dim, run);
  parallel(args.batch * runs, args.batch * args.dim * size > work_worth_sharing, [&](int64_t task) {
    const int64_t i = task / runs, begin = task % runs * run, end = smaller(args.dim, begin + run);
    for (int64_t first = begin; first < end; first += panel)
      advance_panel<V>(args, i, slot_of(args.indices, i), first, smaller(panel, end - first));
  });
}

}  // namespace fastlvm::FASTLVM_ISA::ssm_one
