// Whole models, drawn by models.h, with the products of every instruction set that runs here, with and without its
// extensions: against the scalar ones, on any number of threads, by several callers at once, and vector by vector
// against a whole context. The targets test-sanitize and test-arm of the Makefile build and run it:
//   model [CASES]      that many models
//   model CASES SEED   from this seed on
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "common/dispatch.h"
#include "common/threads.h"
#include "models.h"

using namespace fastlvm;
using namespace fastlvm::test;

// Below float32 an activation may be rounded the other way.
constexpr double allowed[precisions] = {2e-5, 0.05, 0.05};
constexpr int64_t most_windows = 70;

static int failures = 0;

struct Arithmetic {
  std::string isa;
  int level;  // of the extensions
  std::string name;
  double worst[precisions] = {};  // error of any model of a precision, as a part of what is allowed
};

static void use(const Arithmetic& arithmetic) {
  set_isa(arithmetic.isa);
  set_extension_level(arithmetic.level);
}

static std::vector<Arithmetic> every_arithmetic() {
  std::vector<Arithmetic> found;
  for (const std::string& isa : available_isas()) {
    Products before{};
    for (int level = 0; level <= extension_levels; ++level) {
      use({isa, level, isa});
      const Products products = active_products();
      std::string name = isa;
      bool differs = level == 0;
      for (int i = 0; i < precisions; ++i) {
        if (products.of[i]->name != isa) name += std::string("+") + products.of[i]->name;
        differs = differs || products.of[i] != before.of[i];
      }
      if (differs) found.push_back({isa, level, name});
      before = products;
    }
  }
  return found;
}

// Numbers against either end of memory that nothing else may touch.
class Floats {
 public:
  Floats(Draws& draw, int64_t count)
      : memory_(static_cast<size_t>(count) * sizeof(float), static_cast<Memory::Place>(draw.below(3))) {}
  Floats(Draws& draw, const float* from, int64_t count) : Floats(draw, count) {
    if (count > 0) std::memcpy(data(), from, memory_.size());
  }
  float* data() { return reinterpret_cast<float*>(memory_.data()); }
  std::vector<float> values() { return {data(), data() + memory_.size() / sizeof(float)}; }

 private:
  Memory memory_;
};

static double length(const std::vector<float>& numbers) {
  double sum = 0;
  for (const float x : numbers) sum += static_cast<double>(x) * x;
  return std::sqrt(sum);
}

// Of all windows together, as a part of their length.
static double error_of(const std::vector<float>& got, const std::vector<float>& want) {
  std::vector<float> off;
  for (size_t i = 0; i < got.size(); ++i) off.push_back(got[i] - want[i]);
  return length(off) / length({want.begin(), want.begin() + static_cast<int64_t>(got.size())});
}

class Case {
 public:
  Case(uint64_t seed, Coverage& coverage)
      : seed_(seed), random_(seed, &coverage), model_(random_.build(random_.positions())) {
    for (int64_t i = most_windows * random_.positions() * random_.dim(); i > 0; --i)
      context_.push_back(static_cast<float>(random_.draw().normal()));
  }

  void run(std::vector<Arithmetic>& all) {
    for (Arithmetic& arithmetic : all) {
      use(arithmetic);
      now_ = &arithmetic;
      const std::vector<float> all_windows = predict(model_, most_windows, 1, false);
      if (want_.empty()) want_ = all_windows;
      compare(all_windows, want_, "most windows");
      for (const int64_t windows : {int64_t{0}, int64_t{1}, int64_t{3}, most_windows})
        for (const int threads : {1, 3}) same(predict(model_, windows, threads, windows == 3), all_windows, "windows");
      several_callers(all_windows);
      if (random_.streams()) stream();
    }
  }

 private:
  // The first windows.
  std::vector<float> predict(const Model& model, int64_t windows, int threads, bool timed) {
    Floats context(random_.draw(), context_.data(), windows * model.positions() * model.dim());
    Floats out(random_.draw(), windows * model.out_dim());
    std::vector<int64_t> nanoseconds(static_cast<size_t>(model.layers() * phases));
    model.run(context.data(), windows, out.data(), threads, timed ? nanoseconds.data() : nullptr);
    for (const int64_t time : nanoseconds)
      if (time < 0) fail("the clock ran backwards");
    return out.values();
  }

  void several_callers(const std::vector<float>& want) {
    constexpr int callers = 3;
    std::vector<std::unique_ptr<Floats>> contexts, outs;
    for (int i = 0; i < callers; ++i) {
      contexts.push_back(
          std::make_unique<Floats>(random_.draw(), context_.data(), (i + 1) * model_.positions() * model_.dim()));
      outs.push_back(std::make_unique<Floats>(random_.draw(), (i + 1) * model_.out_dim()));
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i)
      threads.emplace_back([&, i] {
        for (int times = 0; times < 3; ++times)
          model_.run(contexts[i]->data(), i + 1, outs[i]->data(), 1 + i % 2, nullptr);
      });
    for (std::thread& thread : threads) thread.join();
    for (int i = 0; i < callers; ++i) same(outs[i]->values(), want, "several callers");
  }

