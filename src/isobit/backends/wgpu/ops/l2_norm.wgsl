// (x * (1 / sqrt(sum of squares + eps))) * scale of head vectors (docs/numerics.md, section 12). Needs
// scalar and reduce.

struct Params { n: u32, heads: u32, x_at: u32, x_stride: u32, eps: real, scale: real }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;  // rows of `heads` vectors
@group(0) @binding(3) var<storage, read_write> y: array<u32>;  // [rows * heads, n]

@compute @workgroup_size(256)
fn l2_norm(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let from_x = p.x_at + (group.y / p.heads) * p.x_stride + (group.y % p.heads) * p.n;
  var sum = 0u;
  for (var i = lane; i < bound(p.n); i += 256u) {
    let v = x[from_x + i];
    sum = add(sum, mul(v, v));
  }
  let r = div(ONE, root(add(tree(lane, sum, 256u), p.eps)));
  let i = 256u * group.x + lane;
  if (i < p.n) { y[group.y * p.n + i] = mul3(x[from_x + i], r, p.scale); }
}
