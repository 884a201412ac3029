// A superblock of IQ4_NL, IQ4_XS or MXFP4 from a tile.
//
// Needs bytes. Blocks of 18 and 17 bytes begin inside words: the codes of such a block are words shifted together.

override FORMAT: u32;  // ggml's number

const IQ4_NL = 20u;
const IQ4_XS = 23u;
const MXFP4 = 39u;

// The four bytes of `b` where a byte of the mask is set, else those of `a`.
fn either(mask: u32, a: u32, b: u32) -> u32 { return a ^ ((a ^ b) & mask); }
// Four-bit indices in four bytes to the codes of IQ4: halving the table by one bit after another.
fn iq4(indices: u32) -> u32 {
  let m0 = mask_of(indices, 0u);
  let m1 = mask_of(indices, 1u);
  let m2 = mask_of(indices, 2u);
  let q0 = either(m1, either(m0, 0x81818181u, 0x98989898u), either(m0, 0xadadadadu, 0xbfbfbfbfu));
  let q1 = either(m1, either(m0, 0xcfcfcfcfu, 0xddddddddu), either(m0, 0xeaeaeaeau, 0xf6f6f6f6u));
  let q2 = either(m1, either(m0, 0x01010101u, 0x0d0d0d0du), either(m0, 0x19191919u, 0x26262626u));
  let q3 = either(m1, either(m0, 0x35353535u, 0x45454545u), either(m0, 0x59595959u, 0x71717171u));
  return either(mask_of(indices, 3u), either(m2, q0, q1), either(m2, q2, q3));
}

// MXFP4's scale, 2^(e - 128); for e < 2 a subnormal.
fn power_of_two(e: u32) -> real { return select((e - 1u) << 23u, 0x200000u << (e & 1u), e < 2u); }

struct Super {
  c0: vec4<u32>, c1: vec4<u32>, c2: vec4<u32>, c3: vec4<u32>,
  c4: vec4<u32>, c5: vec4<u32>, c6: vec4<u32>, c7: vec4<u32>,
  end: vec4<u32>,  // two words, but in IQ4_NL a whole chunk
}

// `weight_tile` is the row's first vec4 in its tile.
fn load(weight_tile: u32, row: u32) -> Super {
  var end = vec4(0u);
  if (FORMAT == IQ4_NL) {
    end = weights[weight_tile + 64u];
  } else {
    let two_rows = weights[weight_tile - row + 64u + row / 2u];
    end = select(two_rows, two_rows.zwxy, row % 2u == 1u);
  }
  return Super(
    weights[weight_tile], weights[weight_tile + 8u], weights[weight_tile + 16u], weights[weight_tile + 24u],
    weights[weight_tile + 32u], weights[weight_tile + 40u], weights[weight_tile + 48u], weights[weight_tile + 56u], end);
}

fn codes(indices: vec4<u32>) -> vec4<u32> {
  let i = indices & vec4(0x0f0f0f0fu);
  if (FORMAT == MXFP4) { return vec4(fp4(i.x), fp4(i.y), fp4(i.z), fp4(i.w)); }
  return vec4(iq4(i.x), iq4(i.y), iq4(i.z), iq4(i.w));
}

// 32 values with the activations at `x`: those of the low nibbles, then of the high ones.
struct Sums { high: i32, low: i32 }
fn dots(q: vec4<u32>, x: u32) -> Sums {
  let c0 = codes(q);
  let c1 = codes(q >> vec4(4u));
  var r = Sums(dot16(c0, staged[x]) + dot16(c1, staged[x + 1u]), 0);
  if (PLANES == 2u) { r.low = dot16(c0, staged[x + 16u]) + dot16(c1, staged[x + 17u]); }
  return r;
}

// Four words from `shift` bits of the first on; `next` holds the words that follow each.
fn shifted(words: vec4<u32>, next: vec4<u32>, shift: u32) -> vec4<u32> {
  return (words >> vec4(shift)) | (next << vec4(32u - shift));
}

// t + d * T of a block whose scale is a half, or whose exponent is a byte.
fn with_half(t: real, half: u32, q: vec4<u32>, x: u32) -> real {
  let s = dots(q, x);
  return add_normal(t, scaled(from_half(half & 0xffffu), joined(s.high, s.low), 0u, 0u));
}
fn with_exponent(t: real, e: u32, q: vec4<u32>, x: u32) -> real {
  let s = dots(q, x);
  return add(t, mul(power_of_two(e & 255u), joined(s.high, s.low)));
}

