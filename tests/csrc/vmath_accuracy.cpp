// Worst error of exp, softplus, sigmoid and SiLU of one instruction set, in units in the last place, over every
// STRIDE-th float (1: all of them). Near the smallest normal number an error below 1e-43 passes. Build and run:
//   g++ -std=c++20 -O2 -Icsrc -mavx2 -mfma -mf16c -DFASTLVM_ISA=avx2 -DFASTLVM_VECTOR_AVX2
//   tests/csrc/vmath_accuracy.cpp
//   ./a.out STRIDE
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "common/vmath.h"

using fastlvm::FASTLVM_ISA::Vec;

struct Function {
  const char* name;
  Vec (*vector)(Vec);
  double (*exact)(double);
  double bound;  // units in the last place
};

static double ulp_error(float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : INFINITY;
  if (static_cast<float>(exact) == got) return 0;  // also overflow to inf
  if (std::isinf(got) && std::fabs(exact) > 3.4028234e38) return 0;
  int exponent;
  std::frexp(exact, &exponent);
  return std::fabs(got - exact) / std::ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
}

int main(int argc, char** argv) {
  const uint64_t stride = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1009;
  const Function functions[] = {
      {"exp", [](Vec x) { return exp(x); }, [](double x) { return std::exp(x); }, 2},
      {"softplus", [](Vec x) { return softplus(x); }, [](double x) { return x > 20 ? x : std::log1p(std::exp(x)); }, 4},
      {"sigmoid", [](Vec x) { return sigmoid(x); }, [](double x) { return 1 / (1 + std::exp(-x)); }, 4},
      {"silu", [](Vec x) { return silu(x); }, [](double x) { return x / (1 + std::exp(-x)); }, 4}};
  int failures = 0;
  for (const Function& function : functions) {
    double worst = 0;
    float where = 0;
    for (uint64_t bits = 0; bits < uint64_t{1} << 32;) {
      float in[Vec::width], out[Vec::width];
      for (float& x : in) {
        const uint32_t word = static_cast<uint32_t>(bits);
        memcpy(&x, &word, sizeof x);
        bits += stride;
      }
      function.vector(Vec::load(in)).store(out);
      for (int i = 0; i < Vec::width; ++i) {
        const double exact = function.exact(in[i]);
        if (!std::isnan(exact) && std::fabs(exact) < 1.3e-36 && std::fabs(out[i] - exact) < 1e-43) continue;
        const double error = ulp_error(out[i], exact);
        if (error > worst) worst = error, where = in[i];
      }
    }
    std::printf("%-8s %.2f ulp at %a (%g)\n", function.name, worst, where, where);
    failures += worst > function.bound;
  }
  return failures;
}
