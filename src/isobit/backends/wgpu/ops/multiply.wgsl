// x * y (docs/numerics.md, section 5). Needs scalar.

struct Params { n: u32, x_at: u32, x_stride: u32, y_at: u32, y_stride: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> y: array<u32>;
@group(0) @binding(4) var<storage, read_write> z: array<u32>;  // [rows, n]

@compute @workgroup_size(256)
fn multiply(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  if (i >= p.n) { return; }
  let at = group.y * p.n + i;
  z[at] = mul(x[p.x_at + group.y * p.x_stride + i], y[p.y_at + group.y * p.y_stride + i]);
}
