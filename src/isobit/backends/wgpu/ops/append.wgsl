// Head vectors of a token, quantised and stored. Needs scalar, reduce, cache and head_store.

struct Params {
  kind: u32,  // QUERY, KEY or VALUE
  n_heads: u32,  // of a token
  head_dim: u32,
  first: u32,  // heads that this cache holds: first … first + heads - 1
  heads: u32,
  scale: real,  // 1 / sqrt(head_dim)
  slot_at: u32,  // in `batch`: page * 64 + position in it, of each token
  x_at: u32,
  x_stride: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> queries: array<u32>;
@group(0) @binding(5) var<storage, read_write> cache: array<atomic<u32>>;

// A head vector a workgroup.
@compute @workgroup_size(256)
fn append(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let head = p.first + group.x;
  var mine = vec2(0u, 0u);
  for (var c = lane; c < bound(p.head_dim); c += 256u) {
    mine[c / 256u] = x[p.x_at + group.y * p.x_stride + head * p.head_dim + c];
  }
  store_head(lane, p.kind, group.y, head, batch[p.slot_at + group.y], mine);
}
