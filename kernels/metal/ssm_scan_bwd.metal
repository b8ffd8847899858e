// The selective scan backward for any length: a simdgroup has a channel, ROWS of them a threadgroup, and walks its
// sequence in chunks of 32 K steps from the last to the first. Lanes lie along time, K steps each. For one state
// dimension after the other the states and the gradients that come back from later steps are both recurrences
// x_t = a_t x_{t-1} + b_t, which the lanes solve by a scan over pairs (Blelloch, 1990). With g_t the gradient of y_t:
//
//   r_t = a_t dh_t    dh_t = C_t g_t + r_{t+1}    a_t = exp(dt_t A)      r before the first step is that of the state
//   dC_t = sum_d g_t h_t     dB_t = sum_d dh_t dt_t u_t     dA = sum_t dh_t a_t h_{t-1} dt_t
//   ddt_t = sum_n dh_t (a_t h_{t-1} A + B_t u_t)            du_t = dt_t sum_n dh_t B_t + D g_t
//
// A threadgroup takes `turns` times ROWS channels, one ROWS after the other in every chunk, and adds to the sums over
// those before: in threadgroup memory where N is at most SUMMED, in device memory else.
//
// Template: T_u, T_delta, T_z, K, ROWS, CHUNK, SUMMED. Inputs as in ssm_scan.metal, and grad_out [B, D, L] in any
// strides, grad_final [B, D, N] and kept contiguous; plan: flags, channels a unit, threadgroups a unit, turns, N,
// groups of B, groups of C.
// du, ddelta, dz [B, D, L], dA, dinitial [B, D, N], dB, dC [threadgroups, B, N, L], sums over the channels of each, or
// [B, D, N] where B or C is constant, dD, dbias [B, D].
const int flags = plan[0], per_unit = plan[1], blocks = plan[2], turns = plan[3], N = plan[4];
const int channels = u_shape[1], length = u_shape[2];
constexpr int SPAN = 32 * K;
SHARED(float, shared, 2 * ROWS * SPAN);
SHARED(float, sums, SUMMED > 0 ? 2 * SUMMED * SPAN : 1);

const int me = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, row = me / 32;
const int block = threadgroup_position_in_grid.x, seq = threadgroup_position_in_grid.y;
const int lead = block / blocks * per_unit;
const bool packed = flags & PACKED, has_z = flags & HAS_Z, has_grad = flags & HAS_DOUT;
const bool varies_B = !(flags & B_CONSTANT), varies_C = !(flags & C_CONSTANT);
const long batch = packed ? 0 : seq, batches = packed ? 1 : threadgroups_per_grid.y;
const int begin = packed ? int(offsets[seq]) : 0, end = packed ? int(offsets[seq + 1]) : length;
const long kept_row = packed ? begin / CHUNK + seq : long(seq) * ((length + CHUNK - 1) / CHUNK);
const int chunks = (end - begin + SPAN - 1) / SPAN;

