// The causal depthwise convolution: a thread has STEPS steps of a channel, for `turns` entries of the batch in turn,
// and shifts its inputs through registers.
//
// Template: T, W, STEPS. x [B, D, L] in any strides; weight [D, W], bias [D], initial [B, D, W-1], offsets [S + 1]
// contiguous; plan: flags, sequences, turns, B. out [B, D, L], final_state [B, D, W-1]; states are [S, D, W-1] where x
// is packed.
const int flags = plan[0], sequences = plan[1], turns = plan[2], batches = plan[3];
const int channels = x_shape[1], length = x_shape[2], tiles = (length + STEPS - 1) / STEPS;
const long item = thread_position_in_grid.x;
if (item >= long(tiles) * channels) return;
const bool channel_last = x_strides[1] < x_strides[2];  // neighbouring threads read what lies side by side
const int d = channel_last ? item % channels : item / tiles, tile = channel_last ? item / channels : item % tiles;
const bool packed = flags & PACKED, past = flags & HAS_INITIAL;
float taps[W];
UNROLL for (int k = 0; k < W; ++k) taps[k] = float(weight[d * W + k]);
const float shift = flags & HAS_BIAS ? float(bias[d]) : 0.0f;

const int first = tile * STEPS, last = metal::min(first + STEPS, length);
if (packed && (flags & FINAL) && tile == 0) {  // sequences without a step end as they began
  for (int s = 0; s < sequences; ++s) {
    for (int k = 0; k < W - 1 && offsets[s] == offsets[s + 1]; ++k) {
      const long at = (long(s) * channels + d) * (W - 1) + k;
      final_state[at] = T(past ? float(initial[at]) : 0.0f);
    }
  }
}
for (int turn = 0; turn < turns; ++turn) {
  const long batch = long(thread_position_in_grid.y) * turns + turn;
  if (batch >= batches) break;
  const auto of_x = x + (batch * x_strides[0] + d * x_strides[1]);
  const auto of_out = out + (batch * channels + d) * length;
  int seq = packed ? 0 : int(batch);
  if (packed) {  // the one that has the first step
    int high = sequences - 1;
    while (seq < high) {
      const int middle = (seq + high) / 2;
      if (int(offsets[middle + 1]) > first) high = middle;
      else seq = middle + 1;
    }
  }
  for (int start = first; start < last; ++seq) {  // the part of the tile that is of one sequence
    const int begin = packed ? int(offsets[seq]) : 0, end = packed ? int(offsets[seq + 1]) : length;
    const int stop = metal::min(last, end);
    const long of_state = (long(seq) * channels + d) * (W - 1);
    float line[W];  // inputs of the step, oldest first
    UNROLL for (int k = 0; k < W; ++k) {
      const int t = start - W + k;
      line[k] = 0.0f;
      if (k == 0) continue;
      if (t >= begin) line[k] = float(of_x[t * x_strides[2]]);
      else if (past) line[k] = float(initial[of_state + t - begin + W - 1]);
    }
    for (int t = start; t < stop; ++t) {
      float next = float(of_x[t * x_strides[2]]);
      UNROLL for (int k = W - 1; k >= 0; --k) {  // by way of a number: a compiler makes a plain shift one in memory
        const float old = line[k];
        line[k] = next;
        next = old;
      }
      float y = shift;
      UNROLL for (int k = 0; k < W; ++k) y += taps[k] * line[k];
      if (flags & SILU) y *= sigmoid(y);
      of_out[t] = T(y);
    }
    if ((flags & FINAL) && stop == end && start < stop) {
      UNROLL for (int k = 0; k < W - 1; ++k) final_state[of_state + k] = T(line[k + 1]);
    }
    start = metal::max(start, stop);
  }
}
