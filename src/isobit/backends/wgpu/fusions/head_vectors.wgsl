// q, k and v of a token: norm and RoPE for q and k, quantisation, the store to the cache
// (docs/numerics.md, sections 5 and 6). Needs scalar, reduce, cache and head_store.

struct Params {
  n_heads: u32,
  kv_heads: u32,
  head_dim: u32,
  first: u32,  // key-value heads that this cache holds: first … first + heads - 1
  heads: u32,
  q_norm_at: u32,
  k_norm_at: u32,
  eps: real,
  scale: real,  // 1 / sqrt(head_dim)
  slot_at: u32,  // in `batch`: page * 64 + position in it, of each token
  rope_at: u32,  // in `batch`: head_dim / 2 cosines, then sines, of each token
  k_rope_at: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> qkv: array<u32>;
@group(0) @binding(3) var<storage, read> vectors: array<u32>;
@group(0) @binding(4) var<storage, read> batch: array<u32>;
@group(0) @binding(5) var<storage, read_write> rope: array<u32>;  // for the trace
@group(0) @binding(6) var<storage, read_write> queries: array<u32>;
@group(0) @binding(7) var<storage, read_write> cache: array<atomic<u32>>;

var<workgroup> normed: array<u32, 512>;

// A value after RoPE: x_i * cos ± x_other * sin, the sign being that of x_other.
fn roped(i: u32, at_angle: u32) -> real {
  let half = p.head_dim / 2u;
  let first = i < half;
  let pair = select(i - half, i, first);
  let other = normed[select(pair, i + half, first)] ^ select(0u, SIGN, first);
  return dot2(normed[i], batch[at_angle + pair], other, batch[at_angle + half + pair]);
}

// A head vector a workgroup: the query heads of these key-value heads, then k, then v.
@compute @workgroup_size(256)
fn head_vectors(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = group.y;
  let slot = batch[p.slot_at + token];
  let shared_by = p.n_heads / p.kv_heads;  // query heads of a key-value head
  var head = p.first * shared_by + group.x;
  var column = head;
  var kind = QUERY;
  if (group.x >= p.heads * shared_by) {
    let i = group.x - p.heads * shared_by;
    kind = KEY + i / p.heads;
    head = p.first + i % p.heads;
    column = p.n_heads + (kind - KEY) * p.kv_heads + head;
  }
  let x = (token * (p.n_heads + 2u * p.kv_heads) + column) * p.head_dim;
  // A lane has two values at most: c and c + 256.
  let at_angle = p.rope_at + token * p.head_dim;
  var traced = (token * p.n_heads + head) * p.head_dim;
  if (kind == KEY) { traced = p.k_rope_at + (token * p.kv_heads + head) * p.head_dim; }
  if (kind < VALUE) {
    var sum = 0u;
    for (var c = lane; c < bound(p.head_dim); c += 256u) {
      let v = qkv[x + c];
      sum = add(sum, mul(v, v));
    }
    let mean = div(tree(lane, sum, 256u), from_int(i32(p.head_dim)));
    let r = div(ONE, root(add(mean, p.eps)));
    let weight = select(p.q_norm_at, p.k_norm_at, kind == KEY);
    for (var c = lane; c < bound(p.head_dim); c += 256u) {
      normed[c] = mul3(qkv[x + c], r, vectors[weight + c]);
    }
    workgroupBarrier();
  }
  var mine = vec2(0u, 0u);
  for (var c = lane; c < bound(p.head_dim); c += 256u) {
    var v = qkv[x + c];
    if (kind < VALUE) {
      v = roped(c, at_angle);
      rope[traced + c] = v;
    }
    mine[c / 256u] = v;
  }
  store_head(lane, kind, token, head, slot, mine);
}
