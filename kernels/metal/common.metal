// What the kernels share; MLX puts it before each of them. Bodies name no address space of an input: MLX passes arrays
// of fewer than eight elements in constant memory.

#ifndef SHARED  // the tests put something in its place that watches every access
#define SHARED(T, name, size) threadgroup T name[size]
#endif

#define UNROLL _Pragma("clang loop unroll(full)")

constant float LOG2E = 1.44269504088896341f;

// Bits of plan[0].
constant int HAS_D = 1, HAS_Z = 2, HAS_BIAS = 4, SOFTPLUS = 8, HAS_INITIAL = 16, PACKED = 32, B_CONSTANT = 64;
constant int C_CONSTANT = 128, KEEP = 256, FINAL = 512, HAS_DOUT = 1024, HAS_DFINAL = 2048, SILU = 4096, INDEXED = 8192;

inline float log_of_one_plus(float x) {  // of x in [0, 1]
  const float y = 1.0f + x;
  return y == 1.0f ? x : x * (metal::log(y) / (y - 1.0f));
}

inline float sigmoid(float x) {
  return 1.0f / (1.0f + metal::exp(-x));
}

inline float softplus(float x) {
  return x > 20.0f ? x : metal::max(x, 0.0f) + log_of_one_plus(metal::exp(-metal::abs(x)));
}

// The softplus of x, and its slope by the same exponential.
inline float softplus(float x, thread float& slope) {
  if (x > 20.0f) {
    slope = 1.0f;
    return x;
  }
  const float e = metal::exp(-metal::abs(x));
  slope = (x < 0.0f ? e : 1.0f) / (1.0f + e);
  return metal::max(x, 0.0f) + log_of_one_plus(e);
}

// The sum over WIDTH neighbouring lanes, a power of two, in each of them.
template <int WIDTH>
inline float lanes_sum(float x) {
  for (ushort step = WIDTH / 2; step > 0; step /= 2) x += metal::simd_shuffle_xor(x, step);
  return x;
}
