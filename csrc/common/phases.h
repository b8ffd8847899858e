// The phases of a job that a team of threads goes through together. A phase is cut into parts; the next one begins when
// all of them are done.
//
// Every seat has parts of its own and takes them in order, so that a thread finds in its cache what it read or wrote
// there before; then it takes what others have not begun, so that one whom the system does not run holds nobody up for
// longer than the part it is at. Who waits spins for some 100 µs and then looks between naps. Parts must not throw.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlvm {

class Phases {
 public:
  static size_t bytes(int phases, int seats);  // of the memory that one needs, on a boundary of 64

  Phases(void* memory, int seats, const int64_t* parts, int phases);
  Phases(const Phases&) = delete;
  Phases& operator=(const Phases&) = delete;

  int64_t parts(int phase) const;

  // A part of the phase for a thread in `seat`, which nobody else gets; -1 if none is left.
  int64_t claim(int phase, int seat);
  // By a thread that found none left, having done `done` of them: returns once all are done.
  void finish(int phase, int64_t done);

 private:
  struct Counter;
  struct Phase;

  int64_t first_of(int phase, int seat) const;
  Counter& next_of(int phase, int seat);

  int seats_;
  Phase* phases_;
  Counter* next_;  // [phases, seats]: how many of the seat's parts are claimed
};

}  // namespace fastlvm
