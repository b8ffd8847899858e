// The selective scan backward of at most T steps: LANES neighbouring lanes have a sequence of the batch, each S of its
// states, and keep the states and decays of all steps in registers. The sequences of a threadgroup take the channels of
// a block in turn: sums over channels stay in registers, sums over the sequences go through threadgroup memory.
// The equations are in ssm_scan_bwd.metal.
//
// Template: T_u, T_delta, T_z, LANES, S, T, ROWS (sequences of a threadgroup). Inputs as in ssm_scan_bwd.metal; plan:
// flags, channels a unit, blocks a unit, turns (channels of a block), N, groups of B, groups of C.
// du, ddelta, dz [B, D, L], dinitial [B, D, N]; for every group of ROWS sequences dA [groups, D, N], dD, dbias
// [groups, D]; dB, dC [blocks, B, N, L], or [groups, D, N] where B or C is constant.
const int flags = plan[0], per_unit = plan[1], blocks = plan[2], turns = plan[3], N = plan[4];
const int sequences = u_shape[0], channels = u_shape[1], length = u_shape[2];
constexpr int PER = (T + LANES - 1) / LANES;  // steps that a lane loads
constexpr int W = S * LANES;
SHARED(float, shared, 3 * ROWS * W + 2 * ROWS);

const int threads = threads_per_threadgroup.x, me = thread_index_in_threadgroup;
const int lane = me % LANES, first_lane = thread_index_in_simdgroup - lane, row = me / LANES;
const int block = threadgroup_position_in_grid.x, group = threadgroup_position_in_grid.y;
const int lead = block / blocks * per_unit;
const bool mine = group * ROWS + row < sequences;
const long batch = mine ? group * ROWS + row : sequences - 1;

const bool has_z = flags & HAS_Z, has_grad = flags & HAS_DOUT, fresh = !(flags & HAS_INITIAL);
const bool varies_B = !(flags & B_CONSTANT), varies_C = !(flags & C_CONSTANT);
const auto of_u = u + batch * u_strides[0];
const auto of_delta = delta + batch * delta_strides[0];
const auto of_z = z + (has_z ? batch * z_strides[0] : 0);
const auto of_grad = grad_out + (has_grad ? batch * grad_out_strides[0] : 0);
const auto of_B = B + (varies_B ? batch * B_strides[0] + lead / (channels / plan[5]) * B_strides[1] : 0);
const auto of_C = C + (varies_C ? batch * C_strides[0] + lead / (channels / plan[6]) * C_strides[1] : 0);

