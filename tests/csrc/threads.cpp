// The thread team on its own, for a run under ThreadSanitizer:
//   g++ -std=c++20 -O1 -g -fsanitize=thread -Icsrc tests/csrc/threads.cpp csrc/common/{threads,cores}.cpp -pthread &&
//   ./a.out
#include "common/threads.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace fastlvm;

template <class F>
void run(int64_t count, F f) {
  run_tasks(count, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
}

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Every task runs once, and what it wrote is seen by the caller.
void run_once_each(int64_t count) {
  std::vector<int> hits(static_cast<size_t>(count));
  run(count, [&](int64_t i) { ++hits[static_cast<size_t>(i)]; });
  for (const int hit : hits) expect(hit == 1, "each task runs once");
}

int main() {
  set_num_threads(4);
  for (int i = 0; i < 2000; ++i) run_once_each(i % 37);
  for (int i = 0; i < 20; ++i) {  // from the workers' sleep
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    run_once_each(8);
  }

  for (int i = 0; i < 200; ++i) {
    std::string caught;
    try {
      run(50, [](int64_t task) {
        if (task % 7 == 3) throw std::runtime_error("from a task");
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    expect(caught == "from a task", "an exception reaches the caller");
    run_once_each(9);
  }

  std::atomic<int> inner{0};
  run(6, [&](int64_t) { run(5, [&](int64_t) { ++inner; }); });
  expect(inner == 30, "a task may start tasks");

  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([c] {
      for (int i = 0; i < 300; ++i) {
        run_once_each(20);
        if (c == 0 && i % 50 == 0) set_num_threads(2 + i / 50 % 3);
      }
    });
  for (auto& caller : callers) caller.join();

  shutdown_threads();
  run_once_each(20);
  std::puts("ok");
}
