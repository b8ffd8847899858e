// One token of a whole Mamba block, in place on the states of its convolution and its scan: four products of a matrix
// and few vectors, which is what the time goes into, with the one-token ops between them. Nothing but the states is
// rounded on the way.
#pragma once

#include "common/matvec.h"
#include "ops/causal_conv1d_step.h"
#include "ops/ssm_step.h"

namespace fastlvm::FASTLVM_ISA::mamba_one {

using namespace one_token;

constexpr int64_t work_worth_sharing = 1 << 15;  // products of a number of a matrix and one of a vector
constexpr int64_t rows_of_a_task = 32;           // of x_proj and out_proj

template <class V>
class Block {
 public:
  using T = typename V::scalar;

  explicit Block(const MambaStep& args)
      : args_(args),
        projected_(args.rank + 2 * args.state_size),
        x_(args.batch * args.model),
        xz_(args.batch * 2 * args.dim),
        u_(args.batch * args.dim),
        delta_(args.batch * args.dim),
        y_(args.batch * args.dim),
        p_(args.batch * projected_),
        A_(args.dim * args.state_size) {}

  void run() {
    for (int64_t b = 0; b < args_.batch; ++b)
      read_row<V>(x_ + b * args_.model, args_.x, b * args_.x.stride[0], args_.x.stride[1], args_.model);
    const int64_t panels = div_up(args_.dim, panel);
    const auto each_panel = [&](int64_t work, auto f) {
      parallel(panels, is_shared(work),
               [&](int64_t task) { f(task * panel, smaller(panel, args_.dim - task * panel)); });
    };
    each_panel(2 * args_.model, [&](int64_t first, int64_t count) { project_in(first, count); });
    parallel(div_up(projected_, rows_of_a_task), is_shared(projected_), [&](int64_t task) {
      const int64_t first = task * rows_of_a_task;
      const MatVec<V> x_proj(args_.x_proj, {}, args_.batch, u_.get(), args_.dim);
      x_proj(first, smaller(rows_of_a_task, projected_ - first), p_ + first, projected_);
    });
    normalise();
    each_panel(args_.rank + args_.state_size, [&](int64_t first, int64_t count) { scan(first, count); });
    parallel(div_up(args_.model, rows_of_a_task), is_shared(args_.model), [&](int64_t task) {
      project_out(task * rows_of_a_task, smaller(rows_of_a_task, args_.model - task * rows_of_a_task));
    });
  }

 private:
  // Whether a phase with so many products a channel is worth the team.
  bool is_shared(int64_t work) const { return args_.batch * args_.dim * work > work_worth_sharing; }

  // Channels [first, first + count) of x and z, and the convolution of x.
  void project_in(int64_t first, int64_t count) {
    const MatVec<V> in_proj(args_.in_proj, args_.in_bias, args_.batch, x_.get(), args_.model);
    in_proj(first, count, xz_ + first, 2 * args_.dim);
    in_proj(args_.dim + first, count, xz_ + args_.dim + first, 2 * args_.dim);
    CausalConv1dStep conv{};
    conv.dim = args_.dim, conv.width = args_.width, conv.length = args_.length, conv.silu = true;
    conv.x = view(xz_.get(), 2 * args_.dim), conv.out = view(u_.get(), args_.dim);
    conv.state = args_.conv_state, conv.weight = args_.conv_weight, conv.bias = args_.conv_bias;
    for (int64_t b = 0; b < args_.batch; ++b) conv_one::advance_panel<V>(conv, b, b, first, count);
  }

  // δ, B and C over their root mean squares, where they have norms.
  void normalise() {
    for (int64_t b = 0; b < args_.batch; ++b) {
      T* const row = p_ + b * projected_;
      normalise(row, args_.dt_norm, args_.rank);
      normalise(row + args_.rank, args_.B_norm, args_.state_size);
      normalise(row + args_.rank + args_.state_size, args_.C_norm, args_.state_size);
    }
  }

  void normalise(T* x, const TensorView& norm, int64_t count) {
    if (!given(norm)) return;
    double squares = 0;
    for (int64_t i = 0; i < count; ++i) squares += static_cast<double>(x[i]) * x[i];
    const T scale = static_cast<T>(1 / sqrt(squares / static_cast<double>(count) + args_.norm_eps));
    for (int64_t i = 0; i < count; ++i) x[i] *= scale * optional_element<T>(norm, i);
  }

  void scan(int64_t first, int64_t count) {
    const int64_t N = args_.state_size;
    const MatVec<V> dt_proj(args_.dt_proj, {}, args_.batch, p_.get(), projected_);
    dt_proj(first, count, delta_ + first, args_.dim);
    for (int64_t c = first; c < first + count; ++c) {
      T* const A = A_ + c * N;
      read_row<V>(A, args_.A_log, c * args_.A_log.stride[0], args_.A_log.stride[1], N);
      vectors<V>(
          N, [&](int64_t n, int lanes) { (V::zero() - exp(V::load_first(A + n, lanes))).store_first(A + n, lanes); });
    }
    SsmStep step{};
    step.dim = args_.dim, step.state_size = N, step.delta_softplus = true;
    step.state = args_.ssm_state, step.A = view(A_.get(), N), step.D = args_.D, step.delta_bias = args_.dt_bias;
    step.x = view(u_.get(), args_.dim), step.delta = view(delta_.get(), args_.dim);
    step.z = view(xz_ + args_.dim, 2 * args_.dim), step.out = view(y_.get(), args_.dim);
    step.B = group(p_ + args_.rank), step.C = group(p_ + args_.rank + N);
    for (int64_t b = 0; b < args_.batch; ++b) ssm_one::advance_panel<V>(step, b, b, first, count);
  }

  void project_out(int64_t first, int64_t rows) {
    const MatVec<V> out_proj(args_.out_proj, args_.out_bias, args_.batch, y_.get(), args_.dim);
    out_proj(first, rows, x_ + first, args_.model);  // x is not needed any more
    for (int64_t b = 0; b < args_.batch; ++b)
      write_row<V>(x_ + b * args_.model + first, args_.out, offset_of(args_.out, b, first), args_.out.stride[1], rows);
  }

  // What the one-token ops look at of rows `pitch` elements apart.
  static TensorView view(T* data, int64_t pitch) {
    TensorView out;
    out.data = data, out.dtype = dtype_of<T>, out.rank = 2;
    out.stride[0] = pitch, out.stride[1] = 1;
    return out;
  }

  TensorView group(T* data) const {  // [b, 1, N]
    TensorView out = view(data, projected_);
    out.rank = 3, out.shape[1] = 1, out.stride[1] = 0, out.stride[2] = 1;
    return out;
  }

  const MambaStep& args_;
  int64_t projected_;  // R + 2 N
  Buffer<T> x_, xz_, u_, delta_, y_, p_, A_;
};

}  // namespace fastlvm::FASTLVM_ISA::mamba_one
