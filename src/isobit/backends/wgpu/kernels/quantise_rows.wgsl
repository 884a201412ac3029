// Activations in fixed point that no kernel made with their values (docs/numerics.md, section 3).
// Needs scalar, reduce and quantise.

struct Params { n: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;  // [rows, n]
@group(0) @binding(3) var<storage, read_write> acts: array<u32>;

// A superblock a workgroup.
@compute @workgroup_size(256)
fn quantise_rows(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  var value = 0u;
  if (i < p.n) { value = x[group.y * p.n + i]; }
  quantise_superblock(lane, value, group.y * ((p.n + 255u) / 256u) + group.x);
}
