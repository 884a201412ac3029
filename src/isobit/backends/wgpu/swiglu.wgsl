// SwiGLU and quantisation (docs/numerics.md, sections 3 and 5). Needs scalar, reduce and quantise.

struct Params { n: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> gate_up: array<u32>;  // [rows, 2 * n]
@group(0) @binding(3) var<storage, read_write> result: array<u32>;  // [rows, n]
@group(0) @binding(4) var<storage, read_write> acts: array<u32>;

// A superblock a workgroup.
@compute @workgroup_size(256)
fn swiglu(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = group.y;
  let i = 256u * group.x + lane;
  var value = 0u;
  if (i < p.n) {
    let gate = gate_up[2u * row * p.n + i];
    let up = gate_up[(2u * row + 1u) * p.n + i];
    value = mul(div(gate, add_normal(ONE, exp_real(negate(gate)))), up);
    result[row * p.n + i] = value;
  }
  quantise_superblock(lane, value, row * ((p.n + 255u) / 256u) + group.x);
}
