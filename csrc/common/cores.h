// The cores that the process may use, and on which of them a thread wakes.
#pragma once

#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace fastlvm {

int available_cores();  // the affinity mask, cut to the cgroup's cpu quota
int current_core();     // that the caller runs on; -1 where the system does not say

struct CoreSet {
#if defined(__linux__)
  cpu_set_t cores{};
  bool has(int core) const;
  void add(int core);
  void remove(int core);
#else
  bool has(int) const { return false; }
  void add(int) {}
  void remove(int) {}
#endif
};

// Where a thread wakes. In a virtual machine (seen in one, KVM on x86) Linux may wake a thread on the core of the one
// that calls it though another is idle, and move it only milliseconds later: a core that has been idle for a while may
// look like one that the host has taken away. So there the caller leaves it no choice but the cores that are not in
// use; once awake, it takes its own back.
class Placement {
 public:
  using Thread = std::thread::native_handle_type;
  int core = -1;  // where the thread fell asleep

#if defined(__linux__)
  static bool is_needed();
  // By who wakes the thread; nothing where no core is left.
  void confine(Thread thread, const CoreSet& used);
  // By the thread itself, once awake. Nothing where somebody else has given it other cores since; that they chose the
  // very ones that it was left cannot be told.
  void release(Thread thread);

 private:
  bool is_as_left(Thread thread) const;

  bool confined_ = false;
  cpu_set_t own_{}, left_{};
#else
  static bool is_needed() { return false; }
  void confine(Thread, const CoreSet&) {}
  void release(Thread) {}
#endif
};

}  // namespace fastlvm
