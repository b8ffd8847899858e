#include "common/cores.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>

#if defined(_WIN32)
#include <windows.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastlvm {

#if defined(__linux__)
namespace {

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

// Known before anybody can fork.
const bool in_virtual_machine = [] {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 31);
#else
  return false;
#endif
}();

}  // namespace

int current_core() { return sched_getcpu(); }

bool CoreSet::has(int core) const { return core >= 0 && core < CPU_SETSIZE && CPU_ISSET(core, &cores); }

void CoreSet::add(int core) {
  if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &cores);
}

void CoreSet::remove(int core) {
  if (has(core)) CPU_CLR(core, &cores);
}

bool Placement::is_needed() { return in_virtual_machine; }

void Placement::confine(Thread thread, const CoreSet& used) {
  // Fails, and nothing is done, where there are more cores than a cpu_set_t holds.
  if (confined_ ? !is_as_left(thread) : pthread_getaffinity_np(thread, sizeof own_, &own_) != 0) return;
  cpu_set_t left;
  CPU_AND(&left, &own_, &used.cores);
  CPU_XOR(&left, &own_, &left);
  if (CPU_COUNT(&left) == 0 || pthread_setaffinity_np(thread, sizeof left, &left) != 0) return;
  confined_ = true, left_ = left;
}

void Placement::release(Thread thread) {
  const bool mine = confined_ && is_as_left(thread);
  confined_ = false;
  if (!mine) return;
  // Any core at all, which the system cuts to those of the control group, now and whenever they change. The cores the
  // thread had are named only where somebody had chosen among them.
  cpu_set_t now;
  memset(&now, -1, sizeof now);
  if (pthread_setaffinity_np(thread, sizeof now, &now) != 0 || pthread_getaffinity_np(thread, sizeof now, &now) != 0 ||
      !CPU_EQUAL(&now, &own_))
    pthread_setaffinity_np(thread, sizeof own_, &own_);
}

bool Placement::is_as_left(Thread thread) const {
  cpu_set_t now;
  return pthread_getaffinity_np(thread, sizeof now, &now) == 0 && CPU_EQUAL(&now, &left_);
}
#else
int current_core() { return -1; }
#endif

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

}  // namespace fastlvm
