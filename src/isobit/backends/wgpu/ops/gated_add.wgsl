// x + (1 / (1 + exp(-gate))) * y, a gate a row (docs/numerics.md, section 7). Needs scalar.

struct Params {
  n: u32,
  x_at: u32,
  x_stride: u32,
  y_at: u32,
  y_stride: u32,
  gate_at: u32,
  gate_stride: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> y: array<u32>;
@group(0) @binding(4) var<storage, read> gate: array<u32>;
@group(0) @binding(5) var<storage, read_write> z: array<u32>;  // [rows, n]

@compute @workgroup_size(256)
fn gated_add(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  let row = group.y;
  if (i >= p.n) { return; }
  let share = mul(logistic(gate[p.gate_at + row * p.gate_stride]), y[p.y_at + row * p.y_stride + i]);
  z[row * p.n + i] = add(x[p.x_at + row * p.x_stride + i], share);
}
