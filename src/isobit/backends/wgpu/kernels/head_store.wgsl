// A head vector quantised to 16 bits and stored (docs/numerics.md, section 6): a query's for attention,
// a key's or a value's in the cache. Needs scalar, reduce and cache; the file that uses it declares
// `queries`, `cache` and p.n_heads, head_dim, first, heads, scale.

const QUERY = 0u;
const KEY = 1u;
const VALUE = 2u;

var<workgroup> integers: array<vec4<i32>, 128>;

fn four_bytes(v: vec4<i32>) -> u32 {
  let b = bitcast<vec4<u32>>(v) & vec4(255u);
  return b.x | (b.y << 8u) | (b.z << 16u) | (b.w << 24u);
}

// Other tokens of the batch may be writing the word's other bytes.
fn store_byte(at: u32, shift: u32, value: i32) {
  atomicAnd(&cache[at], ~(255u << shift));
  atomicOr(&cache[at], (bitcast<u32>(value) & 255u) << shift);
}

// An invocation has two values at most: those of columns lane and lane + 256; beyond the vector, zeros.
fn store_head(lane: u32, kind: u32, token: u32, head: u32, slot: u32, mine: vec2<u32>) {
  let top = max(magnitude(mine.x), magnitude(mine.y));
  let block = block_of(largest(lane, top, 256u), 2u);
  for (var c = lane; c < 512u; c += 256u) { integers[c / 4u][c % 4u] = quantise(mine[c / 256u], block.r); }
  workgroupBarrier();
  let words = (p.head_dim + 3u) / 4u;
  let to = head_page(slot / KV_PAGE, p.heads, head - p.first, words);
  let key = slot % KV_PAGE;
  if (kind == VALUE) {
    for (var c = lane; c < 4u * words; c += 256u) {
      let high = to + value_at(words, 0u, key / 4u) + c;
      let low = to + value_at(words, 1u, key / 4u) + c;
      store_byte(high, 8u * (key % 4u), high_byte(integers[c / 4u][c % 4u]));
      store_byte(low, 8u * (key % 4u), low_byte(integers[c / 4u][c % 4u]));
    }
    if (lane == 0u) { atomicStore(&cache[to + value_scales_at(words) + key], block.d); }
  } else {
    let query = (token * p.n_heads + head) * (2u * words + 1u);
    for (var n = lane; n < words; n += 256u) {
      let q = integers[n];
      let low = ((q + vec4(128)) & vec4(255)) - vec4(128);
      let high = four_bytes((q - low) >> vec4(8u));
      if (kind == QUERY) {
        queries[query + n] = high;
        queries[query + words + n] = four_bytes(low);
      } else {
        atomicStore(&cache[to + key_at(words, 0u, n) + key], high);
        atomicStore(&cache[to + key_at(words, 1u, n) + key], four_bytes(low));
      }
    }
    if (lane == 0u) {
      if (kind == QUERY) {
        queries[query + 2u * words] = mul(block.d, p.scale);
      } else {
        atomicStore(&cache[to + key_scales_at(words) + key], block.d);
      }
    }
  }
}
