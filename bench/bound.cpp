// The machine's own bound on the selective scan: its arithmetic on values that stay in registers and the first cache,
// and its bytes streamed once. Built by bound.py, one library per instruction set; no part of the package.
#include "common/threads.h"
#include "common/vmath.h"

namespace fastlvm::FASTLVM_ISA {
namespace {

constexpr int chains = 4;  // independent recurrences in flight: enough to fill the pipes, few enough for 16 registers
constexpr int64_t period = 32;  // steps until the values of time repeat
constexpr int tasks_per_thread = 8;

volatile float sink;  // keeps the arithmetic from being optimised away

const struct alignas(64) Values {
  float delta[period * Vec::width], input[period * Vec::width];  // δ and δ u of vectors of channels
  float A[chains * Vec::width], B[chains * Vec::width], C[chains * Vec::width];

  Values() {
    for (int i = 0; i < period * Vec::width; ++i) {
      delta[i] = 0.01f + 0.1f * static_cast<float>(i * 37 % 101) / 101;
      input[i] = delta[i] * (static_cast<float>(i * 53 % 103) / 51.5f - 1);
    }
    for (int i = 0; i < chains * Vec::width; ++i) {
      A[i] = -0.5f - static_cast<float>(i % 7);
      B[i] = static_cast<float>(i * 29 % 31) / 15.5f - 1;
      C[i] = static_cast<float>(i * 17 % 23) / 11.5f - 1;
    }
  }
} v;

inline Vec at(const float* values, int64_t i) { return Vec::load(values + i * Vec::width); }

// A step of the forward pass: h = exp2(δ A) h + δ u B, y += C h. From a zero state there is no exp and no old h.
template <bool From_zero>
Vec forward(int64_t vectors) {
  Vec h[chains], y[chains];
  for (int k = 0; k < chains; ++k) h[k] = y[k] = Vec::zero();
  for (int64_t t = 0; t * chains < vectors; ++t) {
    const Vec d = at(v.delta, t & (period - 1)), u = at(v.input, t & (period - 1));
    for (int k = 0; k < chains; ++k) {
      const Vec in = u * at(v.B, k);
      h[k] = From_zero ? in : Vec::fma(exp2(d * at(v.A, k)), h[k], in);
      y[k] = Vec::fma(at(v.C, k), h[k], y[k]);
    }
  }
  return (y[0] + y[1]) + (y[2] + y[3]);
}

// A step of the backward pass: the state once more, then the gradients of h, A, B, C, δ and δ u.
template <bool From_zero>
Vec backward(int64_t vectors) {
  Vec h[chains], dh[chains], dA[chains], y = Vec::zero(), dB = y, dC = y, ddelta = y, dinput = y;
  for (int k = 0; k < chains; ++k) h[k] = dh[k] = dA[k] = y;
  for (int64_t t = 0; t * chains < vectors; ++t) {
    const Vec d = at(v.delta, t & (period - 1)), u = at(v.input, t & (period - 1));
    for (int k = 0; k < chains; ++k) {
      const Vec A = at(v.A, k), B = at(v.B, k), C = at(v.C, k), in = u * B;
      const Vec decay = From_zero ? Vec::zero() : exp2(d * A), old = h[k];
      h[k] = From_zero ? in : Vec::fma(decay, old, in);
      y = Vec::fma(C, h[k], y);
      dh[k] = Vec::fma(C, d, dh[k]);  // δ stands for the gradient of y
      dC = Vec::fma(h[k], d, dC);
      dB = Vec::fma(dh[k], u, dB);
      dinput = Vec::fma(dh[k], B, dinput);
      if constexpr (From_zero) {
        dh[k] = Vec::zero();
      } else {
        dh[k] = dh[k] * decay;
        const Vec slope = dh[k] * old;
        ddelta = Vec::fma(slope, A, ddelta);
        dA[k] = Vec::fma(slope, d, dA[k]);
      }
    }
  }
  return (y + dB) + (dC + ddelta) + (dinput + dA[0]) + (dA[1] + dA[2]) + dA[3];
}

// What is done once per channel and token: δ, D u and the gate; in the backward pass the slopes of both as well.
template <bool Backward>
Vec elementwise(int64_t vectors) {
  Vec sum = Vec::zero();
  for (int64_t i = 0; i < vectors; ++i) {
    const Vec x = at(v.delta, i & (period - 1)), z = at(v.input, i & (period - 1));
    sum = Vec::fma(softplus(x) * z + Vec::fma(x, z, sum), silu(z), sum);
    if constexpr (Backward) sum = Vec::fma(sigmoid(x) * z, silu_slope(z), sum);
  }
  return sum;
}

// Elements: (channel, state) at the first token and at all others, (channel, token); of the forward and backward pass.
struct Compute {
  int64_t tasks;
  int64_t first, later, elements;
  int64_t first_back, later_back, elements_back;
};

void compute_task(void* context, int64_t) {
  const Compute& c = *static_cast<const Compute*>(context);
  const auto vectors = [&](int64_t count) { return (count / c.tasks + Vec::width - 1) / Vec::width; };
  const Vec there = forward<true>(vectors(c.first)) + forward<false>(vectors(c.later)),
            back = backward<true>(vectors(c.first_back)) + backward<false>(vectors(c.later_back)),
            tokens = elementwise<false>(vectors(c.elements)) + elementwise<true>(vectors(c.elements_back));
  sink = Vec::sum(there + back + tokens);
}

struct Stream {
  int64_t tasks;
  const float* in;
  int64_t read;
  float* out;
  int64_t written;
};

void stream_task(void* context, int64_t index) {
  const Stream& s = *static_cast<const Stream*>(context);
  const auto begin = [&](int64_t count, int64_t i) { return count / Vec::width * i / s.tasks * Vec::width; };
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = begin(s.read, index), end = begin(s.read, index + 1);
  for (; i + 4 * Vec::width <= end; i += 4 * Vec::width)
    for (int k = 0; k < 4; ++k) sums[k] = sums[k] + Vec::load(s.in + i + k * Vec::width);
  for (; i < end; i += Vec::width) sums[0] = sums[0] + Vec::load(s.in + i);
  const Vec value = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (i = begin(s.written, index), end = begin(s.written, index + 1); i < end; i += Vec::width) value.store(s.out + i);
  sink = Vec::sum(value);
}

struct Read {
  int64_t tasks;
  const float* in;
  int64_t count;
};

// A contiguous share, from two places at a time: the processor's own prefetcher follows both.
void read_task(void* context, int64_t index) {
  constexpr int places = 2, vectors = 4;
  const Read& r = *static_cast<const Read*>(context);
  const int64_t half = r.count / r.tasks / places / (vectors * Vec::width) * (vectors * Vec::width);
  const float* const in = r.in + index * places * half;
  Vec sums[places][vectors];
  for (auto& place : sums)
    for (auto& sum : place) sum = Vec::zero();
  for (int64_t i = 0; i < half; i += vectors * Vec::width)
    for (int p = 0; p < places; ++p)
      for (int k = 0; k < vectors; ++k) sums[p][k] = sums[p][k] + Vec::load(in + p * half + i + k * Vec::width);
  Vec all = Vec::zero();
  for (const auto& place : sums)
    for (const auto& sum : place) all = all + sum;
  sink = Vec::sum(all);
}

}  // namespace
}  // namespace fastlvm::FASTLVM_ISA

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace fastlvm;
using namespace fastlvm::FASTLVM_ISA;

EXPORTED void bound_threads(int threads) { set_num_threads(threads); }
EXPORTED void bound_close() { shutdown_threads(); }

// Counts are of elements, not vectors.
EXPORTED void bound_compute(int64_t first, int64_t later, int64_t elements, int64_t first_back, int64_t later_back,
                            int64_t elements_back) {
  const int64_t tasks = tasks_per_thread * get_num_threads();
  Compute context = {tasks, first, later, elements, first_back, later_back, elements_back};
  run_tasks(tasks, compute_task, &context);
}

EXPORTED void bound_stream(const float* in, int64_t read, float* out, int64_t written) {
  const int64_t tasks = tasks_per_thread * get_num_threads();
  Stream context = {tasks, in, read, out, written};
  run_tasks(tasks, stream_task, &context);
}

// Every thread reads its share of `count` values.
EXPORTED void bound_read(const float* in, int64_t count) {
  Read context = {get_num_threads(), in, count};
  run_tasks(context.tasks, read_task, &context);
}
