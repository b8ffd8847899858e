#include "common/phases.h"

#include <atomic>
#include <new>

#include "common/spin.h"

namespace fastlvm {

// On lines of their own: seats do not take them from each other.
struct alignas(64) Phases::Counter {
  std::atomic<int64_t> value{0};
};

struct alignas(64) Phases::Phase {
  int64_t parts;
  std::atomic<int64_t> done{0};
};

size_t Phases::bytes(int phases, int seats) {
  return static_cast<size_t>(phases) * (sizeof(Phase) + static_cast<size_t>(seats) * sizeof(Counter));
}

Phases::Phases(void* memory, int seats, const int64_t* parts, int phases) : seats_(seats) {
  phases_ = static_cast<Phase*>(memory);
  next_ = reinterpret_cast<Counter*>(phases_ + phases);
  for (int i = 0; i < phases; ++i) new (phases_ + i) Phase{parts[i]};
  for (int i = 0; i < phases * seats; ++i) new (next_ + i) Counter;
}

int64_t Phases::parts(int phase) const { return phases_[phase].parts; }
int64_t Phases::first_of(int phase, int seat) const { return parts(phase) * seat / seats_; }
Phases::Counter& Phases::next_of(int phase, int seat) { return next_[phase * seats_ + seat]; }

int64_t Phases::claim(int phase, int seat) {
  for (int i = 0; i < seats_; ++i, seat = seat + 1 < seats_ ? seat + 1 : 0) {
    const int64_t first = first_of(phase, seat), count = first_of(phase, seat + 1) - first;
    std::atomic<int64_t>& next = next_of(phase, seat).value;
    if (next.load(std::memory_order_relaxed) >= count) continue;
    if (const int64_t claimed = next.fetch_add(1, std::memory_order_relaxed); claimed < count) return first + claimed;
  }
  return -1;
}

void Phases::finish(int phase, int64_t done) {
  std::atomic<int64_t>& all = phases_[phase].done;
  if (done > 0) all.fetch_add(done, std::memory_order_acq_rel);
  const auto over = [&] { return all.load(std::memory_order_acquire) == phases_[phase].parts; };
  if (spin_until(over)) return;
  while (!over()) std::this_thread::sleep_for(std::chrono::microseconds(20));
}

}  // namespace fastlvm
