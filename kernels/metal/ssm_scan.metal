// The selective scan forward. LANES neighbouring lanes have a channel, each S of its states in registers, and walk time
// together in blocks of STEPS: lane j loads what step j needs and says it to the others. B and C, which the channels of
// a threadgroup share, are staged in threadgroup memory. A threadgroup takes `turns` sequences one after the other.
//
// Template: T, LANES, S, STEPS, STAGED, CHUNK (steps between the states that are kept for the backward).
// u, delta, z [B, D, L], B, C [B, G, N, L] or [1, D, N, 1] in any strides; A [D, N], D, delta_bias [D],
// initial [B, D, N] contiguous; offsets [S + 1]; plan: flags, channels a unit, threadgroups a unit, turns, sequences,
// N. A unit is a run of channels that share a group of B and one of C.
// out [B, D, L], final_state [B, D, N], kept [rows, D, N].
const int flags = plan[0], per_unit = plan[1], blocks = plan[2], turns = plan[3], sequences = plan[4], N = plan[5];
const int channels = u_shape[1], length = u_shape[2];
constexpr int PER = (STEPS + LANES - 1) / LANES;  // steps of a block that a lane loads
constexpr int W = S * LANES;
SHARED(float, staged, STAGED ? 2 * STEPS * W : 1);

const int threads = threads_per_threadgroup.x, me = thread_index_in_threadgroup;
const int lane = me % LANES, first_lane = thread_index_in_simdgroup - lane;
const int block = threadgroup_position_in_grid.x;
const int lead = block / blocks * per_unit;
const int in_unit = block % blocks * (threads / LANES) + me / LANES;
const bool mine = in_unit < per_unit;
const int d = lead + (mine ? in_unit : per_unit - 1);

const bool has_z = flags & HAS_Z, fresh = !(flags & HAS_INITIAL);
const bool load_B = !(flags & B_CONSTANT), load_C = !(flags & C_CONSTANT);
const long B_group = load_B ? lead / (channels / B_shape[1]) : d, C_group = load_C ? lead / (channels / C_shape[1]) : d;
const float skip = flags & HAS_D ? float(D[d]) : 0.0f;
const float bias = flags & HAS_BIAS ? float(delta_bias[d]) : 0.0f;
float a[S], b_fixed[S], c_fixed[S];
UNROLL for (int s = 0; s < S; ++s) {
  const int n = lane + LANES * s;
  a[s] = n < N ? float(A[long(d) * N + n]) * LOG2E : 0.0f;
  b_fixed[s] = n < N && !load_B ? float(B[B_group * B_strides[1] + n * B_strides[2]]) : 0.0f;
  c_fixed[s] = n < N && !load_C ? float(C[C_group * C_strides[1] + n * C_strides[2]]) : 0.0f;
}

