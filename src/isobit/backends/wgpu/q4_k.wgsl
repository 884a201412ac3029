// A superblock of Q4_K from a tile: chunk 0 holds d, dmin and the scales, chunks 1-8 the codes.

struct Pair { high: i32, low: i32, mins: i32 }

// 64 values: the groups 2 * i and 2 * i + 1, whose scales and mins are the two low bytes.
fn pair(tile: u32, a: u32, i: u32, scales: u32, mins: u32) -> Pair {
  let c = weights[tile + 8u + 16u * i];
  let d = weights[tile + 16u + 16u * i];
  let mask = vec4(0x0f0f0f0fu);
  let c0 = c & mask;
  let d0 = d & mask;
  let c1 = (c >> vec4(4u)) & mask;
  let d1 = (d >> vec4(4u)) & mask;
  let s0 = i32(scales & 255u);
  let s1 = i32((scales >> 8u) & 255u);
  let x = a + 4u * i;
  var r = Pair(0, 0, 0);
  r.high = s0 * (dot16(c0, acts[x]) + dot16(d0, acts[x + 1u]))
    + s1 * (dot16(c1, acts[x + 2u]) + dot16(d1, acts[x + 3u]));
  if (PLANES == 2u) {
    r.low = s0 * (dot16(c0, acts[x + 16u]) + dot16(d0, acts[x + 17u]))
      + s1 * (dot16(c1, acts[x + 18u]) + dot16(d1, acts[x + 19u]));
  }
  let sums = bitcast<vec4<i32>>(acts[a + 32u + i]);
  r.mins = i32(mins & 255u) * (sums.x + sums.y) + i32((mins >> 8u) & 255u) * (sums.z + sums.w);
  return r;
}

// t of section 4: `tile` is the row's first vec4 in its tile, `a` the activations.
fn superblock(tile: u32, row: u32, a: u32) -> real {
  let head = weights[tile];
  let scales0 = head.y & 0x3f3f3f3fu;
  let mins0 = head.z & 0x3f3f3f3fu;
  let scales1 = (head.w & 0x0f0f0f0fu) | ((head.y >> 2u) & 0x30303030u);
  let mins1 = ((head.w >> 4u) & 0x0f0f0f0fu) | ((head.z >> 2u) & 0x30303030u);
  let r0 = pair(tile, a, 0u, scales0, mins0);
  let r1 = pair(tile, a, 1u, scales0 >> 16u, mins0 >> 16u);
  let r2 = pair(tile, a, 2u, scales1, mins1);
  let r3 = pair(tile, a, 3u, scales1 >> 16u, mins1 >> 16u);
  let total = joined(r0.high + r1.high + r2.high + r3.high, r0.low + r1.low + r2.low + r3.low);
  let mins = from_int(r0.mins + r1.mins + r2.mins + r3.mins);
  return sub(mul(from_half(head.x & 0xffffu), total), mul(from_half(head.x >> 16u), mins));
}
