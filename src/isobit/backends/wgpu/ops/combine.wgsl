// Experts' outputs by rank, times their weights (docs/numerics.md, section 7). Needs scalar.

struct Params { n: u32, k: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> router_weights: array<u32>;  // [rows, k]
@group(0) @binding(3) var<storage, read> y: array<u32>;  // [rows, k, n]
@group(0) @binding(4) var<storage, read_write> z: array<u32>;

@compute @workgroup_size(256)
fn combine(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  if (i >= p.n) { return; }
  var sum = 0u;
  for (var pair = group.y * p.k; pair < bound((group.y + 1u) * p.k); pair++) {
    sum = add(sum, mul(router_weights[pair], y[pair * p.n + i]));
  }
  z[group.y * p.n + i] = sum;
}
