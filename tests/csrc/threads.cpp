// The thread team and the phases of its jobs on their own, for a run under ThreadSanitizer:
//   g++ -std=c++20 -O1 -g -fsanitize=thread -Icsrc tests/csrc/threads.cpp csrc/common/{threads,phases,cores,memory}.cpp
//   -pthread && ./a.out
#include "common/threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/cores.h"
#include "common/memory.h"
#include "common/phases.h"

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

// Every part of every phase runs once, sees all that the phase before it wrote, and is seen by the caller. `tired`
// milliseconds pass in one part of each phase.
void run_phases(int seats, const std::vector<int64_t>& parts, int tired = 0) {
  const int phases = static_cast<int>(parts.size());
  void* const memory = aligned_allocate(Phases::bytes(phases, seats));
  Phases job(memory, seats, parts.data(), phases);
  std::vector<std::vector<int>> hits;
  for (const int64_t count : parts) hits.emplace_back(static_cast<size_t>(count));
  run(seats, [&](int64_t) {
    for (int phase = 0; phase < phases; ++phase) {
      int64_t done = 0;
      for (int64_t part; (part = job.claim(phase, seat_of_thread() % seats)) >= 0; ++done) {
        if (phase > 0)
          for (const int hit : hits[static_cast<size_t>(phase - 1)]) expect(hit == 1, "a phase follows the one before");
        ++hits[static_cast<size_t>(phase)][static_cast<size_t>(part)];
        if (tired && part == parts[static_cast<size_t>(phase)] / 2)
          std::this_thread::sleep_for(std::chrono::milliseconds(tired));
      }
      job.finish(phase, done);
    }
  });
  for (const auto& phase : hits)
    for (const int hit : phase) expect(hit == 1, "each part runs once");
  aligned_release(memory);
}

// A thread has the parts of its own seat first, in order, and then those that the others have left.
void own_parts_come_first() {
  constexpr int seats = 3;
  void* const memory = aligned_allocate(Phases::bytes(1, seats));
  const int64_t parts[] = {8};  // 0 1 | 2 3 4 | 5 6 7
  Phases job(memory, seats, parts, 1);
  expect(job.claim(0, 2) == 5, "a seat begins with its first part");
  for (const int64_t part : {2, 3, 4, 6, 7, 0, 1}) expect(job.claim(0, 1) == part, "own parts, then those left by others");
  for (int seat = 0; seat < seats; ++seat) expect(job.claim(0, seat) == -1, "nothing is left");
  job.finish(0, 8);  // returns at once
  aligned_release(memory);
}

#if defined(__linux__)

cpu_set_t cores_of(pthread_t thread) {
  cpu_set_t cores{};
  expect(pthread_getaffinity_np(thread, sizeof cores, &cores) == 0, "a thread has cores");
  return cores;
}

// A thread that is confined while it sleeps wakes on a core that is left to it, and then has the cores it had before:
// all of the process if `chosen` is -1, else that one.
void wakes_where_it_is_told(int chosen) {
  std::mutex mutex;
  std::condition_variable called;
  bool go = false, released = false;
  int woke_on = -1;
  Placement placement;
  std::thread sleeper([&] {
    std::unique_lock lock(mutex);
    called.wait(lock, [&] { return go; });
    woke_on = current_core();
    placement.release(pthread_self());
    released = true;
    called.notify_all();
    called.wait(lock, [&] { return !go; });
  });
  const pthread_t thread = sleeper.native_handle();
  if (chosen >= 0) {
    cpu_set_t one{};
    CPU_SET(chosen, &one);
    expect(pthread_setaffinity_np(thread, sizeof one, &one) == 0, "cores can be chosen");
  }
  const cpu_set_t own = cores_of(thread);
  CoreSet used;  // all but the last
  int last = 0;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &own)) used.add(core), last = core;
  placement.confine(thread, used);
  cpu_set_t now = cores_of(thread);
  expect(CPU_EQUAL(&now, &own), "a thread without a core that is free keeps its own");
  used.remove(last);
  placement.confine(thread, used);
  now = cores_of(thread);
  expect(CPU_COUNT(&now) == 1 && CPU_ISSET(last, &now), "a thread is left the cores that are not in use");
  std::unique_lock lock(mutex);
  go = true;
  called.notify_all();
  called.wait(lock, [&] { return released; });
  expect(woke_on == last, "a thread wakes on a core that is left to it");
  now = cores_of(thread);
  expect(CPU_EQUAL(&now, &own), "a thread that is awake has its cores again");

  if (CPU_COUNT(&own) > 1) {
    placement.confine(thread, used);
    cpu_set_t another = own;
    CPU_CLR(last, &another);
    expect(pthread_setaffinity_np(thread, sizeof another, &another) == 0, "cores can be chosen");
    placement.release(thread);
    now = cores_of(thread);
    expect(CPU_EQUAL(&now, &another), "cores that somebody else has set since stay");
  }
  go = false;
  called.notify_all();
  lock.unlock();
  sleeper.join();
}

#endif

int main() {
#if defined(__linux__)
  wakes_where_it_is_told(-1);
  wakes_where_it_is_told(current_core());
#endif
  own_parts_come_first();
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

  for (int i = 0; i < 500; ++i) run_phases(1 + i % 5, {i % 11, 0, 1 + i % 7, 16});
  for (int i = 0; i < 10; ++i) run_phases(4, {8, 4, 9}, 1);  // longer than anybody spins

  std::atomic<int> inner{0};
  run(6, [&](int64_t) { run(5, [&](int64_t) { ++inner; }); });
  expect(inner == 30, "a task may start tasks");

  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([c] {
      for (int i = 0; i < 300; ++i) {
        run_once_each(20);
        run_phases(3, {7, 5, 3});
        if (c == 0 && i % 50 == 0) set_num_threads(2 + i / 50 % 3);
      }
    });
  for (auto& caller : callers) caller.join();

  shutdown_threads();
  run_once_each(20);
  std::puts("ok");
}
