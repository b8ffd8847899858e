// Some ops as plain loops over float64 arrays, as kernels.h defines them: truth that shares no index with the kernels.
#pragma once

#include "cases.h"

namespace fastlvm::test::plain {

inline int64_t offset_of(const TensorView& view, std::initializer_list<int64_t> index) {
  int64_t offset = 0;
  int axis = 0;
  for (const int64_t i : index) offset += i * view.stride[axis++];
  return offset;
}

// 0 of an array that was not given.
inline double at(const TensorView& view, std::initializer_list<int64_t> index) {
  return view.dtype == DType::none ? 0 : get(view, offset_of(view, index));
}

inline void set(const TensorView& view, std::initializer_list<int64_t> index, double x) {
  if (view.dtype != DType::none) put(view, offset_of(view, index), x);
}

inline double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

inline double silu(double x) { return x / (1 + std::exp(-x)); }

inline double gate(const TensorView& z, std::initializer_list<int64_t> index) {
  return z.dtype == DType::none ? 1 : silu(at(z, index));
}

// Of D [H] or [H, P].
inline double skip(const TensorView& D, int64_t head, int64_t p) {
  return D.rank == 2 ? at(D, {head, p}) : at(D, {head});
}

inline int64_t slot_of(const int64_t* indices, int64_t i) { return indices ? indices[i] : i; }

// The group of a channel, of projections [.., G, N].
inline int64_t group_of(const TensorView& projection, int64_t channel, int64_t channels) {
  return channel * projection.shape[projection.rank - 2] / channels;
}

inline void ssm_step(const SsmStep& args) {
  for (int64_t i = 0; i < args.batch; ++i)
    for (int64_t d = 0; d < args.dim; ++d) {
      const int64_t slot = slot_of(args.indices, i);
      set(args.out, {i, d}, 0);
      if (slot < 0) continue;
      double delta = at(args.delta, {i, d}) + at(args.delta_bias, {d}), y = at(args.D, {d}) * at(args.x, {i, d});
      if (args.delta_softplus) delta = softplus(delta);
      const int64_t in = group_of(args.B, d, args.dim), out = group_of(args.C, d, args.dim);
      for (int64_t n = 0; n < args.state_size; ++n) {
        const double h = std::exp(delta * at(args.A, {d, n})) * at(args.state, {slot, d, n}) +
                         delta * at(args.B, {i, in, n}) * at(args.x, {i, d});
        set(args.state, {slot, d, n}, h);
        y += at(args.C, {i, out, n}) * h;
      }
      set(args.out, {i, d}, y * gate(args.z, {i, d}));
    }
}

inline void ssd_step(const SsdStep& args) {
  for (int64_t i = 0; i < args.batch; ++i)
    for (int64_t head = 0; head < args.heads; ++head)
      for (int64_t p = 0; p < args.dim; ++p) {
        const int64_t slot = slot_of(args.indices, i);
        set(args.out, {i, head, p}, 0);
        if (slot < 0) continue;
        const double x = at(args.x, {i, head, p});
        double dt = at(args.dt, {i, head}) + at(args.dt_bias, {head}), y = skip(args.D, head, p) * x;
        if (args.dt_softplus) dt = softplus(dt);
        const double decay = std::exp(dt * at(args.A, {head}));
        const int64_t in = group_of(args.B, head, args.heads), out = group_of(args.C, head, args.heads);
        for (int64_t n = 0; n < args.state_size; ++n) {
          const double h = decay * at(args.state, {slot, head, p, n}) + dt * x * at(args.B, {i, in, n});
          set(args.state, {slot, head, p, n}, h);
          y += at(args.C, {i, out, n}) * h;
        }
        set(args.out, {i, head, p}, y * gate(args.z, {i, head, p}));
      }
}

inline void causal_conv1d_step(const CausalConv1dStep& args) {
  const int64_t older = args.length - (args.width - 1);
  for (int64_t i = 0; i < args.batch; ++i)
    for (int64_t d = 0; d < args.dim; ++d) {
      const int64_t slot = slot_of(args.indices, i);
      set(args.out, {i, d}, 0);
      if (slot < 0) continue;
      const double x = at(args.x, {i, d});
      double y = at(args.bias, {d}) + at(args.weight, {d, args.width - 1}) * x;
      for (int64_t k = 0; k < args.width - 1; ++k) y += at(args.weight, {d, k}) * at(args.state, {slot, d, older + k});
      for (int64_t j = 0; j < args.length; ++j)
        set(args.state, {slot, d, j}, j + 1 < args.length ? at(args.state, {slot, d, j + 1}) : x);
      set(args.out, {i, d}, args.silu ? silu(y) : y);
    }
}

// [rows, columns] of numbers, as a float64 array.
struct Numbers {
  std::vector<double> data;
  int64_t columns;

