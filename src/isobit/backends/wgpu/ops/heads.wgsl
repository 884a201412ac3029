// Head vectors that lie apart, one behind the other. Needs scalar.

struct Params {
  n: u32,  // of a vector
  count: u32,  // vectors of a row
  x_at: u32,
  x_stride: u32,  // from row to row
  step: u32,  // from vector to vector
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;  // [rows * count, n]

@compute @workgroup_size(256)
fn heads(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  let from_x = p.x_at + (group.y / p.count) * p.x_stride + (group.y % p.count) * p.step;
  if (i < p.n) { y[group.y * p.n + i] = x[from_x + i]; }
}