// t of section 4; `a`: the activations.
fn superblock(b: Super, a: u32) -> real {
  switch FORMAT {
    case IQ4_NL: { return superblock_iq4_nl(b, a); }
    case IQ4_XS: { return superblock_iq4_xs(b, a); }
    default: { return superblock_mxfp4(b, a); }
  }
}

fn superblock_iq4_nl(b: Super, a: u32) -> real {
  let q0 = shifted(b.c0, vec4(b.c0.yzw, b.c1.x), 16u);
  let q2 = shifted(vec4(b.c2.yzw, b.c3.x), vec4(b.c2.zw, b.c3.xy), 16u);
  let q4 = shifted(vec4(b.c4.zw, b.c5.xy), vec4(b.c4.w, b.c5.xyz), 16u);
  let q6 = shifted(vec4(b.c6.w, b.c7.xyz), b.c7, 16u);
  var t = with_half(0u, b.c0.x, q0, a);
  t = with_half(t, b.c1.x >> 16u, vec4(b.c1.yzw, b.c2.x), a + 2u);
  t = with_half(t, b.c2.y, q2, a + 4u);
  t = with_half(t, b.c3.y >> 16u, vec4(b.c3.zw, b.c4.xy), a + 6u);
  t = with_half(t, b.c4.z, q4, a + 8u);
  t = with_half(t, b.c5.z >> 16u, vec4(b.c5.w, b.c6.xyz), a + 10u);
  t = with_half(t, b.c6.w, q6, a + 12u);
  return with_half(t, b.c7.w >> 16u, b.end, a + 14u);
}

fn superblock_mxfp4(b: Super, a: u32) -> real {
  let q4 = shifted(vec4(b.c4.yzw, b.c5.x), vec4(b.c4.zw, b.c5.xy), 8u);
  let q5 = shifted(vec4(b.c5.yzw, b.c6.x), vec4(b.c5.zw, b.c6.xy), 16u);
  let q6 = shifted(vec4(b.c6.yzw, b.c7.x), vec4(b.c6.zw, b.c7.xy), 24u);
  var t = with_exponent(0u, b.c0.x, shifted(b.c0, vec4(b.c0.yzw, b.c1.x), 8u), a);
  t = with_exponent(t, b.c1.x >> 8u, shifted(b.c1, vec4(b.c1.yzw, b.c2.x), 16u), a + 2u);
  t = with_exponent(t, b.c2.x >> 16u, shifted(b.c2, vec4(b.c2.yzw, b.c3.x), 24u), a + 4u);
  t = with_exponent(t, b.c3.x >> 24u, vec4(b.c3.yzw, b.c4.x), a + 6u);
  t = with_exponent(t, b.c4.y, q4, a + 8u);
  t = with_exponent(t, b.c5.y >> 8u, q5, a + 10u);
  t = with_exponent(t, b.c6.y >> 16u, q6, a + 12u);
  return with_exponent(t, b.c7.y >> 24u, vec4(b.c7.zw, b.end.xy), a + 14u);
}

// 32 values of IQ4_XS, times their sub-scale.
fn group(sums: Sums, head: vec4<u32>, g: u32, q: vec4<u32>, a: u32) -> Sums {
  let scale = i32(((head.y >> (4u * g)) & 15u) | (((head.x >> (16u + 2u * g)) & 3u) << 4u)) - 32;
  let s = dots(q, a + 2u * g);
  return Sums(sums.high + scale * s.high, sums.low + scale * s.low);
}

fn superblock_iq4_xs(b: Super, a: u32) -> real {
  var s = group(Sums(0, 0), b.c0, 0u, vec4(b.c0.zw, b.c1.xy), a);
  s = group(s, b.c0, 1u, vec4(b.c1.zw, b.c2.xy), a);
  s = group(s, b.c0, 2u, vec4(b.c2.zw, b.c3.xy), a);
  s = group(s, b.c0, 3u, vec4(b.c3.zw, b.c4.xy), a);
  s = group(s, b.c0, 4u, vec4(b.c4.zw, b.c5.xy), a);
  s = group(s, b.c0, 5u, vec4(b.c5.zw, b.c6.xy), a);
  s = group(s, b.c0, 6u, vec4(b.c6.zw, b.c7.xy), a);
  s = group(s, b.c0, 7u, vec4(b.c7.zw, b.end.xy), a);
  return scaled(from_half(b.c0.x & 0xffffu), joined(s.high, s.low), 0u, 0u);
}
