// The vector functions of one instruction set beside exact ones, as vmath_accuracy.cpp compares them.
#pragma once

#include <cstdint>

namespace fastlvm::test {

struct Function {
  const char* name;
  void (*vector)(const float* in, float* out, int64_t count);
  void (*exact)(const float* in, double* out, int64_t count);
  double bound;       // units in the last place
  double negligible;  // an absolute error that passes where |exact| < 2^-119
  float low, high;    // the range that is tested float by float,
  int64_t quick;      // or, in a quick run, every so many floats
};

struct VectorMath {
  const char* isa;
  int width;  // of a vector
  const Function* functions;
  int count;
  // Errors in units in the last place; NaN against a number is infinitely far.
  void (*errors)(const Function& function, const float* got, const double* exact, float* out, int64_t count);
  double (*exact_error)();  // worst relative error of the exact functions against the C library
};

bool add(const VectorMath& math);  // called by each object before main

}  // namespace fastlvm::test
