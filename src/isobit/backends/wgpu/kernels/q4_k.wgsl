// A superblock of Q4_K from a tile: chunk 0 holds d, dmin and the scales, chunks 1-8 the codes.

struct Super {
  head: vec4<u32>,
  c0: vec4<u32>, c1: vec4<u32>, c2: vec4<u32>, c3: vec4<u32>,
  c4: vec4<u32>, c5: vec4<u32>, c6: vec4<u32>, c7: vec4<u32>,
}

// `weight_tile` is the row's first vec4 in its tile.
fn load(weight_tile: u32, row: u32) -> Super {
  return Super(
    weights[weight_tile],
    weights[weight_tile + 8u], weights[weight_tile + 16u], weights[weight_tile + 24u], weights[weight_tile + 32u],
    weights[weight_tile + 40u], weights[weight_tile + 48u], weights[weight_tile + 56u], weights[weight_tile + 64u]);
}

struct Pair { high: i32, low: i32, mins: i32 }

// 64 values: the groups 2 * i and 2 * i + 1, whose scales and mins are the two low bytes.
fn pair(c: vec4<u32>, d: vec4<u32>, a: u32, i: u32, scales: u32, mins: u32) -> Pair {
  let mask = vec4(0x0f0f0f0fu);
  let c0 = c & mask;
  let d0 = d & mask;
  let c1 = (c >> vec4(4u)) & mask;
  let d1 = (d >> vec4(4u)) & mask;
  let s0 = i32(scales & 255u);
  let s1 = i32((scales >> 8u) & 255u);
  let x = a + 4u * i;
  var r = Pair(0, 0, 0);
  r.high = s0 * (dot16(c0, staged[x]) + dot16(d0, staged[x + 1u]))
    + s1 * (dot16(c1, staged[x + 2u]) + dot16(d1, staged[x + 3u]));
  if (PLANES == 2u) {
    r.low = s0 * (dot16(c0, staged[x + 16u]) + dot16(d0, staged[x + 17u]))
      + s1 * (dot16(c1, staged[x + 18u]) + dot16(d1, staged[x + 19u]));
  }
  let sums = bitcast<vec4<i32>>(staged[a + 32u + i]);
  r.mins = i32(mins & 255u) * (sums.x + sums.y) + i32((mins >> 8u) & 255u) * (sums.z + sums.w);
  return r;
}

// t of section 4; `a`: the activations. d, dmin and the integers make no subnormal and no overflow.
fn superblock(b: Super, a: u32) -> real {
  let head = b.head;
  let scales0 = head.y & 0x3f3f3f3fu;
  let mins0 = head.z & 0x3f3f3f3fu;
  let scales1 = (head.w & 0x0f0f0f0fu) | ((head.y >> 2u) & 0x30303030u);
  let mins1 = ((head.w >> 4u) & 0x0f0f0f0fu) | ((head.z >> 2u) & 0x30303030u);
  let r0 = pair(b.c0, b.c1, a, 0u, scales0, mins0);
  let r1 = pair(b.c2, b.c3, a, 1u, scales0 >> 16u, mins0 >> 16u);
  let r2 = pair(b.c4, b.c5, a, 2u, scales1, mins1);
  let r3 = pair(b.c6, b.c7, a, 3u, scales1 >> 16u, mins1 >> 16u);
  let total = joined(r0.high + r1.high + r2.high + r3.high, r0.low + r1.low + r2.low + r3.low);
  let mins = from_int(r0.mins + r1.mins + r2.mins + r3.mins);
  return scaled(from_half(head.x & 0xffffu), total, from_half(head.x >> 16u), mins);
}
