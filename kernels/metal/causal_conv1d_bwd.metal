// The causal depthwise convolution backward: a thread has STEPS steps of a channel, for `turns` entries of the batch in
// turn. It computes the sums of these steps and of the W - 1 after them once more, and shifts inputs and the slopes of
// the sums through registers.
//
// Template: T, W, STEPS. Inputs as in causal_conv1d.metal, and grad_out [B, D, L] in any strides, grad_final
// [B, D, W-1] contiguous; plan: flags, sequences, turns, B.
// dx [B, D, L], dinitial [B, D, W-1], sums [B / turns, tiles, D, W + 1]: of the weights and, last, of the bias.
const int flags = plan[0], sequences = plan[1], turns = plan[2], batches = plan[3];
const int channels = x_shape[1], length = x_shape[2], tiles = (length + STEPS - 1) / STEPS;
const long item = thread_position_in_grid.x;
if (item >= long(tiles) * channels) return;
const bool channel_last = x_strides[1] < x_strides[2];
const int d = channel_last ? item % channels : item / tiles, tile = channel_last ? item / channels : item % tiles;
const bool packed = flags & PACKED, past = flags & HAS_INITIAL, ends = flags & HAS_DFINAL;
float taps[W], sum[W + 1];
UNROLL for (int k = 0; k < W; ++k) {
  taps[k] = float(weight[d * W + k]);
  sum[k] = 0.0f;
}
sum[W] = 0.0f;
const float shift = flags & HAS_BIAS ? float(bias[d]) : 0.0f;
const int first = tile * STEPS, last = metal::min(first + STEPS, length);
if (packed && past && tile == 0) {  // sequences without a step
  for (int s = 0; s < sequences; ++s) {
    for (int k = 0; k < W - 1 && offsets[s] == offsets[s + 1]; ++k) {
      const long at = (long(s) * channels + d) * (W - 1) + k;
      dinitial[at] = ends ? float(grad_final[at]) : 0.0f;
    }
  }
}
for (int turn = 0; turn < turns; ++turn) {
  const long batch = long(thread_position_in_grid.y) * turns + turn;
  if (batch >= batches) break;
  const auto of_x = x + (batch * x_strides[0] + d * x_strides[1]);
  const auto of_grad = grad_out + (flags & HAS_DOUT ? batch * grad_out_strides[0] + d * grad_out_strides[1] : 0);
  const auto of_dx = dx + (batch * channels + d) * length;
  int seq = packed ? 0 : int(batch);
  if (packed) {
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
    float line[W], slopes[W];  // the slopes newest first
    UNROLL for (int k = 0; k < W; ++k) {
      const int t = start - W + k;
      line[k] = slopes[k] = 0.0f;
      if (k > 0 && t >= begin) line[k] = float(of_x[t * x_strides[2]]);
      else if (k > 0 && past) line[k] = float(initial[of_state + t - begin + W - 1]);
    }
    const int beyond = start < stop ? stop + W - 1 : start;
    for (int t = start; t < beyond; ++t) {
      float slope = 0.0f;
      if (t < end) {
        float next = float(of_x[t * x_strides[2]]);
        UNROLL for (int k = W - 1; k >= 0; --k) {  // as in causal_conv1d.metal
          const float old = line[k];
          line[k] = next;
          next = old;
        }
        if (flags & HAS_DOUT) slope = float(of_grad[t * grad_out_strides[2]]);
        if (flags & SILU) {
          float y = shift;
          UNROLL for (int k = 0; k < W; ++k) y += taps[k] * line[k];
          const float part = sigmoid(y);
          slope *= part * (1.0f + y * (1.0f - part));
        }
        if (t < stop) {
          UNROLL for (int k = 0; k < W; ++k) sum[k] += slope * line[k];
          sum[W] += slope;
        }
      }
      UNROLL for (int k = 0; k < W; ++k) {
        const float old = slopes[k];
        slopes[k] = slope;
        slope = old;
      }
      const int at = t - W + 1;  // whose slopes are all there
      float pulled = 0.0f;
      UNROLL for (int k = 0; k < W; ++k) pulled += taps[k] * slopes[k];
      const int in_final = at - (end - W + 1);
      const bool own = at >= start && at < stop;
      const bool before = at < begin && start == begin && past;
      if ((own || before) && ends && in_final >= 0) pulled += float(grad_final[of_state + in_final]);
      if (own) of_dx[at] = T(pulled);
      if (before) dinitial[of_state + at - begin + W - 1] = pulled;
    }
    start = metal::max(start, stop);
  }
}
const long of_sum = ((long(thread_position_in_grid.y) * tiles + tile) * channels + d) * (W + 1);
UNROLL for (int k = 0; k <= W; ++k) sums[of_sum + k] = sum[k];
