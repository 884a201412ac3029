// A superblock of Q6_K from a tile: chunks 0-7 low nibbles, 8-11 top bit pairs, 12 scales; then the
// tile's eight d.

struct Planes { high: i32, low: i32 }

// 16 codes 0 … 63 less 32, in signed bytes.
fn less32(v: vec4<u32>) -> vec4<u32> { return (v + vec4(0x60606060u)) ^ vec4(0x80808080u); }

fn signed_byte(v: vec4<u32>, i: u32) -> i32 {
  return extractBits(bitcast<i32>(v[i / 4u]), 8u * (i % 4u), 8u);
}

// 32 values: those at k = 128 * half + 16 * quarter …, and at k + 64.
fn pair(tile: u32, a: u32, half: u32, quarter: u32, scales: vec4<u32>) -> Planes {
  let low = weights[tile + 8u * (4u * half + quarter)];
  let top = weights[tile + 8u * (8u + 2u * half + quarter % 2u)] >> vec4(2u * (quarter / 2u));
  let mask = vec4(0x0f0f0f0fu);
  let bits = vec4(0x03030303u);
  let c0 = less32((low & mask) | ((top & bits) << vec4(4u)));
  let c1 = less32(((low >> vec4(4u)) & mask) | (((top >> vec4(4u)) & bits) << vec4(4u)));
  let g = 8u * half + quarter;
  let s0 = signed_byte(scales, g);
  let s1 = signed_byte(scales, g + 4u);
  let x = a + g;
  var r = Planes(0, 0);
  r.high = s0 * dot16(c0, acts[x]) + s1 * dot16(c1, acts[x + 4u]);
  if (PLANES == 2u) {
    r.low = s0 * dot16(c0, acts[x + 16u]) + s1 * dot16(c1, acts[x + 20u]);
  }
  return r;
}

fn both(tile: u32, a: u32, half: u32, scales: vec4<u32>) -> Planes {
  let r0 = pair(tile, a, half, 0u, scales);
  let r1 = pair(tile, a, half, 1u, scales);
  let r2 = pair(tile, a, half, 2u, scales);
  let r3 = pair(tile, a, half, 3u, scales);
  return Planes(r0.high + r1.high + r2.high + r3.high, r0.low + r1.low + r2.low + r3.low);
}

// t of section 4: `tile` is the row's first vec4 in its tile, `a` the activations.
fn superblock(tile: u32, row: u32, a: u32) -> real {
  let scales = weights[tile + 96u];
  let r0 = both(tile, a, 0u, scales);
  let r1 = both(tile, a, 1u, scales);
  let d = weights[tile - row + 104u][row / 2u] >> (16u * (row % 2u));
  return mul(from_half(d & 0xffffu), joined(r0.high + r1.high, r0.low + r1.low));
}
