#include "common/workspace.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "common/memory.h"

namespace fastlvm {

Workspace::~Workspace() { drop_chunks(); }

void* Workspace::take(size_t bytes) {
  bytes = (bytes + alignment - 1) / alignment * alignment;
  if (!newest_ || used_ + bytes > newest_->begin + newest_->size) {
    auto chunk = std::make_unique<Chunk>(Chunk{nullptr, used_, std::max(bytes, size_t{1} << 16), newest_});
    chunk->memory = static_cast<uint8_t*>(aligned_allocate(chunk->size));
    newest_ = chunk.release();
  }
  void* const memory = newest_->memory + (used_ - newest_->begin);
  used_ += bytes;
  most_ = std::max(most_, used_);
  return memory;
}

size_t Workspace::mark() const { return used_; }

void Workspace::release(size_t mark) noexcept {
  used_ = mark;
  while (newest_ && newest_->before && newest_->begin >= mark) {
    Chunk* const before = newest_->before;
    aligned_release(newest_->memory);
    delete newest_;
    newest_ = before;
  }
}

void Workspace::settle() {
  if (newest_ && newest_->size >= most_) return;
  drop_chunks();
  take(most_);
  used_ = 0;
}

void Workspace::drop_chunks() {
  while (newest_) {
    Chunk* const before = newest_->before;
    aligned_release(newest_->memory);
    delete newest_;
    newest_ = before;
  }
}

std::unique_ptr<Workspace> Workspaces::take() {
  if (std::unique_lock lock(mutex_, std::try_to_lock); lock && !idle_.empty()) {
    std::unique_ptr<Workspace> workspace = std::move(idle_.back());
    idle_.pop_back();
    return workspace;
  }
  return std::make_unique<Workspace>();
}

void Workspaces::give(std::unique_ptr<Workspace> workspace) {
  workspace->settle();
  if (std::unique_lock lock(mutex_, std::try_to_lock); lock) idle_.push_back(std::move(workspace));
}

int64_t nanoseconds_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace fastlvm
