// One token of Mamba-2, in place on the state. Vectors run over the state dimension N; a head needs one exponential.
#pragma once

#include "ops/step.h"

namespace fastlvm::FASTLVM_ISA::ssd_one {

using namespace one_token;

constexpr int64_t work_worth_sharing = 1 << 18;  // elements b·h·p·n

// Elements [first, first + count) of p of one head of row i, whose state is `slot`.
template <class V>
inline void advance_panel(const SsdStep& args, int64_t i, int64_t slot, int64_t head, int64_t first, int64_t count) {
  using T = typename V::scalar;
  T x[panel], y[panel];
  fill_zero(y, count);
  const auto at = [&](const TensorView& view, int64_t row) {
    return offset_of(view, row, head) + first * view.stride[2];
  };
  const auto write = [&] { write_row<V>(y, args.out, at(args.out, i), args.out.stride[2], count); };
  if (slot < 0) return write();
  read_row<V>(x, args.x, at(args.x, i), args.x.stride[2], count);
  T dt = element<T>(args.dt, offset_of(args.dt, i, head)) + optional_element<T>(args.dt_bias, head);
  if (args.dt_softplus) dt = softplus(Scalar<T>::set1(dt)).v;
  const V log_decay = V::set1(dt * element<T>(args.A, head * args.A.stride[0]) * static_cast<T>(log2e));
  const Exp2Parts<V> decay = exp2_parts(log_decay);
  const bool normal = are_normal_powers(log_decay);

  Row<V> state_row;
  Projection<V> B_row(args.B, i, args.heads), C_row(args.C, i, args.heads);
  const int64_t along = args.state.stride[3];
  for (int64_t n = 0; n < args.state_size; n += stretch) {
    const int64_t length = smaller(stretch, args.state_size - n);
    const T *const B = B_row.row(head, n, length), *const C = C_row.row(head, n, length);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t offset = at(args.state, slot) + c * args.state.stride[2] + n * along;
      y[c] += state_row.update(args.state, offset, along, length, [&](T* h) {
        return advance<V>(C, h, length, [&, in = V::set1(dt * x[c])](int64_t k, V before, int lanes) {
          const V kept = normal ? times(before, decay) : times_any_exp2(before, log_decay);
          return V::fma(in, Plain<V>::load(B + k, lanes), kept);
        });
      });
    }
  }

  if (given(args.D)) {  // [h] or [h, p]
    const int64_t along_p = args.D.rank == 2 ? args.D.stride[1] : 0;
    for (int64_t c = 0; c < count; ++c)
      y[c] += element<T>(args.D, head * args.D.stride[0] + (first + c) * along_p) * x[c];
  }
  if (given(args.z)) {
    read_row<V>(x, args.z, at(args.z, i), args.z.stride[2], count);
    gate<V>(y, x, count);
  }
  write();
}

template <class V>
inline void forward(const SsdStep& args) {
  const int64_t panels = div_up(args.dim, panel), tasks = args.batch * args.heads * panels;
  parallel(tasks, tasks * panel * larger(1, args.state_size) > work_worth_sharing, [&](int64_t task) {
    const int64_t i = task / (args.heads * panels), head = task / panels % args.heads, first = task % panels * panel;
    advance_panel<V>(args, i, slot_of(args.indices, i), head, first, smaller(panel, args.dim - first));
  });
}

}  // namespace fastlvm::FASTLVM_ISA::ssd_one
