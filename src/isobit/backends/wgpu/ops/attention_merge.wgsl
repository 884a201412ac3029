// The tiles of a query head merged in ascending order, and their quantisation (docs/numerics.md,
// sections 3 and 6). Needs scalar, reduce, cache and quantise.

struct Params {
  n_heads: u32,
  head_dim: u32,
  token: u32,  // the first of this dispatch
  tiles: u32,  // that `partial` has room for, of each head
  window: u32,  // positions that a query sees, its own among them; 0: all up to it
  sinks_at: u32,  // in `vectors`: one a head, + 1; 0: none
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> partial: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read> vectors: array<u32>;
@group(0) @binding(5) var<storage, read_write> result: array<u32>;  // [tokens, n_heads * head_dim]
@group(0) @binding(6) var<storage, read_write> acts: array<u32>;

struct Tile { o: real, m: real, l: real }
fn tile_of(at: u32, c: u32) -> Tile {
  return Tile(partial[at + c], partial[at + p.head_dim], partial[at + p.head_dim + 1u]);
}

// A superblock of the result a workgroup.
@compute @workgroup_size(256)
fn attention_merge(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let token = p.token + group.y;
  let width = p.n_heads * p.head_dim;
  let column = 256u * group.x + lane;
  var value = 0u;
  if (column < width) {
    let stride = p.head_dim + 2u;
    let c = column % p.head_dim;
    let head = column / p.head_dim;
    let begin = first_seen(batch[token], p.window) / KV_PAGE;
    let first = ((group.y * p.n_heads + head) * p.tiles + begin) * stride;
    let tiles = batch[token] / KV_PAGE + 1u - begin;
    var o = partial[first + c];
    var m = partial[first + p.head_dim];
    var l = partial[first + p.head_dim + 1u];
    var next = tile_of(first + min(1u, tiles - 1u) * stride, c);
    for (var t = 1u; t < bound(tiles); t++) {
      let key_tile = next;
      next = tile_of(first + min(t + 1u, tiles - 1u) * stride, c);  // on its way meanwhile
      let top = maximum(m, key_tile.m);
      let a = exp_real(sub_normal(m, top));
      let b = exp_real(sub_normal(key_tile.m, top));
      // l and a, or key_tile.l and b, are at least 1: what is flushed beside them would be lost anyway.
      l = add_normal(mul_normal(l, a), mul_normal(key_tile.l, b));
      o = dot2(o, a, key_tile.o, b);
      m = top;
    }
    if (p.sinks_at != 0u) {
      let sink = vectors[p.sinks_at - 1u + head];
      let top = maximum(m, sink);
      let a = exp_real(sub_normal(m, top));
      l = add(mul(l, a), exp_real(sub_normal(sink, top)));
      o = mul(o, a);
    }
    value = mul(o, div(ONE, l));
    result[token * width + column] = value;
  }
  quantise_superblock(lane, value, token * ((width + 255u) / 256u) + group.x);
}
