#include "common/threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
#else
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastlvm {
namespace {

constexpr int max_threads = 1024;
constexpr auto spin_time = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#else
  std::this_thread::yield();
#endif
}

// Spins until `ready()` or until spin_time is over; says which.
template <class Ready>
bool spin_until(Ready ready) {
  const auto deadline = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

thread_local bool inside_job = false;

struct InsideJob {
  bool before = inside_job;
  InsideJob() { inside_job = true; }
  ~InsideJob() { inside_job = before; }
};

void run_serially(int64_t count, Task task, void* context) {
  InsideJob guard;
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

class Team {
 public:
  // False when another job is running: nothing was done.
  bool try_run(int threads, int64_t count, Task task, void* context) {
    std::unique_lock leader(leader_, std::try_to_lock);
    if (!leader.owns_lock() || closed_) return false;
    resize(threads - 1);
    InsideJob guard;
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | static_cast<uint64_t>(count));
    wake();
    work();
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
  void work() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while ((ticket & 0xffffffffu) != 0) {
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
    }
    started_.notify_all();
  }

  void loop() {
    inside_job = true;
    uint64_t seen = 0;
    const auto called = [&] { return ticket_.load() >> 32 != seen || stop_.load(); };
    while (true) {
      if (!spin_until(called)) {
        std::unique_lock lock(mutex_);
        ++sleepers_;
        started_.wait(lock, called);
        --sleepers_;
      }
      if (stop_.load()) return;
      seen = ticket_.load(std::memory_order_acquire) >> 32;
      work();
    }
  }

  void resize(int workers) {
    if (wanted_ == workers) return;
    wanted_ = workers;
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    started_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false);
    try {
      for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { loop(); });
    } catch (const std::system_error&) {
      // Those there are will do.
    }
  }

  std::mutex leader_;  // held for the length of a job
  bool closed_ = false;
  int wanted_ = 0;
  std::vector<std::thread> workers_;  // fewer than wanted_ when the system gives no more threads

  std::atomic<uint64_t> ticket_{0};
  std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int64_t> count_{0};
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

#if defined(__linux__)
int affinity_cores() {
  for (size_t cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (!set) break;
    const size_t size = CPU_ALLOC_SIZE(cpus);
    CPU_ZERO_S(size, set);
    const bool ok = sched_getaffinity(0, size, set) == 0;
    const int count = ok ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (ok && count > 0) return count;
  }
  return static_cast<int>(std::thread::hardware_concurrency());
}

// Cores that the control groups grant, over the group and its parents; 0 when there is no limit.
int cgroup_cores() {
  double least = 0;
  const auto limit = [&](double quota, double period) {
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
  };
  const auto read = [](const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
  };
  const auto number = [](const std::string& text) { return std::strtod(text.c_str(), nullptr); };
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "hierarchy:controllers:path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool unified = controllers.empty();
    if (!unified && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string root = unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    while (true) {
      const std::string folder = root + path;
      if (unified) {
        std::istringstream fields(read(folder + "/cpu.max"));
        std::string quota, period;
        fields >> quota >> period;
        limit(number(quota), number(period));  // "max" reads as 0
      } else {
        limit(number(read(folder + "/cpu.cfs_quota_us")), number(read(folder + "/cpu.cfs_period_us")));
      }
      if (path.empty()) break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  if (least == 0) return 0;
  return least < 1 ? 1 : static_cast<int>(least);
}
#endif

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

}  // namespace

int available_cores() {
#if defined(__linux__)
  int cores = affinity_cores();
  const int quota = cgroup_cores();
  if (quota > 0 && quota < cores) cores = quota;
#elif defined(_WIN32)
  DWORD_PTR process = 0, system = 0;
  int cores = 0;
  if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system))
    for (; process; process &= process - 1) ++cores;
#else
  int cores = static_cast<int>(std::thread::hardware_concurrency());
#endif
  return cores < 1 ? 1 : cores;
}

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

void run_tasks(int64_t count, Task task, void* context) {
  const int threads = get_num_threads();
  const bool fits = count <= INT32_MAX;
  if (count > 1 && threads > 1 && fits && !inside_job && team().try_run(threads, count, task, context)) return;
  run_serially(count, task, context);
}

void shutdown_threads() { team().close(); }

}  // namespace fastlvm
