// The thread team: a leader (the calling thread) and workers that spin for some 100 µs after the last job, then sleep.
//
// - Tasks are claimed from one counter, so a worker that the system has not woken yet holds nobody up.
// - A job may ask for fewer threads than the team has, or for more, which then stay.
// - One job at a time. A second caller, or a task that starts a job itself, runs its tasks on its own thread.
// - In a virtual machine a sleeping worker is woken on a core of its own where there are enough: see Placement.
// - An exception in a task is rethrown in the caller; tasks not begun by then are skipped.
// - After a fork the child starts its own workers with its first job.
// - The default count is FASTLVM_NUM_THREADS, else the affinity mask cut to the cgroup's cpu quota.
#pragma once

#include <cstdint>

namespace fastlvm {

using Task = void (*)(void* context, int64_t index);

void run_tasks(int64_t count, Task task, void* context);

// While one lives, jobs that its thread starts use `threads` threads; 0 changes nothing.
class ThreadCount {
 public:
  explicit ThreadCount(int threads);
  ~ThreadCount();
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
};

int threads_of_job();             // what run_tasks would use
int seat_of_thread();             // 0 for a caller; workers have the numbers from 1 on, below those of a job's threads
int get_num_threads();            // throws std::invalid_argument for a bad FASTLVM_NUM_THREADS
void set_num_threads(int count);  // throws std::invalid_argument unless 1 <= count <= 1024
void shutdown_threads();          // joins the workers; later jobs run on the caller's thread

}  // namespace fastlvm