for (int turn = 0; turn < turns; ++turn) {
  const int seq = int(threadgroup_position_in_grid.y) * turns + turn;
  if (seq >= sequences) break;
  const bool packed = flags & PACKED;
  const long batch = packed ? 0 : seq;
  const int begin = packed ? int(offsets[seq]) : 0, end = packed ? int(offsets[seq + 1]) : length;
  const long kept_row = packed ? begin / CHUNK + seq : long(seq) * ((length + CHUNK - 1) / CHUNK);
  const auto of_u = u + (batch * u_strides[0] + d * u_strides[1]);
  const auto of_delta = delta + (batch * delta_strides[0] + d * delta_strides[1]);
  const auto of_z = z + (has_z ? batch * z_strides[0] + d * z_strides[1] : 0);
  const auto of_B = B + (load_B ? batch * B_strides[0] + B_group * B_strides[1] : 0);
  const auto of_C = C + (load_C ? batch * C_strides[0] + C_group * C_strides[1] : 0);
  const auto of_out = out + (batch * channels + d) * length;
  const long state = (long(seq) * channels + d) * N;

  float h[S];
  UNROLL for (int s = 0; s < S; ++s) {
    const int n = lane + LANES * s;
    h[s] = !fresh && n < N ? float(initial[state + n]) : 0.0f;
  }
  for (int t0 = begin; t0 < end; t0 += STEPS) {
    if ((flags & KEEP) && t0 > begin && (t0 - begin) % CHUNK == 0) {
      UNROLL for (int s = 0; s < S; ++s) {
        const int n = lane + LANES * s;
        if (mine && n < N) kept[((kept_row + (t0 - begin) / CHUNK) * channels + d) * N + n] = h[s];
      }
    }
    float xs[PER], dts[PER], gates[PER], ys[PER];
    UNROLL for (int i = 0; i < PER; ++i) {
      const int k = lane + LANES * i, t = t0 + k;
      const bool here = mine && k < STEPS && t < end;
      xs[i] = here ? float(of_u[t * u_strides[2]]) : 0.0f;
      gates[i] = here && has_z ? float(of_z[t * z_strides[2]]) : 0.0f;
      dts[i] = here ? float(of_delta[t * delta_strides[2]]) + bias : 0.0f;
      if (here && (flags & SOFTPLUS)) dts[i] = softplus(dts[i]);
      ys[i] = 0.0f;
    }
    if (STAGED && (load_B || load_C)) {
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);  // the block before has been read
      const int steps = metal::min(STEPS, end - t0);
      for (int i = me; i < steps * N; i += threads) {
        if (load_B) {  // along what is contiguous
          const bool by_state = B_strides[2] == 1;
          const int n = by_state ? i % N : i / steps, k = by_state ? i / N : i % steps;
          staged[k * W + n] = float(of_B[n * B_strides[2] + (t0 + k) * B_strides[3]]);
        }
        if (load_C) {
          const bool by_state = C_strides[2] == 1;
          const int n = by_state ? i % N : i / steps, k = by_state ? i / N : i % steps;
          staged[(STEPS + k) * W + n] = float(of_C[n * C_strides[2] + (t0 + k) * C_strides[3]]);
        }
      }
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    }
    UNROLL for (int k = 0; k < STEPS; ++k) {
      if (t0 + k < end) {
        const float dt = metal::simd_shuffle(dts[k / LANES], ushort(first_lane + k % LANES));
        const float x = metal::simd_shuffle(xs[k / LANES], ushort(first_lane + k % LANES));
        const bool zero = fresh && t0 + k == begin;  // a state that needs no decay
        float y = 0.0f;
        UNROLL for (int s = 0; s < S; ++s) {
          const int n = lane + LANES * s;
          if (mine && n < N) {
            float b = b_fixed[s], c = c_fixed[s];
            if (load_B) b = STAGED ? float(staged[k * W + n]) : float(of_B[n * B_strides[2] + (t0 + k) * B_strides[3]]);
            if (load_C)
              c = STAGED ? float(staged[(STEPS + k) * W + n]) : float(of_C[n * C_strides[2] + (t0 + k) * C_strides[3]]);
            h[s] = (zero ? 0.0f : metal::exp2(dt * a[s]) * h[s]) + dt * x * b;
            y += h[s] * c;
          }
        }
        y = lanes_sum<LANES>(y);
        if (k % LANES == lane) ys[k / LANES] = y;
      }
    }
    UNROLL for (int i = 0; i < PER; ++i) {
      const int k = lane + LANES * i, t = t0 + k;
      if (mine && k < STEPS && t < end) {
        float y = ys[i] + skip * xs[i];
        if (has_z) y *= gates[i] * sigmoid(gates[i]);
        of_out[t] = T(y);
      }
    }
  }
  if (flags & FINAL) {
    UNROLL for (int s = 0; s < S; ++s) {
      const int n = lane + LANES * s;
      if (mine && n < N) final_state[state + n] = h[s];
    }
  }
}
