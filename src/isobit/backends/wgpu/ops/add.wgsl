// x + y (docs/numerics.md, section 5). Needs scalar.

struct Params { n: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;  // [rows, n]
@group(0) @binding(3) var<storage, read> y: array<u32>;
@group(0) @binding(4) var<storage, read_write> z: array<u32>;

@compute @workgroup_size(256)
fn add_rows(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  let at = group.y * p.n + i;
  if (i < p.n) { z[at] = add(x[at], y[at]); }
}
