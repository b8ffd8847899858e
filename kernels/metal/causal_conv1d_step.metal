// One token of the causal depthwise convolution: a thread has a channel, for `turns` rows of the batch one after the
// other, as the filter stays in registers.
//
// Template: T, T_state, W. x [b, D], state [states, D, held] in any strides; weight [D, W], bias [D], indices [b]
// contiguous; plan: flags, states, held, turns, b. out [b, D], moved [b, D, held]: the inputs each row holds after the
// token; rows without a state leave theirs undefined.
const int flags = plan[0], states = plan[1], held = plan[2], turns = plan[3], rows = plan[4];
const int channels = x_shape[1];
const int d = thread_position_in_grid.x;
if (d >= channels) return;
float taps[W];
UNROLL for (int k = 0; k < W; ++k) taps[k] = float(weight[d * W + k]);
const float shift = flags & HAS_BIAS ? float(bias[d]) : 0.0f;
for (int turn = 0; turn < turns; ++turn) {
  const long row = long(thread_position_in_grid.y) * turns + turn;
  if (row >= rows) break;
  const long slot = flags & INDEXED ? long(indices[row]) : row;
  float y = 0.0f;
  if (slot >= 0 && slot < states) {
    const float newest = float(x[row * x_strides[0] + d * x_strides[1]]);
    const auto line = state + (slot * state_strides[0] + d * state_strides[1]);
    const auto into = moved + (row * channels + d) * held;
    const int beside = held - (W - 1);  // inputs that are held, and too old
    y = shift;
    for (int k = 0; k < beside; ++k) {
      const float value = float(line[k * state_strides[2]]);
      if (k > 0) into[k - 1] = T_state(value);
    }
    UNROLL for (int k = 0; k < W - 1; ++k) {
      const float value = float(line[(beside + k) * state_strides[2]]);
      y += taps[k] * value;
      if (beside + k > 0) into[beside + k - 1] = T_state(value);
    }
    if (held > 0) into[held - 1] = T_state(newest);
    y += taps[W - 1] * newest;
    if (flags & SILU) y *= sigmoid(y);
  } else if (slot >= states) {
    y = NAN;
  }
  out[row * channels + d] = T(y);
}
