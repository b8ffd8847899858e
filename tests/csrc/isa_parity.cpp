// Every op of every instruction set that runs here against the float64 arithmetic of the same source, on random inputs.
// For targets that Python does not reach, such as AArch64 under emulation:
//   aarch64-linux-gnu-g++ -static -std=c++20 -O2 -Icsrc tests/csrc/isa_parity.cpp csrc/isa/*.cpp csrc/common/*.cpp
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "common/dispatch.h"
#include "common/threads.h"

using namespace fastlvm;

// A contiguous array, of float32 or float64, with the same values.
struct Tensor {
  std::vector<float> f32;
  std::vector<double> f64;
  std::vector<int64_t> shape;

  TensorView view(bool float64) {
    TensorView view;
    view.data = float64 ? static_cast<void*>(f64.data()) : static_cast<void*>(f32.data());
    view.dtype = float64 ? DType::f64 : DType::f32;
    view.rank = static_cast<int>(shape.size());
    int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) view.shape[i] = shape[i], view.stride[i] = stride, stride *= shape[i];
    return view;
  }
  double error() const {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < f64.size(); ++i) {
      difference += (f32[i] - f64[i]) * (f32[i] - f64[i]);
      norm += f64[i] * f64[i];
    }
    return std::sqrt(difference / (norm > 0 ? norm : 1));
  }
};

std::mt19937 generator(7);

Tensor make(std::vector<int64_t> shape, const std::function<float(float)>& f = [](float x) { return x; }) {
  Tensor tensor;
  tensor.shape = std::move(shape);
  int64_t count = 1;
  for (const int64_t size : tensor.shape) count *= size;
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) tensor.f32.push_back(f(normal(generator)));
  tensor.f64.assign(tensor.f32.begin(), tensor.f32.end());
  return tensor;
}

double scan_error(int64_t B, int64_t D, int64_t L, int64_t N, const Kernels& kernels) {
  const auto negative = [](float x) { return -std::exp(x); };
  Tensor u = make({B, D, L}), delta = make({B, D, L}), z = make({B, D, L}), A = make({D, N}, negative);
  Tensor Bm = make({B, 2, N, L}), Cm = make({D, N}), skip = make({D}), bias = make({D}), h0 = make({B, D, N});
  Tensor out = make({B, D, L}), last = make({B, D, N}), grad = make({B, D, L}), grad_last = make({B, D, N});
  std::vector<Tensor> g = {u, delta, A, Bm, Cm, skip, z, bias, h0};
  for (const bool wide : {false, true}) {
    SsmScan args{B,
                 D,
                 L,
                 N,
                 nullptr,
                 wide,
                 true,
                 u.view(wide),
                 delta.view(wide),
                 z.view(wide),
                 A.view(wide),
                 Bm.view(wide),
                 Cm.view(wide),
                 skip.view(wide),
                 bias.view(wide),
                 h0.view(wide),
                 out.view(wide),
                 last.view(wide)};
    kernels.ssm_scan(args);
    args.out = args.final_state = TensorView();
    kernels.ssm_scan_bwd({args, grad.view(wide), grad_last.view(wide), g[0].view(wide), g[1].view(wide),
                          g[2].view(wide), g[3].view(wide), g[4].view(wide), g[5].view(wide), g[6].view(wide),
                          g[7].view(wide), g[8].view(wide)});
  }
  double worst = std::fmax(out.error(), last.error());
  for (const Tensor& gradient : g) worst = std::fmax(worst, gradient.error());
  return worst;
}

double conv_error(int64_t B, int64_t D, int64_t L, int64_t W, const Kernels& kernels) {
  Tensor x = make({B, D, L}), weight = make({D, W}), bias = make({D}), h0 = make({B, D, W - 1});
  Tensor out = make({B, D, L}), last = make({B, D, W - 1}), grad = make({B, D, L}), grad_last = make({B, D, W - 1});
  std::vector<Tensor> g = {x, weight, bias, h0};
  for (const bool wide : {false, true}) {
    CausalConv1d args{B,
                      D,
                      L,
                      W,
                      nullptr,
                      wide,
                      true,
                      x.view(wide),
                      out.view(wide),
                      weight.view(wide),
                      bias.view(wide),
                      h0.view(wide),
                      last.view(wide)};
    kernels.causal_conv1d(args);
    args.out = args.final_state = TensorView();
    kernels.causal_conv1d_bwd({args, grad.view(wide), grad_last.view(wide), g[0].view(wide), g[1].view(wide),
                               g[2].view(wide), g[3].view(wide)});
  }
  double worst = std::fmax(out.error(), last.error());
  for (const Tensor& gradient : g) worst = std::fmax(worst, gradient.error());
  return worst;
}

int main() {
  int failures = 0;
  set_num_threads(2);
  for (const std::string& name : available_isas()) {
    set_isa(name);
    double scan = 0, conv = 0;
    for (const int64_t L : {1, 5, 70})
      for (const int64_t N : {1, 3, 4, 16, 37, 128}) scan = std::fmax(scan, scan_error(2, 20, L, N, active_kernels()));
    for (const int64_t L : {1, 5, 70})
      for (const int64_t W : {1, 2, 4, 9}) conv = std::fmax(conv, conv_error(2, 20, L, W, active_kernels()));
    std::printf("%-7s scan %.1e conv %.1e (worst relative error, forward and gradients)\n", name.c_str(), scan, conv);
    failures += scan > 1e-5 || conv > 1e-6;
  }
  shutdown_threads();
  return failures;
}
