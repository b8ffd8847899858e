// One token of the selective scan: LANES neighbouring lanes have a channel, each S of its states, for `turns` rows of
// the batch one after the other, as A stays in registers.
//
// Template: T, T_state, LANES, S. state [states, D, N], x, delta, z [b, D], B, C [b, G, N] in any strides; A [D, N],
// D, delta_bias [D], indices [b] contiguous; plan: flags, turns, b, states, N.
// out [b, D], moved [b, D, N]: the state of every row after the token; rows without a state leave theirs undefined.
const int flags = plan[0], turns = plan[1], rows = plan[2], states = plan[3], N = plan[4];
const int channels = x_shape[1];
const int me = thread_index_in_threadgroup, lane = me % LANES;
const int channel = int(threadgroup_position_in_grid.x) * (int(threads_per_threadgroup.x) / LANES) + me / LANES;
const bool mine = channel < channels;
const int d = mine ? channel : channels - 1;
const long of_B = d / (channels / B_shape[1]) * B_strides[1], of_C = d / (channels / C_shape[1]) * C_strides[1];
const float skip = flags & HAS_D ? float(D[d]) : 0.0f;
const float bias = flags & HAS_BIAS ? float(delta_bias[d]) : 0.0f;
float a[S];
UNROLL for (int s = 0; s < S; ++s) {
  const int n = lane + LANES * s;
  a[s] = n < N ? float(A[long(d) * N + n]) * LOG2E : 0.0f;
}
for (int turn = 0; turn < turns; ++turn) {
  const long row = long(threadgroup_position_in_grid.y) * turns + turn;
  if (row >= rows) break;
  const long slot = flags & INDEXED ? long(indices[row]) : row;
  float y = 0.0f;
  if (slot >= 0 && slot < states) {  // the same for all threads
    float u = 0.0f, dt = 0.0f;
    if (lane == 0) {
      u = float(x[row * x_strides[0] + d * x_strides[1]]);
      dt = float(delta[row * delta_strides[0] + d * delta_strides[1]]) + bias;
      if (flags & SOFTPLUS) dt = softplus(dt);
    }
    const ushort first_lane = thread_index_in_simdgroup - lane;
    u = metal::simd_shuffle(u, first_lane);
    dt = metal::simd_shuffle(dt, first_lane);
    UNROLL for (int s = 0; s < S; ++s) {
      const int n = lane + LANES * s;
      if (mine && n < N) {
        float h = float(state[slot * state_strides[0] + d * state_strides[1] + n * state_strides[2]]);
        h = metal::exp2(dt * a[s]) * h + dt * u * float(B[row * B_strides[0] + of_B + n * B_strides[2]]);
        moved[(row * channels + d) * N + n] = T_state(h);
        y += h * float(C[row * C_strides[0] + of_C + n * C_strides[2]]);
      }
    }
    y = lanes_sum<LANES>(y) + skip * u;
    if (lane == 0 && (flags & HAS_Z)) {
      const float gate = float(z[row * z_strides[0] + d * z_strides[1]]);
      y *= gate * sigmoid(gate);
    }
  } else if (slot >= states) {
    y = NAN;
  }
  if (mine && lane == 0) out[row * channels + d] = T(y);
}
