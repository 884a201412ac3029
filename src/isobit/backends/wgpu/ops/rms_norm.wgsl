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

// What a lane adds up of a row: the sum of squares; x and what was added to it, in the group's block.
struct Lane { sum: real, x: real, added: real }

// Four values, 256 apart; +0, which changes no sum, where `used` is false.
fn four(row: u32, i: vec4<u32>, used: vec4<bool>) -> vec4<u32> {
  let at = vec4(row * p.n) + min(i, vec4(p.n - 1u));
  return select(vec4(0u), vec4(output[at.x], output[at.y], output[at.z], output[at.w]), used);
}

// Any values, one after another.
fn slowly(lane: u32, block: u32, row: u32) -> Lane {
  var r = Lane(0u, 0u, 0u);
  for (var i = lane; i < bound(p.n); i += 256u) {
    var x = state_in[row * p.n + i];
    var o = 0u;
    for (var e = 0u; e < bound(p.outputs); e++) {
      var y = output[(row * p.outputs + e) * p.n + i];
      if (p.weighted != 0u) { y = add(o, mul(router_weights[row * p.outputs + e], y)); }
      o = y;
    }
    if (p.outputs != 0u) { x = add(x, o); }
    r.sum = add(r.sum, mul(x, x));
    if (i / 256u == block) {
      r.x = x;
      r.added = o;
    }
  }
  return r;
}

@compute @workgroup_size(256)
fn rms_norm(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let block = group.x;
  let row = group.y;
  var from_row = row;
  if (p.rows_at != 0u) { from_row = batch[p.rows_at - 1u + row]; }
  // Four values at a time, and of four experts, so that no load waits for another's value.
  var mine = Lane(0u, 0u, 0u);
  var usual = true;
  for (var i0 = lane; i0 < bound(p.n); i0 += 1024u) {
    let i = vec4(i0) + vec4(0u, 256u, 512u, 768u);
    let inside = i < vec4(p.n);
    let at = vec4(from_row * p.n) + min(i, vec4(p.n - 1u));
    var x = vec4(state_in[at.x], state_in[at.y], state_in[at.z], state_in[at.w]);
    x = select(vec4(0u), x, inside);
    var o = vec4(0u);
    if (p.weighted != 0u) {
      for (var e = 0u; e < bound(p.outputs); e += 4u) {
        let pair = vec4(from_row * p.outputs)
          + min(vec4(e) + vec4(0u, 1u, 2u, 3u), vec4(p.outputs - 1u));
        let there = vec4(e) + vec4(0u, 1u, 2u, 3u) < vec4(p.outputs);
        let w = vec4(
          router_weights[pair.x], router_weights[pair.y],
          router_weights[pair.z], router_weights[pair.w]);
        let y0 = four(pair.x, i, inside);
        let y1 = four(pair.y, i, inside & there.yyyy);
        let y2 = four(pair.z, i, inside & there.zzzz);
        let y3 = four(pair.w, i, inside & there.wwww);
        usual = usual && factors(w) && factors(y0) && factors(y1) && factors(y2) && factors(y3);
        o = add_normal4(o, mul_normal4(w.xxxx, y0));
        o = add_normal4(o, mul_normal4(w.yyyy, y1));
        o = add_normal4(o, mul_normal4(w.zzzz, y2));
        o = add_normal4(o, mul_normal4(w.wwww, y3));
      }
    } else if (p.outputs != 0u) {
      o = four(from_row, i, inside);
    }
    usual = usual && factors(x) && (p.weighted != 0u || factors(o));
    if (p.outputs != 0u) { x = add_normal4(x, o); }
    usual = usual && factors(x);
    let squares = mul_normal4(x, x);
    mine.sum = add_normal(add_normal(mine.sum, squares.x), squares.y);
    mine.sum = add_normal(add_normal(mine.sum, squares.z), squares.w);
    if (i0 / 1024u == block / 4u) {
      mine.x = x[block % 4u];
      mine.added = o[block % 4u];
    }
  }
  if (!usual) { mine = slowly(lane, block, from_row); }
  let mean = div(tree(lane, mine.sum, 256u), from_int(i32(p.n)));
  let r = div(ONE, root(add(mean, p.eps)));
  let i = 256u * block + lane;
  var h = 0u;
  if (i < p.n) {
    h = mul3(mine.x, r, vectors[p.weight_at + i]);
    state[row * p.n + i] = mine.x;
    state[p.region + row * p.n + i] = h;
    if (p.outputs != 0u) { state[2u * p.region + row * p.n + i] = mine.added; }
  }
  quantise_superblock(lane, h, row * ((p.n + 255u) / 256u) + block);
}
