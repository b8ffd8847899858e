#include "common/threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "common/cores.h"
#include "common/spin.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace fastlvm {
namespace {

constexpr int max_threads = 1024;
thread_local bool inside_job = false;
thread_local int own_seat = 0;  // 0: no worker

struct InsideJob {
  bool before = inside_job;
  InsideJob() { inside_job = true; }
  ~InsideJob() { inside_job = before; }
};

void run_serially(int64_t count, Task task, void* context) {
  InsideJob guard;
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

struct Worker {
  std::thread thread;
  int seat = 0;
  bool asleep = false;
  Placement placement;
};

class Team {
 public:
  // False when another job is running: nothing was done.
  bool try_run(int size, int threads, int64_t count, Task task, void* context) {
    std::unique_lock leader(leader_, std::try_to_lock);
    if (!leader.owns_lock() || closed_) return false;
    resize(size - 1);
    InsideJob guard;
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    seats_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | static_cast<uint64_t>(count));
    wake();
    work(-1);
    wait_until_done(count);
    if (failed_.load(std::memory_order_acquire)) {
      std::exception_ptr error = std::move(error_);
      error_ = nullptr;
      std::rethrow_exception(error);
    }
    return true;
  }

  void close() {
    std::lock_guard leader(leader_);
    closed_ = true;
    resize(0);
  }

 private:
  // The ticket holds the job's generation (high half) and how many tasks are unclaimed (low half). A claim that
  // succeeds proves that the job was still open, and so that the fields read before it belong to that job.
  void work(int seat) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while ((ticket & 0xffffffffu) != 0 && seat < seats_.load(std::memory_order_relaxed)) {
      const Task task = task_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      const int64_t count = count_.load(std::memory_order_relaxed);
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      if (!failed_.load(std::memory_order_acquire)) {
        try {
          task(context, count - static_cast<int64_t>(ticket & 0xffffffffu));
        } catch (...) {
          std::lock_guard lock(mutex_);
          if (!error_) error_ = std::current_exception();
          failed_.store(true, std::memory_order_release);
        }
      }
      // After the last increment the leader may return: nothing of the job is touched any more.
      if (done_.fetch_add(1) + 1 == count && leader_waits_.load()) {
        std::lock_guard lock(mutex_);
        finished_.notify_all();
      }
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void wait_until_done(int64_t count) {
    const auto done = [&] { return done_.load() == count; };
    if (spin_until(done)) return;
    std::unique_lock lock(mutex_);
    leader_waits_.store(true);
    finished_.wait(lock, done);
    leader_waits_.store(false);
  }

  void wake() {
    if (sleepers_.load() == 0) return;
    {
      std::lock_guard lock(mutex_);
      place_sleepers();
    }
    started_.notify_all();
  }

  // No two of the team on one core, as far as there are cores.
  void place_sleepers() {
    if (!Placement::is_needed()) return;
    CoreSet used, taken;
    for (const auto& worker : workers_) used.add(worker->placement.core);
    const int here = current_core();
    used.add(here), taken.add(here);
    for (const auto& worker : workers_) {
      if (!worker->asleep) continue;
      const int own = worker->placement.core;
      CoreSet others = used;
      if (!taken.has(own)) others.remove(own), taken.add(own);
      worker->placement.confine(worker->thread.native_handle(), others);
    }
  }

  void loop(Worker& self) {
    inside_job = true;
    own_seat = self.seat + 1;
    {
      std::lock_guard until_placed(mutex_);
    }
    self.placement.release(self.thread.native_handle());
    uint64_t seen = 0;
    const auto called = [&] { return ticket_.load() >> 32 != seen || stop_.load(); };
    while (true) {
      if (!spin_until(called)) {
        sleep_until(called, self);
        self.placement.release(self.thread.native_handle());
      }
      if (stop_.load()) return;
      seen = ticket_.load(std::memory_order_acquire) >> 32;
      work(self.seat);
    }
  }

  template <class Called>
  void sleep_until(Called called, Worker& self) {
    std::unique_lock lock(mutex_);
    self.placement.core = current_core();
    self.asleep = true;
    ++sleepers_;
    started_.wait(lock, called);
    --sleepers_;
    self.asleep = false;
  }

  void resize(int workers) {
    if (wanted_ == workers) return;
    wanted_ = workers;
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    started_.notify_all();
    for (auto& worker : workers_) worker->thread.join();
    workers_.clear();
    stop_.store(false);
    try {
      workers_.reserve(static_cast<size_t>(workers));
      CoreSet used;
      used.add(current_core());
      for (int i = 0; i < workers; ++i) {
        auto worker = std::make_unique<Worker>();
        worker->seat = i;
        std::lock_guard lock(mutex_);
        worker->thread = std::thread([this, &self = *worker] { loop(self); });
        if (Placement::is_needed()) worker->placement.confine(worker->thread.native_handle(), used);
        workers_.push_back(std::move(worker));
      }
    } catch (const std::system_error&) {
      // Those there are will do.
    }
  }

  std::mutex leader_;  // held for the length of a job
  bool closed_ = false;
  int wanted_ = 0;
  // Fewer than wanted_ when the system gives no more threads. What others read of them is under mutex_.
  std::vector<std::unique_ptr<Worker>> workers_;

  std::atomic<uint64_t> ticket_{0};
  std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> count_{0};
  std::atomic<int> seats_{0};  // workers that may take tasks; the caller, of seat -1, always does
  std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;

  std::mutex mutex_;
  std::condition_variable started_, finished_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> leader_waits_{false};
  std::atomic<bool> stop_{false};
};

// Never destroyed: a worker may outlive static destructors, and after a fork the threads of the parent's team are gone.
std::atomic<Team*> current_team{nullptr};

#if !defined(_WIN32)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { current_team.store(nullptr); });
#endif

Team& team() {
  Team* found = current_team.load(std::memory_order_acquire);
  if (found) return *found;
  auto* fresh = new Team;
  if (current_team.compare_exchange_strong(found, fresh)) return *fresh;
  delete fresh;
  return *found;
}

int default_threads() {
  const char* text = std::getenv("FASTLVM_NUM_THREADS");
  if (!text || !*text) {
    const int cores = available_cores();
    return cores < max_threads ? cores : max_threads;
  }
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  if (*end || count < 1 || count > max_threads)
    throw std::invalid_argument("FASTLVM_NUM_THREADS: got '" + std::string(text) + "', wants a number from 1 to " +
                                std::to_string(max_threads));
  return static_cast<int>(count);
}

std::atomic<int> chosen_threads{0};  // 0: not chosen yet
std::atomic<int> most_asked_for{0};  // by a ThreadCount
thread_local int asked_for = 0;      // 0: the chosen number

}  // namespace

int get_num_threads() {
  int count = chosen_threads.load();
  if (count > 0) return count;
  int expected = 0;
  count = default_threads();
  return chosen_threads.compare_exchange_strong(expected, count) ? count : expected;
}

void set_num_threads(int count) {
  if (count < 1 || count > max_threads)
    throw std::invalid_argument("number of threads: got " + std::to_string(count) + ", wants 1 to " +
                                std::to_string(max_threads));
  chosen_threads.store(count);
}

ThreadCount::ThreadCount(int threads) : before_(asked_for) {
  if (threads == 0) return;
  asked_for = threads < max_threads ? threads : max_threads;
  if (asked_for <= chosen_threads.load()) return;  // the team has them
  int most = most_asked_for.load();
  while (most < asked_for && !most_asked_for.compare_exchange_weak(most, asked_for)) {
  }
}

ThreadCount::~ThreadCount() { asked_for = before_; }

int seat_of_thread() { return own_seat; }

int threads_of_job() { return asked_for > 0 ? asked_for : get_num_threads(); }

void run_tasks(int64_t count, Task task, void* context) {
  const int chosen = get_num_threads(), threads = threads_of_job(), most = most_asked_for.load();
  const bool fits = count <= INT32_MAX;
  if (count > 1 && threads > 1 && fits && !inside_job &&
      team().try_run(most > chosen ? most : chosen, threads, count, task, context))
    return;
  run_serially(count, task, context);
}

void shutdown_threads() { team().close(); }

}  // namespace fastlvm
