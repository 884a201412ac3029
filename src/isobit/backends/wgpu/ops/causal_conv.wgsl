// Causal convolution, each channel by itself (docs/numerics.md, section 12). Needs scalar.

struct Params {
  channels: u32,
  taps: u32,
  x_at: u32,
  x_stride: u32,
  taps_at: u32,  // in `vectors`: [channels, taps], the oldest first
  runs_at: u32,  // in `batch`: first token, last token + 1 and state of each sequence
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> vectors: array<u32>;
@group(0) @binding(4) var<storage, read> batch: array<u32>;
@group(0) @binding(5) var<storage, read_write> states: array<u32>;  // [sequences, taps - 1, channels]
@group(0) @binding(6) var<storage, read_write> y: array<u32>;  // [rows, channels]

// Row i of the kept rows and, behind them, the run's; zeros before the sequence's start.
fn row(i: u32, first: u32, state: u32, channel: u32) -> real {
  if (i + 1u >= p.taps) { return x[p.x_at + (first + i + 1u - p.taps) * p.x_stride + channel]; }
  if (batch[first] == 0u) { return 0u; }
  return states[state + i * p.channels];
}

@compute @workgroup_size(256)
fn causal_conv(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let channel = 256u * group.x + lane;
  if (channel >= p.channels) { return; }
  let first = batch[p.runs_at + 3u * group.y];
  let tokens = batch[p.runs_at + 3u * group.y + 1u] - first;
  let state = batch[p.runs_at + 3u * group.y + 2u] * (p.taps - 1u) * p.channels + channel;
  let tap = p.taps_at + channel * p.taps;
  for (var t = 0u; t < tokens; t++) {
    var sum = mul(row(t, first, state, channel), vectors[tap]);
    for (var i = 1u; i < bound(p.taps); i++) {
      sum = add(sum, mul(row(t + i, first, state, channel), vectors[tap + i]));
    }
    y[(first + t) * p.channels + channel] = sum;
  }
  for (var i = 0u; i + 1u < bound(p.taps); i++) {  // a row that is read here is not yet overwritten
    states[state + i * p.channels] = row(tokens + i, first, state, channel);
  }
}
