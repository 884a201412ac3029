// One tile of keys for one query head of one token (docs/numerics.md, section 6): m, l and o. Needs
// scalar, a dot file, reduce and cache.

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
  window: u32,  // positions that a query sees, its own among them; 0: all up to it
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> queries: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read> cache: array<u32>;
@group(0) @binding(5) var<storage, read_write> partial: array<u32>;  // o, m, l

var<workgroup> shared_query: array<vec4<u32>, 64>;  // the high plane of 512 values, the low one
var<workgroup> others: array<vec4<i32>, 64>;  // the sums of a key's second invocation
var<workgroup> integers: array<vec4<i32>, 16>;
var<workgroup> planes: array<vec4<u32>, 8>;  // the weights' high plane, the low one

fn four_bytes(v: vec4<i32>) -> u32 {
  let b = bitcast<vec4<u32>>(v) & vec4(255u);
  return b.x | (b.y << 8u) | (b.z << 16u) | (b.w << 24u);
}

// Four words of the cache.
fn four_of(i: u32, step: u32) -> vec4<u32> {
  return vec4(cache[i], cache[i + step], cache[i + 2u * step], cache[i + 3u * step]);
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
  return dot4(a.x, b.x) + dot4(a.y, b.y) + dot4(a.z, b.z) + dot4(a.w, b.w);
}

// Of a cached vector's high and low plane, with both planes of the other factor.
struct Sums { high: vec2<i32>, low: vec2<i32> }
fn plus(s: Sums, a_high: vec4<u32>, a_low: vec4<u32>, high: vec4<u32>, low: vec4<u32>) -> Sums {
  return Sums(
    s.high + vec2(dot16(a_high, high), dot16(a_low, high)),
    s.low + vec2(dot16(a_high, low), dot16(a_low, low)));
}
fn joined_sums(s: Sums) -> real {
  let high = from_int(256 * s.high.x + s.high.y);
  return add_normal(mul_normal(high, TWO_TO_8), from_int(256 * s.low.x + s.low.y));
}

@compute @workgroup_size(128)
fn attention(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let shared_by = p.n_heads / p.kv_heads;
  let head = p.first * shared_by + group.x;
  let key_tile = group.y;
  let token = p.token + group.z;
  let position = batch[token];
  let first = first_seen(position, p.window);
  if (KV_PAGE * key_tile > position || key_tile < first / KV_PAGE) { return; }
  let key = lane % KV_PAGE;
  let at_key = KV_PAGE * key_tile + key;
  let seen = lane < KV_PAGE && at_key <= position && at_key >= first;
  let page = batch[p.pages_at + batch[p.table_at + token] + key_tile];
  let words = (p.head_dim + 3u) / 4u;
  let at = head_page(page, p.heads, group.x / shared_by, words);
  let query = (token * p.n_heads + head) * (2u * words + 1u);

  let dk = cache[at + key_scales_at(words) + key];
  let dv = cache[at + value_scales_at(words) + key];
  let dq = queries[query + 2u * words];

  // Scores: two invocations a key, eight words by turns. Loads stand together, so that none waits for
  // another's value; the query is zero beyond its words.
  for (var i = lane; i < 2u * 128u; i += 128u) {
    let w = i % 128u;
    let q = queries[query + (i / 128u) * words + min(w, words - 1u)];
    shared_query[i / 4u][i % 4u] = select(0u, q, w < words);
  }
  workgroupBarrier();
  var sums = Sums(vec2(0, 0), vec2(0, 0));
  for (var w = lane / KV_PAGE * 8u; w < bound(words); w += 16u) {
    let k = at + key_at(words, 0u, w) + key;
    let low = words * KV_PAGE;
    let a = four_of(k, KV_PAGE);
    let b = four_of(k + low, KV_PAGE);
    let c = four_of(k + 4u * KV_PAGE, KV_PAGE);
    let d = four_of(k + low + 4u * KV_PAGE, KV_PAGE);
    sums = plus(sums, shared_query[w / 4u], shared_query[32u + w / 4u], a, b);
    sums = plus(sums, shared_query[w / 4u + 1u], shared_query[33u + w / 4u], c, d);
  }
  if (lane >= KV_PAGE) { others[key] = vec4(sums.high, sums.low); }
  workgroupBarrier();
  let more = others[key];
  sums = Sums(sums.high + more.xy, sums.low + more.zw);
  let s = mul3(dq, dk, joined_sums(sums));
  let m = from_order(largest(lane, select(0u, order(s), seen), 64u));
  var weight = 0u;
  var weighted = 0u;
  if (seen) {
    weight = exp_real(sub_normal(s, m));
    weighted = mul_normal(weight, dv);  // what is flushed is 0 once quantised
  }
  let l = tree(lane, weight, 64u);
  let block = block_of(largest(lane, magnitude(weighted), 64u), 2u);
  if (lane < KV_PAGE) { integers[key / 4u][key % 4u] = quantise(weighted, block.r); }
  workgroupBarrier();
  if (lane < 16u) {
    let q = integers[lane];
    let low = ((q + vec4(128)) & vec4(255)) - vec4(128);
    planes[lane / 4u][lane % 4u] = four_bytes((q - low) >> vec4(8u));
    planes[4u + lane / 4u][lane % 4u] = four_bytes(low);
  }
  workgroupBarrier();

  // Outputs: a column an invocation at a time. Keys beyond the position have weight 0.
  let to = ((group.z * p.n_heads + head) * p.tiles + key_tile) * (p.head_dim + 2u);
  for (var c = lane; c < p.head_dim; c += 128u) {
    sums = Sums(vec2(0, 0), vec2(0, 0));
    let row = 4u * words;  // one four of positions
    for (var w = 0u; w < 16u; w += 8u) {
      let v = at + value_at(words, 0u, w) + c;
      let low = 16u * row;
      let first = four_of(v, row);
      let second = four_of(v + low, row);
      let third = four_of(v + 4u * row, row);
      let fourth = four_of(v + low + 4u * row, row);
      sums = plus(sums, planes[w / 4u], planes[4u + w / 4u], first, second);
      sums = plus(sums, planes[w / 4u + 1u], planes[5u + w / 4u], third, fourth);
    }
    partial[to + c] = mul(block.d, joined_sums(sums));
  }
  if (lane == 0u) {
    partial[to + p.head_dim] = m;
    partial[to + p.head_dim + 1u] = l;
  }
}