  Numbers(int64_t rows, int64_t columns) : data(static_cast<size_t>(rows * columns) + 1), columns(columns) {}
  double& at(int64_t i, int64_t j) { return data[static_cast<size_t>(i * columns + j)]; }
  TensorView view(int64_t first = 0) {  // the columns from `first` on
    TensorView out;
    out.data = data.data() + first, out.dtype = DType::f64, out.rank = 2;
    out.stride[0] = columns, out.stride[1] = 1;
    return out;
  }
};

// Columns [first, first + size) of a row, over their root mean square and times the norm, where it is given.
inline void normalise(Numbers& x, int64_t row, int64_t first, int64_t size, const TensorView& norm, double eps) {
  if (norm.dtype == DType::none) return;
  double squares = 0;
  for (int64_t j = 0; j < size; ++j) squares += x.at(row, first + j) * x.at(row, first + j);
  const double root = std::sqrt(squares / static_cast<double>(size) + eps);
  for (int64_t j = 0; j < size; ++j) x.at(row, first + j) *= at(norm, {j}) / root;
}

inline void mamba_step(const MambaStep& args) {
  const int64_t b = args.batch, M = args.model, D = args.dim, N = args.state_size, R = args.rank;
  const auto product = [&](Numbers& out, const TensorView& matrix, const TensorView& in, int64_t depth,
                           const TensorView& bias) {
    for (int64_t i = 0; i < b; ++i)
      for (int64_t r = 0; r < out.columns; ++r) {
        out.at(i, r) = at(bias, {r});
        for (int64_t k = 0; k < depth; ++k) out.at(i, r) += at(matrix, {r, k}) * at(in, {i, k});
      }
  };
  Numbers xz(b, 2 * D), u(b, D), p(b, R + 2 * N), delta(b, D), A(D, N), y(b, D), out(b, M);
  product(xz, args.in_proj, args.x, M, args.in_bias);
  CausalConv1dStep conv{};
  conv.batch = b, conv.dim = D, conv.width = args.width, conv.length = args.length, conv.silu = true;
  conv.x = xz.view(), conv.out = u.view(), conv.state = args.conv_state;
  conv.weight = args.conv_weight, conv.bias = args.conv_bias;
  causal_conv1d_step(conv);
  product(p, args.x_proj, u.view(), D, {});
  for (int64_t i = 0; i < b; ++i) {
    normalise(p, i, 0, R, args.dt_norm, args.norm_eps);
    normalise(p, i, R, N, args.B_norm, args.norm_eps);
    normalise(p, i, R + N, N, args.C_norm, args.norm_eps);
  }
  product(delta, args.dt_proj, p.view(), R, {});
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < N; ++n) A.at(d, n) = -std::exp(at(args.A_log, {d, n}));
  const auto group = [&](int64_t first) {
    TensorView view = p.view(first);
    view.rank = 3, view.shape[1] = 1, view.stride[1] = 0, view.stride[2] = 1;
    return view;
  };
  SsmStep scan{};
  scan.batch = b, scan.dim = D, scan.state_size = N, scan.delta_softplus = true;
  scan.state = args.ssm_state, scan.x = u.view(), scan.delta = delta.view(), scan.z = xz.view(D), scan.out = y.view();
  scan.A = A.view(), scan.B = group(R), scan.C = group(R + N), scan.D = args.D, scan.delta_bias = args.dt_bias;
  ssm_step(scan);
  product(out, args.out_proj, y.view(), D, args.out_bias);
  for (int64_t i = 0; i < b; ++i)
    for (int64_t m = 0; m < M; ++m) set(args.out, {i, m}, out.at(i, m));
}

inline void ssd_scan(const SsdScan& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t entry = args.offsets ? 0 : b;
    const int64_t begin = args.offsets ? args.offsets[b] : 0, end = args.offsets ? args.offsets[b + 1] : args.length;
    for (int64_t head = 0; head < args.heads; ++head)
      for (int64_t p = 0; p < args.dim; ++p) {
        const int64_t group = group_of(args.B, head, args.heads);
        std::vector<double> h;
        for (int64_t n = 0; n < args.state; ++n) h.push_back(at(args.initial_state, {b, head, p, n}));
        for (int64_t t = begin; t < end; ++t) {
          const double x = at(args.x, {entry, t, head, p});
          double dt = at(args.dt, {entry, t, head}) + at(args.dt_bias, {head}), y = skip(args.D, head, p) * x;
          if (args.dt_softplus) dt = softplus(dt);
          const double decay = std::exp(dt * at(args.A, {head}));
          for (size_t n = 0; n < h.size(); ++n) {
            h[n] = decay * h[n] + dt * x * at(args.B, {entry, t, group, static_cast<int64_t>(n)});
            y += at(args.C, {entry, t, group, static_cast<int64_t>(n)}) * h[n];
          }
          set(args.out, {entry, t, head, p}, y * gate(args.z, {entry, t, head, p}));
        }
        for (size_t n = 0; n < h.size(); ++n) set(args.final_state, {b, head, p, static_cast<int64_t>(n)}, h[n]);
      }
  }
}

}  // namespace fastlvm::test::plain
