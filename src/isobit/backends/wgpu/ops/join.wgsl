// Head vectors, one behind the other in each head: a vector of x, of which `each` heads have the same,
// then one of y. Needs scalar.

struct Params { n: u32, a: u32, each: u32, x_at: u32, x_stride: u32, y_at: u32, y_stride: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> y: array<u32>;
@group(0) @binding(4) var<storage, read_write> z: array<u32>;  // [rows, n]

@compute @workgroup_size(256)
fn join(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  if (i >= p.n) { return; }
  var value = 0u;
  if (i < p.a) {
    value = x[p.x_at + (group.y / p.each) * p.x_stride + i];
  } else {
    value = y[p.y_at + group.y * p.y_stride + i - p.a];
  }
  z[group.y * p.n + i] = value;
}
