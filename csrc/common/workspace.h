// Memory of a forward pass: taken in the order of a stack, kept from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace fastlvm {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  void* take(size_t bytes);  // aligned; throws std::bad_alloc
  size_t mark() const;
  void release(size_t mark) noexcept;  // whatever was taken since mark()
  void settle();  // with nothing taken: as much memory in one piece as was ever taken, for the next call

 private:
  struct Chunk {
    uint8_t* memory;
    size_t begin, size;  // of the bytes of all chunks
    Chunk* before;
  };
  void drop_chunks();

  Chunk* newest_ = nullptr;
  size_t used_ = 0, most_ = 0;
};

// Workspaces that wait for the next call. A lock is never waited for: after a fork nobody may be left to give it back.
class Workspaces {
 public:
  std::unique_ptr<Workspace> take();
  void give(std::unique_ptr<Workspace> workspace);  // settled

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
};

int64_t nanoseconds_now();

}  // namespace fastlvm
