// softplus(x + dt) * A (docs/numerics.md, section 12). Needs scalar.

struct Params { n: u32, x_at: u32, x_stride: u32, dt_at: u32, a_at: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> vectors: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<u32>;  // [rows, n]

// The squares and products that are flushed are added to constants.
fn softplus(x: real) -> real {
  let u = exp_real(magnitude(x) | SIGN);
  let h = div(u, add_normal(0x40000000u, u));
  let z = mul_normal(h, h);
  var s = add_normal(mul_normal(0x3d888889u, z), 0x3d9d89d9u);  // 1/15, 1/13
  s = add_normal(mul_normal(s, z), 0x3dba2e8cu);                // 1/11
  s = add_normal(mul_normal(s, z), 0x3de38e39u);                // 1/9
  s = add_normal(mul_normal(s, z), 0x3e124925u);                // 1/7
  s = add_normal(mul_normal(s, z), 0x3e4ccccdu);                // 1/5
  s = add_normal(mul_normal(s, z), 0x3eaaaaabu);                // 1/3
  s = add_normal(mul_normal(s, z), ONE);
  return add(maximum(x, 0u), mul(add(h, h), s));
}

@compute @workgroup_size(256)
fn decay(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  if (i >= p.n) { return; }
  let v = add(x[p.x_at + group.y * p.x_stride + i], vectors[p.dt_at + i]);
  y[group.y * p.n + i] = mul(softplus(v), vectors[p.a_at + i]);
}