for (int turn = 0; chunks == 0 && turn < turns; ++turn) {  // a sequence without a step, as packed ones may be
  const int in_unit = (block % blocks * turns + turn) * ROWS + row;
  for (int n = lane; in_unit < per_unit && n < N; n += 32) {
    const long at = (long(seq) * channels + lead + in_unit) * N + n;
    dA[at] = 0.0f;
    if (!varies_B) dB[at] = 0.0f;
    if (!varies_C) dC[at] = 0.0f;
    if (flags & HAS_INITIAL) dinitial[at] = flags & HAS_DFINAL ? float(grad_final[at]) : 0.0f;
  }
  if (in_unit < per_unit && lane == 0) {
    if (flags & HAS_D) dD[long(seq) * channels + lead + in_unit] = 0.0f;
    if (flags & HAS_BIAS) dbias[long(seq) * channels + lead + in_unit] = 0.0f;
  }
}
for (int visit = 0; visit < chunks * turns; ++visit) {
  const int chunk = chunks - 1 - visit / turns, turn = visit % turns;
  const int in_unit = (block % blocks * turns + turn) * ROWS + row;
  const bool mine = in_unit < per_unit;
  const int d = lead + (mine ? in_unit : per_unit - 1);
  const long B_group = varies_B ? lead / (channels / plan[5]) : d, C_group = varies_C ? lead / (channels / plan[6]) : d;
  const auto of_u = u + (batch * u_strides[0] + d * u_strides[1]);
  const auto of_delta = delta + (batch * delta_strides[0] + d * delta_strides[1]);
  const auto of_z = z + (has_z ? batch * z_strides[0] + d * z_strides[1] : 0);
  const auto of_grad = grad_out + (has_grad ? batch * grad_out_strides[0] + d * grad_out_strides[1] : 0);
  const auto of_B = B + ((varies_B ? batch * B_strides[0] : 0) + B_group * B_strides[1]);
  const auto of_C = C + ((varies_C ? batch * C_strides[0] : 0) + C_group * C_strides[1]);
  const long line = (batch * channels + d) * length;  // of the arrays [B, D, L]
  const long state = (long(seq) * channels + d) * N;  // of the arrays [B, D, N]
  const long of_A = long(d) * N;
  const float skip = flags & HAS_D ? float(D[d]) : 0.0f;
  const float bias = flags & HAS_BIAS ? float(delta_bias[d]) : 0.0f;
  const bool is_last = chunk == chunks - 1;
  const int first_step = begin + chunk * SPAN + lane * K;
  float sum_D = 0.0f, sum_bias = 0.0f;
  float xs[K], dts[K], slopes[K], gs[K], through_z[K], ys[K], through_A[K], through_B[K];
  UNROLL for (int k = 0; k < K; ++k) {
    const long t = first_step + k;
    const bool here = mine && t < end;  // steps past the end keep the state
    xs[k] = here ? float(of_u[t * u_strides[2]]) : 0.0f;
    dts[k] = here ? float(of_delta[t * delta_strides[2]]) + bias : 0.0f;
    slopes[k] = 1.0f;
    if (here && (flags & SOFTPLUS)) dts[k] = softplus(dts[k], slopes[k]);
    gs[k] = here && has_grad ? float(of_grad[t * grad_out_strides[2]]) : 0.0f;
    through_z[k] = 0.0f;
    if (here && has_z && has_grad) {
      const float gate = float(of_z[t * z_strides[2]]), part = sigmoid(gate);
      through_z[k] = gs[k] * part * (1.0f + gate * (1.0f - part));
      gs[k] *= gate * part;
    }
    ys[k] = skip * xs[k];
    through_A[k] = 0.0f;
    through_B[k] = 0.0f;
  }
  for (int n0 = 0; n0 < N; n0 += 32) {
    // What the state dimensions need once a chunk: lane i has it for dimension n0 + i.
    const int at = n0 + lane;
    const bool has_state = mine && at < N;
    const float a_of = has_state ? float(A[of_A + at]) : 0.0f;
    float h_of = 0.0f, r_of = 0.0f, dA_of = 0.0f, dB_of = 0.0f, dC_of = 0.0f;
    if (has_state) {
      if (chunk > 0) h_of = kept[((kept_row + chunk) * channels + d) * N + at];
      else if (flags & HAS_INITIAL) h_of = float(initial[state + at]);
      if (!is_last) r_of = dinitial[state + at];
      else if (flags & HAS_DFINAL) r_of = float(grad_final[state + at]);
      if (!is_last) {
        dA_of = dA[state + at];
        if (!varies_B) dB_of = dB[state + at];
        if (!varies_C) dC_of = dC[state + at];
      }
    }
    const float b_of = has_state && !varies_B ? float(of_B[at * B_strides[2]]) : 0.0f;
    const float c_of = has_state && !varies_C ? float(of_C[at * C_strides[2]]) : 0.0f;
    for (int i = 0; i < 32 && n0 + i < N; ++i) {
      const long n = n0 + i;
      const float a = metal::simd_shuffle(a_of, ushort(i)), scaled = a * LOG2E;
      const float h_in = metal::simd_shuffle(h_of, ushort(i)), r_in = metal::simd_shuffle(r_of, ushort(i));
      const float b_fixed = metal::simd_shuffle(b_of, ushort(i)), c_fixed = metal::simd_shuffle(c_of, ushort(i));
      float bs[K], cs[K], decays[K], states[K];
      float whole = 1.0f, left = 0.0f;  // what the lane makes of a state h: whole h + left
      UNROLL for (int k = 0; k < K; ++k) {
        const long t = first_step + k;
        const bool here = mine && t < end;
        bs[k] = here ? varies_B ? float(of_B[n * B_strides[2] + t * B_strides[3]]) : b_fixed : 0.0f;
        cs[k] = here ? varies_C ? float(of_C[n * C_strides[2] + t * C_strides[3]]) : c_fixed : 0.0f;
        decays[k] = here ? metal::exp2(dts[k] * scaled) : 1.0f;
        whole *= decays[k];
        left = decays[k] * left + dts[k] * xs[k] * bs[k];
      }
      float right = 0.0f;  // and of a gradient r from its right: whole r + right
      UNROLL for (int k = K - 1; k >= 0; --k) right = decays[k] * (cs[k] * gs[k] + right);
      float product = whole;
      for (int step = 1; step < 32; step *= 2) {
        const float p = metal::simd_shuffle_up(product, ushort(step)), q = metal::simd_shuffle_up(left, ushort(step));
        if (lane >= step) {
          left += product * q;
          product *= p;
        }
      }
      left += product * h_in;
      const float before = metal::simd_shuffle_up(left, ushort(1));
      float h = lane == 0 ? h_in : before;
      product = whole;
      for (int step = 1; step < 32; step *= 2) {
        const float p = metal::simd_shuffle_down(product, ushort(step));
        const float q = metal::simd_shuffle_down(right, ushort(step));
        if (lane + step < 32) {
          right += product * q;
          product *= p;
        }
      }
      right += product * r_in;
      const float after = metal::simd_shuffle_down(right, ushort(1));
      const float out_of_chunk = metal::simd_shuffle(right, ushort(0));
      float r = lane == 31 ? r_in : after;

      float sum_A = 0.0f, sum_B = 0.0f, sum_C = 0.0f;
      const float h_before = h;
      UNROLL for (int k = 0; k < K; ++k) {
        h = decays[k] * h + dts[k] * xs[k] * bs[k];
        states[k] = h;
        ys[k] += h * cs[k];
        shared[(ROWS + row) * SPAN + k * 32 + lane] = h * gs[k];
        sum_C += h * gs[k];
      }
      UNROLL for (int k = K - 1; k >= 0; --k) {
        const float dh = cs[k] * gs[k] + r;
        const float moved = dh * decays[k] * (k > 0 ? states[k > 0 ? k - 1 : 0] : h_before);
        sum_A += moved * dts[k];
        through_A[k] += moved * a;
        through_B[k] += dh * bs[k];
        const float to_B = dh * dts[k] * xs[k];
        shared[row * SPAN + k * 32 + lane] = to_B;
        sum_B += to_B;
        r = decays[k] * dh;
      }
      sum_A = metal::simd_sum(sum_A);
      if (!varies_B) sum_B = metal::simd_sum(sum_B);
      if (!varies_C) sum_C = metal::simd_sum(sum_C);
      if (lane == i) {
        r_of = out_of_chunk;
        dA_of += sum_A;
        dB_of += sum_B;
        dC_of += sum_C;
      }
      if (varies_B || varies_C) {  // over the channels of the threadgroup, in their order
        metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
        for (int j = me; j < 2 * SPAN; j += 32 * ROWS) {
          const bool for_C = j >= SPAN;
          const int in_chunk = j % SPAN, t = begin + chunk * SPAN + in_chunk;
          if (t < end && (for_C ? varies_C : varies_B)) {
            float sum = 0.0f;
            UNROLL for (int other = 0; other < ROWS; ++other)
              sum += shared[((for_C ? ROWS : 0) + other) * SPAN + in_chunk % K * 32 + in_chunk / K];
            const long into = ((block * batches + batch) * N + n) * length + t;
            if (SUMMED > 0) {
              const int cell = ((for_C ? SUMMED : 0) + int(n)) * SPAN + in_chunk;
              if (turn > 0) sum += sums[cell];
              sums[cell] = sum;
              if (turn < turns - 1) continue;
            } else if (turn > 0) {
              sum += for_C ? dC[into] : dB[into];
            }
            if (for_C) dC[into] = sum;
            else dB[into] = sum;
          }
        }
        metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      }
    }
    if (has_state) {
      dA[state + at] = dA_of;
      if (!varies_B) dB[state + at] = dB_of;
      if (!varies_C) dC[state + at] = dC_of;
      if ((flags & HAS_INITIAL) || chunk > 0) dinitial[state + at] = r_of;
    }
  }
  UNROLL for (int k = 0; k < K; ++k) {
    const long t = first_step + k;
    if (mine && t < end) {
      const float to_delta = (xs[k] * through_B[k] + through_A[k]) * slopes[k];
      du[line + t] = T_u(dts[k] * through_B[k] + skip * gs[k]);
      ddelta[line + t] = T_delta(to_delta);
      if (has_z) dz[line + t] = T_z(through_z[k] * ys[k]);
      sum_D += gs[k] * xs[k];
      sum_bias += to_delta;
    }
  }
  if (flags & HAS_D) sum_D = metal::simd_sum(sum_D);
  if (flags & HAS_BIAS) sum_bias = metal::simd_sum(sum_bias);
  if (mine && lane == 0) {
    const long at = long(seq) * channels + d;
    if (flags & HAS_D) dD[at] = is_last ? sum_D : dD[at] + sum_D;
    if (flags & HAS_BIAS) dbias[at] = is_last ? sum_bias : dbias[at] + sum_bias;
  }
}
