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
