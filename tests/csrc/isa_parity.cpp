// Every op of every instruction set that runs here against the float64 arithmetic of the same source, on drawn arrays:
// see ops.h. Also: several callers at once, and a child after a fork. The targets test-sanitize and test-arm of the
// Makefile build and run it:
//   isa_parity [CASES]   cases of each op and instruction set
#include <sys/wait.h>

#include <cstdio>
#include <thread>

#include "common/dispatch.h"
#include "ops.h"

using namespace fastlvm;
using namespace fastlvm::test;

static int failures = 0;

static void report(const std::string& failure) {
  if (failure.empty()) return;
  std::fprintf(stderr, "failed: %s\n", failure.c_str());
  ++failures;
}

// So that no value of a choice is left out by the way the seeds fall.
static void expect_every_value(const std::string& op, const Coverage& coverage) {
  for (const auto& [what, values] : coverage)
    for (const auto& [value, times] : values)
      if (times == 0) report(op + ": no case has " + what + " = " + std::to_string(value) + ", ask for more cases");
}

static void several_callers(const Kernels& kernels) {
  std::string failure[3];
  std::vector<std::thread> callers;
  for (size_t i = 0; i < 3; ++i)
    callers.emplace_back([&, i] {
      double worst = 0;
      for (const Op& op : ops)
        for (uint64_t seed = 0; seed < 10 && failure[i].empty(); ++seed)
          failure[i] = run_case(op, kernels, 1000 * i + seed, worst, nullptr);
    });
  for (auto& caller : callers) caller.join();
  for (const std::string& each : failure) report(each);
}

[[maybe_unused]] static void after_fork(const Kernels& kernels) {
  const pid_t child = fork();
  if (child == 0) {
    double worst = 0;
    failures = 0;
    for (const Op& op : ops)
      for (uint64_t seed = 0; seed < 10; ++seed) report(run_case(op, kernels, seed, worst, nullptr));
    _exit(failures > 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (status != 0) report(std::string("a forked child with ") + kernels.name);
}

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200;
  for (const std::string& name : available_isas()) {
    set_isa(name);
    const Kernels& kernels = active_kernels();
    std::printf("%-7s", name.c_str());
    for (const Op& op : ops) {
      double worst = 0;
      Coverage coverage;
      for (uint64_t seed = 0; seed < cases; ++seed) report(run_case(op, kernels, seed, worst, &coverage));
      expect_every_value(op.name, coverage);
      std::printf(" %s %.2f", op.name, worst);
    }
    several_callers(kernels);
#if !defined(FASTLVM_TSAN)  // which has no threads after a fork
    after_fork(kernels);
#endif
    std::printf("\n");
    std::fflush(stdout);
  }
  shutdown_threads();
  std::printf("%s: worst error of %llu cases each, as a part of what is allowed\n", failures ? "failed" : "ok",
              static_cast<unsigned long long>(cases));
  return failures > 0;
}
