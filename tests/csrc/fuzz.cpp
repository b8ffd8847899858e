// Random cases of every op and instruction set until the time is over, on all cores; see ops.h for what is drawn and
// what must hold. `make fuzz` builds and runs it under AddressSanitizer.
//   fuzz SECONDS [SEED]   ends with the number of cases and of findings; exit status 1 if there are any
//   fuzz OP ISA SEED      one case again
#include <sys/wait.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "common/cores.h"
#include "common/dispatch.h"
#include "ops.h"

using namespace fastlvm;
using namespace fastlvm::test;

constexpr int max_jobs = 64;
constexpr int64_t findings_per_job = 20;  // enough to look into

// Shared with the parent, which reads on when a job has crashed.
struct Progress {
  int64_t cases[std::size(ops)], findings;
  size_t op;
  char isa[16];
  uint64_t seed;  // of the case being run
  double worst;
};

static void work(Progress& progress, uint64_t first_seed, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const std::vector<std::string> isas = available_isas();
  for (uint64_t seed = first_seed; progress.findings < findings_per_job; ++seed)
    for (const std::string& isa : isas) {
      set_isa(isa);
      isa.copy(progress.isa, sizeof progress.isa - 1);
      progress.isa[isa.size()] = 0;
      for (size_t i = 0; i < std::size(ops); ++i) {
        if (std::chrono::steady_clock::now() >= deadline) return;
        progress.op = i, progress.seed = seed;
        const std::string failure = run_case(ops[i], active_kernels(), seed, progress.worst, nullptr);
        ++progress.cases[i];
        if (failure.empty()) continue;
        ++progress.findings;
        std::fprintf(stderr, "failed: %s\n", failure.c_str());
      }
    }
}

static int one_case(const std::string& name, const std::string& isa, uint64_t seed) {
  for (const Op& op : ops) {
    if (name != op.name) continue;
    set_isa(isa);
    double worst = 0;
    const std::string failure = run_case(op, active_kernels(), seed, worst, nullptr);
    std::printf("%s\n", failure.empty() ? "ok" : failure.c_str());
    return !failure.empty();
  }
  std::fprintf(stderr, "no op is called %s\n", name.c_str());
  return 2;
}

int main(int argc, char** argv) {
  if (argc == 4) return one_case(argv[1], argv[2], std::strtoull(argv[3], nullptr, 10));
  const double seconds = argc > 1 ? std::strtod(argv[1], nullptr) : 60;
  const uint64_t seed =
      argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::chrono::system_clock::now().time_since_epoch().count();
  const int jobs = std::min(available_cores(), max_jobs);
  void* const map =
      mmap(nullptr, sizeof(Progress) * max_jobs, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return 2;
  Progress* const progress = static_cast<Progress*>(map);
  std::vector<pid_t> children;
  for (int job = 0; job < jobs; ++job) {
    children.push_back(fork());
    if (children.back() != 0) continue;
    work(progress[job], seed + (static_cast<uint64_t>(job) << 32), seconds);
    shutdown_threads();
    std::exit(0);
  }
  int64_t findings = 0, cases = 0;
  double worst = 0;
  for (int job = 0; job < jobs; ++job) {
    const Progress& done = progress[job];
    int status = 0;
    waitpid(children[static_cast<size_t>(job)], &status, 0);
    if (status != 0)
      std::fprintf(stderr, "crashed: %s %s %llu\n", ops[done.op].name, done.isa,
                   static_cast<unsigned long long>(done.seed));
    findings += done.findings + (status != 0);
    worst = std::max(worst, done.worst);
  }
  for (size_t i = 0; i < std::size(ops); ++i) {
    int64_t count = 0;
    for (int job = 0; job < jobs; ++job) count += progress[job].cases[i];
    std::printf("%s %lld, ", ops[i].name, static_cast<long long>(count));
    cases += count;
  }
  std::printf("together %lld cases in %.0f s from seed %llu; worst error %.2f of what is allowed; findings: %lld\n",
              static_cast<long long>(cases), seconds, static_cast<unsigned long long>(seed), worst,
              static_cast<long long>(findings));
  return findings > 0;
}
