// One tile of keys for one query head of one token (docs/numerics.md, section 6): m, l and o. Needs
// scalar, a dot file and cache.

struct Params {
  n_heads: u32,
  kv_heads: u32,
  head_dim: u32,
  first: u32,  // key-value heads that this cache holds: first … first + heads - 1
  heads: u32,
  token: u32,  // the first of this dispatch
  tiles: u32,  // that `partial` has room for, of each head
  table_at: u32,  // in `batch`: where each token's page table is, less pages_at
  pages_at: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> queries: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read> cache: array<u32>;
@group(0) @binding(5) var<storage, read_write> partial: array<u32>;  // o, m, l

var<workgroup> lanes: array<u32, 64>;
var<workgroup> eight: array<u32, 8>;
var<workgroup> integers: array<i32, 64>;
var<workgroup> planes: array<vec2<u32>, 16>;

// tree of 64 values, one an invocation.
fn tree64(lane: u32, value: real) -> real {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 8u) {
    let a = add(add(lanes[lane], lanes[lane + 32u]), add(lanes[lane + 16u], lanes[lane + 48u]));
    let b = add(add(lanes[lane + 8u], lanes[lane + 40u]), add(lanes[lane + 24u], lanes[lane + 56u]));
    eight[lane] = add(a, b);
  }
  workgroupBarrier();
  let a = add(add(eight[0], eight[4]), add(eight[2], eight[6]));
  let b = add(add(eight[1], eight[5]), add(eight[3], eight[7]));
  return add(a, b);
}

fn max64(lane: u32, value: u32) -> u32 {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 8u) {
    var m = 0u;
    for (var i = lane; i < 64u; i += 8u) { m = max(m, lanes[i]); }
    eight[lane] = m;
  }
  workgroupBarrier();
  var m = 0u;
  for (var i = 0u; i < 8u; i++) { m = max(m, eight[i]); }
  return m;
}

fn joined(high: i32, low: i32) -> real {
  return add_normal(mul_normal(from_int(high), TWO_TO_8), from_int(low));
}

@compute @workgroup_size(64)
fn attention(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let shared_by = p.n_heads / p.kv_heads;
  let head = p.first * shared_by + group.x;
  let tile = group.y;
  let token = p.token + group.z;
  let position = batch[token];
  if (TILE * tile > position) { return; }
  let seen = lane <= position - TILE * tile;
  let page = batch[p.pages_at + batch[p.table_at + token] + tile];
  let words = (p.head_dim + 3u) / 4u;
  let at = record(page, p.heads, group.x / shared_by, words);
  let query = (token * p.n_heads + head) * (2u * words + 1u);

  // Scores: a key an invocation.
  var high = vec2(0, 0);  // high plane of k times both of q
  var low = vec2(0, 0);
  for (var w = 0u; w < words; w++) {
    let q = vec2(queries[query + w], queries[query + words + w]);
    let k = vec2(cache[at + key_at(words, 0u, w) + lane], cache[at + key_at(words, 1u, w) + lane]);
    high += vec2(dot4(q.x, k.x), dot4(q.y, k.x));
    low += vec2(dot4(q.x, k.y), dot4(q.y, k.y));
  }
  let dk = cache[at + key_scales_at(words) + lane];
  let dv = cache[at + value_scales_at(words) + lane];
  let s = mul(mul(queries[query + 2u * words], dk), joined(256 * high.x + high.y, 256 * low.x + low.y));
  let m = from_order(max64(lane, select(0u, order(s), seen)));
  var weight = 0u;
  var weighted = 0u;
  if (seen) {
    weight = exp_real(sub(s, m));
    weighted = mul(weight, dv);
  }
  let l = tree64(lane, weight);
  let block = block_of(max64(lane, magnitude(weighted)), 2u);
  integers[lane] = quantise(weighted, block.r);
  workgroupBarrier();
  if (lane < 16u) {
    var packed = vec2(0u, 0u);
    for (var i = 0u; i < 4u; i++) {
      let n = integers[4u * lane + i];
      packed |= (bitcast<vec2<u32>>(vec2(high_byte(n), low_byte(n))) & vec2(255u)) << vec2(8u * i);
    }
    planes[lane] = packed;
  }
  workgroupBarrier();

  // Outputs: a column an invocation at a time. Keys beyond the position have weight 0.
  let to = ((group.z * p.n_heads + head) * p.tiles + tile) * (p.head_dim + 2u);
  for (var c = lane; c < p.head_dim; c += TILE) {
    high = vec2(0, 0);
    low = vec2(0, 0);
    for (var w = 0u; w < 16u; w++) {
      let n = planes[w];
      let v = vec2(cache[at + value_at(words, 0u, w) + c], cache[at + value_at(words, 1u, w) + c]);
      high += vec2(dot4(n.x, v.x), dot4(n.y, v.x));
      low += vec2(dot4(n.x, v.y), dot4(n.y, v.y));
    }
    partial[to + c] = mul(block.d, joined(256 * high.x + high.y, 256 * low.x + low.y));
  }
  if (lane == 0u) {
    partial[to + p.head_dim] = m;
    partial[to + p.head_dim + 1u] = l;
  }
}
