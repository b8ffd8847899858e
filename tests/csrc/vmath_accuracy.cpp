// Worst error of the functions of common/vmath.h, in units in the last place, on every instruction set that runs here:
// over every float (STRIDE given: every so many) of the range that vmath_functions.cpp gives for a function, and over
// every 1009th of all others.
//   make -f tests/csrc/native.mk vmath
//   vmath_accuracy [quick | STRIDE]
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "vmath_functions.h"

using namespace fastlvm::test;

static std::vector<const VectorMath*>& all() {
  static std::vector<const VectorMath*> found;
  return found;
}

bool fastlvm::test::add(const VectorMath& math) {
  all().push_back(&math);
  return true;
}

static bool runs([[maybe_unused]] const VectorMath& math) {
#if defined(__x86_64__)
  if (!std::strcmp(math.isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(math.isa, "avx512")) return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Worst {
  float error = 0, at = 0;
};

// The floats begin, begin + stride, ... below end, given as bits; so all of one sign.
struct Span {
  uint64_t begin, end, stride;
};

constexpr int64_t block = 2048;
constexpr uint64_t floats_per_task = 1 << 20;

// Cut so that threads can share them.
static void cut(std::vector<Span>& spans, uint64_t begin, uint64_t end, uint64_t stride) {
  for (uint64_t at = begin; at < end; at += floats_per_task * stride)
    spans.push_back({at, std::min(end, at + floats_per_task * stride), stride});
}

static std::vector<Span> spans_of(const Function& f, uint64_t inside) {
  constexpr uint64_t outside = 1009, negative = 0x80000000u;
  std::vector<Span> spans;
  const uint64_t high = bits_of(f.high) + uint64_t{1}, low = bits_of(f.low) + uint64_t{1};
  cut(spans, 0, high, inside);
  cut(spans, negative, low, inside);
  cut(spans, high, negative, outside);
  cut(spans, low, 2 * negative, outside);
  return spans;
}

// Compares one block of `in` on all instruction sets.
static void compare(const std::vector<const VectorMath*>& maths, int f, const float* in, std::vector<Worst>& worst) {
  alignas(64) float got[block], errors[block];
  alignas(64) double exact[block];
  maths.back()->functions[f].exact(in, exact, block);
  for (size_t m = 0; m < maths.size(); ++m) {
    maths[m]->functions[f].vector(in, got, block);
    maths.back()->errors(maths[m]->functions[f], got, exact, errors, block);
    for (int64_t i = 0; i < block; ++i)
      if (errors[i] > worst[m].error) worst[m] = {errors[i], in[i]};
  }
}

static void compare(const std::vector<const VectorMath*>& maths, int f, const Span& span, std::vector<Worst>& worst) {
  alignas(64) float in[block];
  for (uint64_t at = span.begin; at < span.end;) {
    for (int64_t i = 0; i < block; ++i) {
      in[i] = from_bits(static_cast<uint32_t>(at < span.end ? at : span.begin));
      at += span.stride;
    }
    compare(maths, f, in, worst);
  }
}

// NaN, both infinities and zeros, the ends of the subnormal and of the normal numbers.
static void compare_specials(const std::vector<const VectorMath*>& maths, int f, std::vector<Worst>& worst) {
  std::vector<float> in;
  for (const uint32_t bits : {0u, 1u, 0x7fffffu, 0x800000u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fc00000u})
    for (const uint32_t sign : {0u, 0x80000000u}) in.push_back(from_bits(sign | bits));
  in.resize(block);
  compare(maths, f, in.data(), worst);
}

int main(int argc, char** argv) {
  const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
  const uint64_t stride = argc > 1 && !quick ? std::strtoull(argv[1], nullptr, 10) : 1;
  std::vector<const VectorMath*> maths;
  for (const VectorMath* math : all())
    if (runs(*math)) maths.push_back(math);
  std::sort(maths.begin(), maths.end(), [](auto a, auto b) { return a->width < b->width; });
  int failures = 0;
  if (const double error = maths.back()->exact_error(); !(error < 1e-15)) {
    std::printf("the exact functions are wrong by %.1e\n", error);
    ++failures;
  }
  for (int f = 0; f < maths[0]->count; ++f) {
    const Function& function = maths[0]->functions[f];
    const std::vector<Span> spans = spans_of(function, quick ? static_cast<uint64_t>(function.quick) : stride);
    std::vector<Worst> worst(maths.size());
    compare_specials(maths, f, worst);
    std::atomic<size_t> next{0};
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t)
      threads.emplace_back([&] {
        std::vector<Worst> own(maths.size());
        for (size_t i; (i = next++) < spans.size();) compare(maths, f, spans[i], own);
        std::lock_guard lock(mutex);
        for (size_t m = 0; m < maths.size(); ++m)
          if (own[m].error > worst[m].error) worst[m] = own[m];
      });
    for (std::thread& thread : threads) thread.join();
    for (size_t m = 0; m < maths.size(); ++m) {
      const bool bad = worst[m].error > function.bound;
      std::printf("%-9s %-7s %.2f ulp at %a (%g)%s\n", function.name, maths[m]->isa,
                  static_cast<double>(worst[m].error), static_cast<double>(worst[m].at),
                  static_cast<double>(worst[m].at), bad ? "  beyond its bound" : "");
      failures += bad;
    }
    std::fflush(stdout);
  }
  return failures > 0;
}
