// Residual, RMS norm and quantisation of rows (docs/numerics.md, sections 3, 5 and 7). Needs scalar,
// reduce and quantise.
//
// A residual state holds three arrays of [tokens, n], one behind the other: the sum x, its norm h and,
// behind experts, what they added. A workgroup makes one superblock of one row; it computes the
// whole row's sum itself, so that none waits for another.

struct Params {
  n: u32,
  outputs: u32,  // added to x: 0, 1 or the experts of a token
  weighted: u32,  // whether by the router's weights
  weight_at: u32,
  eps: real,
  region: u32,  // words of one array of a state
  rows_at: u32,  // where `batch` names the rows of x to take, + 1; 0 for all
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> state_in: array<u32>;
@group(0) @binding(3) var<storage, read> output: array<u32>;
@group(0) @binding(4) var<storage, read> router_weights: array<u32>;
@group(0) @binding(5) var<storage, read> vectors: array<u32>;
@group(0) @binding(6) var<storage, read> batch: array<u32>;
@group(0) @binding(7) var<storage, read_write> state: array<u32>;
@group(0) @binding(8) var<storage, read_write> acts: array<u32>;

fn added(row: u32, i: u32) -> real {
  if (p.weighted == 0u) { return output[row * p.n + i]; }
  var sum = 0u;
  for (var r = 0u; r < bound(p.outputs); r++) {
    let pair = row * p.outputs + r;
    sum = add(sum, mul(router_weights[pair], output[pair * p.n + i]));
  }
  return sum;
}

@compute @workgroup_size(256)
fn norm(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let block = group.x;
  let row = group.y;
  var from_row = row;
  if (p.rows_at != 0u) { from_row = batch[p.rows_at - 1u + row]; }
  var sum = 0u;
  var mine = 0u;
  for (var i = lane; i < p.n; i += 256u) {
    var x = state_in[from_row * p.n + i];
    if (p.outputs != 0u) {
      let o = added(from_row, i);
      x = add(x, o);
      if (i >> 8u == block) { state[2u * p.region + row * p.n + i] = o; }
    }
    sum = add(sum, mul(x, x));
    if (i >> 8u == block) { mine = x; }
  }
  let mean = div(tree256(lane, sum), from_int(i32(p.n)));
  let r = div(ONE, root(add(mean, p.eps)));
  let i = 256u * block + lane;
  var h = 0u;
  if (i < p.n) {
    h = mul(mul(mine, r), vectors[p.weight_at + i]);
    state[row * p.n + i] = mine;
    state[p.region + row * p.n + i] = h;
  }
  quantise_superblock(lane, h, row * ((p.n + 255u) / 256u) + block);
}
