#include "predictor/model.h"

#include <utility>

#include "common/dispatch.h"
#include "common/threads.h"

namespace fastlvm {

Model::Model(int64_t positions, int64_t dim, const std::function<void(Builder&)>& build) {
  Builder count(positions, dim, nullptr);
  build(count);
  memory_ = static_cast<uint8_t*>(aligned_allocate(static_cast<size_t>(count.bytes())));
  try {
    Builder builder(positions, dim, memory_);
    build(builder);
    network_ = builder.finish();
    details_ = builder.take_details();
    bytes_ = builder.bytes(), state_size_ = builder.state_size(), out_dim_ = builder.out_dim();
    most_positions_ = builder.most_positions(), streams_ = builder.streams();
  } catch (...) {
    aligned_release(memory_);
    throw;
  }
}

Model::~Model() { aligned_release(memory_); }

void Model::run(const float* context, int64_t windows, float* out, int threads, int64_t* nanoseconds) const {
  predict({&network_, nullptr, nullptr, windows, network_.positions, context, out, nullptr, 0, nanoseconds}, threads);
}

void Model::step(const float* vector, float* out, float* state, int64_t seen, int threads) const {
  predict({&network_, nullptr, nullptr, 1, 1, vector, out, state, seen, nullptr}, threads);
}

void Model::predict(Prediction args, int threads) const {
  const ThreadCount count(threads);
  std::unique_ptr<Workspace> workspace = idle_.take();
  const Products products = active_products();
  args.products = &products, args.workspace = workspace.get();
  active_kernels().predict(args);
  idle_.give(std::move(workspace));
}

}  // namespace fastlvm
