// Activations in fixed point: 592 bytes a superblock. Needs scalar and reduce; the file that writes
// them declares `acts` as array<u32>.
//
//   words 0-63 and 64-127   the planes, four values a word (one plane: the first)
//   words 128-143           sums of q over each 16 values
//   word 144                the scale

override PLANES: u32 = 2u;
const ACT_WORDS = 148u;

var<workgroup> integers: array<vec4<i32>, 64>;

fn four_bytes(v: vec4<i32>) -> u32 {
  let b = bitcast<vec4<u32>>(v) & vec4(255u);
  return b.x | (b.y << 8u) | (b.z << 16u) | (b.w << 24u);
}

// Quantise a superblock of which each of 256 invocations holds a value; beyond a row's end, zero.
fn quantise_superblock(lane: u32, value: real, index: u32) {
  let block = block_of(largest(lane, magnitude(value), 256u), PLANES);
  integers[lane / 4u][lane % 4u] = quantise(value, block.r);
  workgroupBarrier();
  let at = index * ACT_WORDS;
  if (lane < 64u) {
    let q = integers[lane];
    if (PLANES == 2u) {
      let low = ((q + vec4(128)) & vec4(255)) - vec4(128);
      acts[at + lane] = four_bytes((q - low) >> vec4(8u));
      acts[at + 64u + lane] = four_bytes(low);
    } else {
      acts[at + lane] = four_bytes(q);
    }
  } else if (lane < 80u) {
    let g = lane - 64u;
    let q = integers[4u * g] + integers[4u * g + 1u] + integers[4u * g + 2u] + integers[4u * g + 3u];
    acts[at + 128u + g] = bitcast<u32>(q.x + q.y + q.z + q.w);
  } else if (lane == 80u) {
    acts[at + 144u] = block.d;
  }
  workgroupBarrier();
}