  // After every vector of the first context, and of the second: what a model of that many positions says of them.
  void stream() {
    Floats state(random_.draw(), model_.state_size());
    std::fill_n(state.data(), model_.state_size(), 0.0f);
    for (int64_t seen = 0; seen < random_.steps(); ++seen) {
      Floats vector(random_.draw(), context_.data() + seen * model_.dim(), model_.dim());
      Floats out(random_.draw(), model_.out_dim());
      model_.step(vector.data(), out.data(), state.data(), seen, seen % 2 ? 3 : 1);
      if (seen != 0 && seen + 1 != random_.positions() && seen + 1 != random_.steps()) continue;
      compare(out.values(), predict(random_.build(seen + 1), 1, 1, false), "step " + std::to_string(seen));
    }
  }

  void compare(const std::vector<float>& got, const std::vector<float>& want, const std::string& what) {
    const int precision = static_cast<int>(random_.lowest());
    const double error = error_of(got, want) / allowed[precision];
    if (!(error <= now_->worst[precision])) now_->worst[precision] = error;
    if (!(error <= 1)) fail(what + ": " + std::to_string(error) + " of the error that is allowed");
  }

  // To the last bit.
  void same(const std::vector<float>& got, const std::vector<float>& want, const std::string& what) {
    if (got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0) return;
    fail(what + ": " + std::to_string(got.size() / static_cast<size_t>(model_.out_dim())) +
         " windows depend on threads or on each other, error " + std::to_string(error_of(got, want)));
  }

  void fail(const std::string& what) {
    std::fprintf(stderr, "failed: model %llu %s %s  (%s)\n", static_cast<unsigned long long>(seed_), now_->name.c_str(),
                 what.c_str(), random_.text().c_str());
    ++failures;
  }

  uint64_t seed_;
  RandomModel random_;
  Model model_;
  std::vector<float> context_, want_;
  Arithmetic* now_ = nullptr;
};

// Layers that do not fit leave an exception and no memory.
static void refuses(const char* what, const std::function<void(Builder&)>& build) {
  try {
    const Model model(3, 2, build);
  } catch (const std::invalid_argument&) {
    return;
  }
  std::fprintf(stderr, "failed: %s is taken\n", what);
  ++failures;
}

static void refusals() {
  const std::vector<float> numbers(64);
  const MatrixSource wide{Precision::fp32, 4, 2, numbers.data(), nullptr, nullptr};
  refuses("a sequence at the end", [](Builder& b) { b.l2_norm(); });
  refuses("a branch without an end", [](Builder& b) { b.begin_residual(), b.last(); });
  refuses("an end without a branch", [](Builder& b) { b.last(), b.end_residual(); });
  refuses("a branch that changes the width",
          [&](Builder& b) { b.begin_residual(), b.linear(wide), b.end_residual(), b.last(); });
  refuses("a branch that leaves one vector", [](Builder& b) { b.begin_residual(), b.last(), b.end_residual(); });
  refuses("vectors of another width", [&](Builder& b) { b.linear(wide), b.linear(wide), b.last(); });
  refuses("too few positions", [&](Builder& b) { b.positions(numbers.data(), 2, 2), b.last(); });
  refuses("a mixture of other vectors", [&](Builder& b) { b.last(), b.recency_mixture(numbers.data(), 4, false); });
  refuses("a mixture alone of one vector", [&](Builder& b) { b.last(), b.recency_mixture(numbers.data(), 3, true); });
  refuses("a mixture added to a sequence", [&](Builder& b) { b.recency_mixture(numbers.data(), 3, false); });
  refuses("two ends of the sequence", [](Builder& b) { b.last(), b.last(); });
  refuses("a flat context twice", [](Builder& b) { b.flatten(), b.flatten(); });
  refuses("heads that do not divide", [](Builder& b) { b.attention(2, 1), b.last(); });
}

int main(int argc, char** argv) {
  const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  std::vector<Arithmetic> all = every_arithmetic();
  Coverage coverage;
  refusals();
  for (uint64_t seed = first; seed < first + cases; ++seed) Case(seed, coverage).run(all);
  for (const char* what : {"sequence layer", "vector layer", "end of the sequence", "precision", "large"})
    for (const auto& [value, times] : coverage[what])
      if (times == 0 && cases >= 40) {
        std::fprintf(stderr, "failed: no model has %s = %lld, ask for more\n", what, static_cast<long long>(value));
        ++failures;
      }
  for (const Arithmetic& arithmetic : all)
    std::printf("%s: fp32 %.2f bf16 %.2f int8 %.2f\n", arithmetic.name.c_str(), arithmetic.worst[0],
                arithmetic.worst[1], arithmetic.worst[2]);
  shutdown_threads();
  std::printf("%s: worst error of %llu models, as a part of what is allowed\n", failures ? "failed" : "ok",
              static_cast<unsigned long long>(cases));
  return failures > 0;
}