float sum_B[S][T], sum_C[S][T];
UNROLL for (int s = 0; s < S; ++s) {
  UNROLL for (int k = 0; k < T; ++k) sum_B[s][k] = sum_C[s][k] = 0.0f;
}
for (int turn = 0; turn < turns; ++turn) {
  const int in_unit = block % blocks * turns + turn;
  if (in_unit >= per_unit) break;
  const int d = lead + in_unit;
  const long line = (batch * channels + d) * length, state = (batch * channels + d) * N, of_A = long(d) * N;
  const float skip = flags & HAS_D ? float(D[d]) : 0.0f;
  const float bias = flags & HAS_BIAS ? float(delta_bias[d]) : 0.0f;
  float xs[PER], dts[PER], slopes[PER], gs[PER], through_z[PER], ys[PER], through_A[PER], through_B[PER];
  UNROLL for (int i = 0; i < PER; ++i) {
    const int t = lane + LANES * i;
    const bool here = mine && t < length;
    xs[i] = here ? float(of_u[d * u_strides[1] + t * u_strides[2]]) : 0.0f;
    dts[i] = here ? float(of_delta[d * delta_strides[1] + t * delta_strides[2]]) + bias : 0.0f;
    slopes[i] = 1.0f;
    if (here && (flags & SOFTPLUS)) dts[i] = softplus(dts[i], slopes[i]);
    gs[i] = here && has_grad ? float(of_grad[d * grad_out_strides[1] + t * grad_out_strides[2]]) : 0.0f;
    through_z[i] = 0.0f;
    if (here && has_z && has_grad) {
      const float gate = float(of_z[d * z_strides[1] + t * z_strides[2]]), part = sigmoid(gate);
      through_z[i] = gs[i] * part * (1.0f + gate * (1.0f - part));
      gs[i] *= gate * part;
    }
    ys[i] = through_A[i] = through_B[i] = 0.0f;
  }
  float a[S], b_fixed[S], c_fixed[S], r[S], first[S], sum_A[S], decays[S][T], h[S][T];
  UNROLL for (int s = 0; s < S; ++s) {
    const int n = lane + LANES * s;
    const bool has_state = mine && n < N;
    a[s] = has_state ? float(A[of_A + n]) : 0.0f;
    b_fixed[s] = has_state && !varies_B ? float(B[d * B_strides[1] + n * B_strides[2]]) : 0.0f;
    c_fixed[s] = has_state && !varies_C ? float(C[d * C_strides[1] + n * C_strides[2]]) : 0.0f;
    first[s] = has_state && !fresh ? float(initial[state + n]) : 0.0f;
    r[s] = has_state && (flags & HAS_DFINAL) ? float(grad_final[state + n]) : 0.0f;
    sum_A[s] = 0.0f;
  }
  UNROLL for (int k = 0; k < T; ++k) {
    if (k < length) {
      const float dt = metal::simd_shuffle(dts[k / LANES], ushort(first_lane + k % LANES));
      const float x = metal::simd_shuffle(xs[k / LANES], ushort(first_lane + k % LANES));
      float y = 0.0f;
      UNROLL for (int s = 0; s < S; ++s) {
        const int n = lane + LANES * s;
        h[s][k] = decays[s][k] = 0.0f;
        if (mine && n < N) {
          const float b = varies_B ? float(of_B[n * B_strides[2] + k * B_strides[3]]) : b_fixed[s];
          const float before = k > 0 ? h[s][k > 0 ? k - 1 : 0] : first[s];
          if (k > 0 || !fresh) decays[s][k] = metal::exp2(dt * (a[s] * LOG2E));
          h[s][k] = decays[s][k] * before + dt * x * b;
          if (has_z) y += h[s][k] * (varies_C ? float(of_C[n * C_strides[2] + k * C_strides[3]]) : c_fixed[s]);
        }
      }
      if (has_z) {
        y = lanes_sum<LANES>(y);
        if (k % LANES == lane) ys[k / LANES] = y;
      }
    }
  }
  float fixed_B[S], fixed_C[S];  // what constant B and C get
  UNROLL for (int s = 0; s < S; ++s) fixed_B[s] = fixed_C[s] = 0.0f;
  UNROLL for (int k = T - 1; k >= 0; --k) {
    if (k < length) {
      const float dt = metal::simd_shuffle(dts[k / LANES], ushort(first_lane + k % LANES));
      const float x = metal::simd_shuffle(xs[k / LANES], ushort(first_lane + k % LANES));
      const float g = metal::simd_shuffle(gs[k / LANES], ushort(first_lane + k % LANES));
      float by_A = 0.0f, by_B = 0.0f;
      UNROLL for (int s = 0; s < S; ++s) {
        const int n = lane + LANES * s;
        if (mine && n < N) {
          const float b = varies_B ? float(of_B[n * B_strides[2] + k * B_strides[3]]) : b_fixed[s];
          const float c = varies_C ? float(of_C[n * C_strides[2] + k * C_strides[3]]) : c_fixed[s];
          const float dh = c * g + r[s];
          const float moved = dh * decays[s][k] * (k > 0 ? h[s][k > 0 ? k - 1 : 0] : first[s]);
          sum_A[s] += moved * dt;
          by_A += moved * a[s];
          by_B += dh * b;
          if (varies_B) sum_B[s][k] += dh * dt * x;
          else fixed_B[s] += dh * dt * x;
          if (varies_C) sum_C[s][k] += h[s][k] * g;
          else fixed_C[s] += h[s][k] * g;
          r[s] = decays[s][k] * dh;
        }
      }
      by_A = lanes_sum<LANES>(by_A);
      by_B = lanes_sum<LANES>(by_B);
      if (k % LANES == lane) {
        through_A[k / LANES] = by_A;
        through_B[k / LANES] = by_B;
      }
    }
  }
  float sum_D = 0.0f, sum_bias = 0.0f;
  UNROLL for (int i = 0; i < PER; ++i) {
    const int t = lane + LANES * i;
    if (mine && t < length) {
      const float to_delta = (xs[i] * through_B[i] + through_A[i]) * slopes[i];
      du[line + t] = T_u(dts[i] * through_B[i] + skip * gs[i]);
      ddelta[line + t] = T_delta(to_delta);
      if (has_z) dz[line + t] = T_z(through_z[i] * (ys[i] + skip * xs[i]));
      sum_D += gs[i] * xs[i];
      sum_bias += to_delta;
    }
  }
  sum_D = lanes_sum<LANES>(sum_D);
  sum_bias = lanes_sum<LANES>(sum_bias);
  UNROLL for (int s = 0; s < S; ++s) {
    const int n = lane + LANES * s;
    if (mine && n < N && !fresh) dinitial[state + n] = r[s];
    shared[row * W + n] = sum_A[s];
    if (!varies_B) shared[(ROWS + row) * W + n] = fixed_B[s];
    if (!varies_C) shared[(2 * ROWS + row) * W + n] = fixed_C[s];
  }
  if (lane == 0) {
    shared[3 * ROWS * W + row] = sum_D;
    shared[3 * ROWS * W + ROWS + row] = sum_bias;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  const long of_group = long(group) * channels + d;
  for (int n = me; n < N; n += threads) {  // over the sequences of the threadgroup, in their order
    float total_A = 0.0f, total_B = 0.0f, total_C = 0.0f;
    for (int other = 0; other < ROWS; ++other) {
      total_A += shared[other * W + n];
      if (!varies_B) total_B += shared[(ROWS + other) * W + n];
      if (!varies_C) total_C += shared[(2 * ROWS + other) * W + n];
    }
    dA[of_group * N + n] = total_A;
    if (!varies_B) dB[of_group * N + n] = total_B;
    if (!varies_C) dC[of_group * N + n] = total_C;
  }
  if (me == 0) {
    float total_D = 0.0f, total_bias = 0.0f;
    for (int other = 0; other < ROWS; ++other) {
      total_D += shared[3 * ROWS * W + other];
      total_bias += shared[3 * ROWS * W + ROWS + other];
    }
    if (flags & HAS_D) dD[of_group] = total_D;
    if (flags & HAS_BIAS) dbias[of_group] = total_bias;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}
UNROLL for (int s = 0; s < S; ++s) {
  const int n = lane + LANES * s;
  UNROLL for (int k = 0; k < T; ++k) {
    if (mine && n < N && k < length) {
      const long into = ((block * long(sequences) + batch) * N + n) * length + k;
      if (varies_B) dB[into] = sum_B[s][k];
      if (varies_C) dC[into] = sum_C[s][k];
    }
  }
}
