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

// Four values of a row, 256 apart. Loads stand together, so that none waits for another's value.
struct Four { at: vec4<u32>, inside: vec4<bool> }
fn output4(row: u32, four: Four) -> vec4<u32> {
  let i = row * p.n + four.at;
  return vec4(output[i.x], output[i.y], output[i.z], output[i.w]);
}

// What a token's experts give, in rank order.
fn weighted(row: u32, four: Four) -> vec4<u32> {
  var sum = vec4(0u);
  for (var r = 0u; r < bound(p.outputs); r += 4u) {
    let pair = vec4(row * p.outputs) + min(vec4(r) + vec4(0u, 1u, 2u, 3u), vec4(p.outputs - 1u));
    let w = vec4(
      router_weights[pair.x], router_weights[pair.y], router_weights[pair.z], router_weights[pair.w]);
    let y0 = output4(pair.x, four);
    let y1 = output4(pair.y, four);
    let y2 = output4(pair.z, four);
    let y3 = output4(pair.w, four);
    sum = add4(sum, mul4(w.xxxx, y0));
    if (r + 1u < p.outputs) { sum = add4(sum, mul4(w.yyyy, y1)); }
    if (r + 2u < p.outputs) { sum = add4(sum, mul4(w.zzzz, y2)); }
    if (r + 3u < p.outputs) { sum = add4(sum, mul4(w.wwww, y3)); }
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
  for (var b = 0u; b < bound(p.n); b += 1024u) {
    let i = vec4(b + lane) + vec4(0u, 256u, 512u, 768u);
    let four = Four(min(i, vec4(p.n - 1u)), i < vec4(p.n));
    let from_at = from_row * p.n + four.at;
    var x = vec4(state_in[from_at.x], state_in[from_at.y], state_in[from_at.z], state_in[from_at.w]);
    let own = (block * 256u) / 1024u == b / 1024u;
    if (p.outputs != 0u) {
      var o: vec4<u32>;
      if (p.weighted != 0u) { o = weighted(from_row, four); } else { o = output4(from_row, four); }
      x = add4(x, o);
      if (own && i[block % 4u] < p.n) { state[2u * p.region + row * p.n + i[block % 4u]] = o[block % 4u]; }
    }
    x = select(vec4(0u), x, four.inside);
    if (own) { mine = x[block % 4u]; }
    let squares = mul4(x, x);
    sum = add(add(add(add(sum, squares.x), squares.y), squares.z), squares.w);
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
