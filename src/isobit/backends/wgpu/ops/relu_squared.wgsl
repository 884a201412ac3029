// max(x, 0)^2 (docs/numerics.md, section 5). Needs scalar.

struct Params { n: u32, x_at: u32, x_stride: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;  // [rows, n]

@compute @workgroup_size(256)
fn relu_squared(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  if (i >= p.n) { return; }
  var v = x[p.x_at + group.y * p.x_stride + i];
  if (v - SIGN <= INFINITY) { v = 0u; }  // a NaN stays
  y[group.y * p.n + i] = mul(v, v);
}
