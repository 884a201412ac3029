// A gate and what it lets through, and quantisation (docs/numerics.md, sections 3 and 5): an operation's
// file says what `gated` makes of two values. Needs scalar, reduce and quantise.

struct Params {
  n: u32,
  gate_at: u32,
  gate_stride: u32,
  up_at: u32,
  up_stride: u32,
  limit: real,  // of those that have them
  factor: real,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> gates: array<u32>;
@group(0) @binding(3) var<storage, read> ups: array<u32>;
@group(0) @binding(4) var<storage, read_write> result: array<u32>;  // [rows, n]
@group(0) @binding(5) var<storage, read_write> acts: array<u32>;

// A superblock a workgroup.
@compute @workgroup_size(256)
fn gate(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = group.y;
  let i = 256u * group.x + lane;
  var value = 0u;
  if (i < p.n) {
    value = gated(gates[p.gate_at + row * p.gate_stride + i], ups[p.up_at + row * p.up_stride + i]);
    result[row * p.n + i] = value;
  }
  quantise_superblock(lane, value, row * ((p.n + 255u) / 256u) + group.x);
}
