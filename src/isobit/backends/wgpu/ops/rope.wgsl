// RoPE (docs/numerics.md, section 5). Needs scalar.

struct Params {
  n: u32,  // of a token's head vectors
  head_dim: u32,
  rotated: u32,  // values of a head vector that are rotated, its first
  neighbours: u32,  // whether pairs are (2i, 2i + 1); else (i, i + half)
  x_at: u32,
  x_stride: u32,
  rope_at: u32,  // in `batch`: rotated / 2 cosines, then sines, of each token
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(256)
fn rope(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let c = 256u * group.x + lane;
  if (c >= p.n) { return; }
  let half = p.rotated / 2u;
  let i = c % p.head_dim;
  let to = group.y * p.n + c;
  let at = p.x_at + group.y * p.x_stride + c;
  if (i >= p.rotated) {
    y[to] = x[at];
    return;
  }
  let by_two = p.neighbours != 0u;
  let pair = select(i % half, i / 2u, by_two);
  let apart = select(half, 1u, by_two);
  let first = select(i < half, i % 2u == 0u, by_two);
  let other = x[select(at - apart, at + apart, first)] ^ select(0u, SIGN, first);
  let at_angle = p.rope_at + group.y * p.rotated + pair;
  y[to] = dot2(x[at], batch[at_angle], other, batch[at_angle + half]);
}
