// A superblock of Q6_K from a tile: chunks 0-7 low nibbles, 8-11 top bit pairs, 12 scales; then the
// tile's eight d.

struct Super {
  low0: vec4<u32>, low1: vec4<u32>, low2: vec4<u32>, low3: vec4<u32>,
  low4: vec4<u32>, low5: vec4<u32>, low6: vec4<u32>, low7: vec4<u32>,
  top0: vec4<u32>, top1: vec4<u32>, top2: vec4<u32>, top3: vec4<u32>,
  scales: vec4<u32>,
  d: u32,
}

// `weight_tile` is the row's first vec4 in its tile.
fn load(weight_tile: u32, row: u32) -> Super {
  return Super(
    weights[weight_tile], weights[weight_tile + 8u], weights[weight_tile + 16u], weights[weight_tile + 24u],
    weights[weight_tile + 32u], weights[weight_tile + 40u], weights[weight_tile + 48u], weights[weight_tile + 56u],
    weights[weight_tile + 64u], weights[weight_tile + 72u], weights[weight_tile + 80u], weights[weight_tile + 88u],
    weights[weight_tile + 96u],
    weights[weight_tile - row + 104u][row / 2u] >> (16u * (row % 2u)));
}

struct Planes { high: i32, low: i32 }

// 16 codes 0 … 63 less 32, in signed bytes.
fn less32(v: vec4<u32>) -> vec4<u32> { return (v + vec4(0x60606060u)) ^ vec4(0x80808080u); }

fn signed_byte(v: vec4<u32>, i: u32) -> i32 {
  return extractBits(bitcast<i32>(v[i / 4u]), 8u * (i % 4u), 8u);
}

// 32 values: those at k = 16 * g …, and at k + 64; `pairs` are their top bits, above the lowest two.
fn pair(low: vec4<u32>, pairs: vec4<u32>, a: u32, g: u32, scales: vec4<u32>) -> Planes {
  let mask = vec4(0x0f0f0f0fu);
  let bits = vec4(0x03030303u);
  let c0 = less32((low & mask) | ((pairs & bits) << vec4(4u)));
  let c1 = less32(((low >> vec4(4u)) & mask) | (((pairs >> vec4(4u)) & bits) << vec4(4u)));
  let s0 = signed_byte(scales, g);
  let s1 = signed_byte(scales, g + 4u);
  let x = a + g;
  var r = Planes(0, 0);
  r.high = s0 * dot16(c0, staged[x]) + s1 * dot16(c1, staged[x + 4u]);
  if (PLANES == 2u) {
    r.low = s0 * dot16(c0, staged[x + 16u]) + s1 * dot16(c1, staged[x + 20u]);
  }
  return r;
}

fn plus(a: Planes, b: Planes) -> Planes { return Planes(a.high + b.high, a.low + b.low); }

// t of section 4; `a`: the activations. d and the integers make no subnormal and no overflow.
fn superblock(b: Super, a: u32) -> real {
  let two = vec4(2u);
  var sum = pair(b.low0, b.top0, a, 0u, b.scales);
  sum = plus(sum, pair(b.low1, b.top1, a, 1u, b.scales));
  sum = plus(sum, pair(b.low2, b.top0 >> two, a, 2u, b.scales));
  sum = plus(sum, pair(b.low3, b.top1 >> two, a, 3u, b.scales));
  sum = plus(sum, pair(b.low4, b.top2, a, 8u, b.scales));
  sum = plus(sum, pair(b.low5, b.top3, a, 9u, b.scales));
  sum = plus(sum, pair(b.low6, b.top2 >> two, a, 10u, b.scales));
  sum = plus(sum, pair(b.low7, b.top3 >> two, a, 11u, b.scales));
  return scaled(from_half(b.d & 0xffffu), joined(sum.high, sum.low), 0u, 0u);
}
