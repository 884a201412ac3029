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
var<workgroup> four: array<u32, 4>;
var<workgroup> integers: array<i32, 64>;
var<workgroup> planes: array<vec2<u32>, 16>;

// As in reduce.wgsl, for 64 invocations.
fn tree_step(i: u32, step: u32) -> real {
  return add(
    add(lanes[i], lanes[i + 2u * step]), add(lanes[i + step], lanes[i + 3u * step]));
}
fn tree64(lane: u32, value: real) -> real {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 16u) { lanes[lane] = tree_step(lane, 16u); }
  workgroupBarrier();
  if (lane < 4u) { four[lane] = tree_step(lane, 4u); }
  workgroupBarrier();
  return add(add(four[0], four[2]), add(four[1], four[3]));
}

fn max_step(i: u32, step: u32) -> u32 {
  return max(max(lanes[i], lanes[i + step]), max(lanes[i + 2u * step], lanes[i + 3u * step]));
}
fn max64(lane: u32, value: u32) -> u32 {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 16u) { lanes[lane] = max_step(lane, 16u); }
  workgroupBarrier();
  if (lane < 4u) { four[lane] = max_step(lane, 4u); }
  workgroupBarrier();
  return max(max(four[0], four[1]), max(four[2], four[3]));
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
  for (var w = 0u; w < bound(words); w++) {
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
