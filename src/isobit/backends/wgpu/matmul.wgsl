// y = W x for quantised weights (docs/numerics.md, section 4). Needs scalar, a dot file, a file that
// defines `superblock` for the weights' format (q4_k, q6_k, formats) and items.
//
// Weights lie in tiles of 8 rows by one superblock (layout.py). A lane makes a row's superblock; 8
// lanes side by side read a line of 128 bytes.

override SUPERS: u32 = 8u;  // lanes of one row: a power of two, at most 16
override PLANES: u32 = 2u;
override TILE: u32;  // vec4s of a tile
const ACT = 37u;  // vec4s of a superblock of activations (quantise.wgsl)

struct Params {
  supers: u32,  // of a row
  rows: u32,  // of a matrix
  row_groups: u32,  // eights of rows of a matrix
  first: u32,  // row groups of the stack that `weights` holds: first … last - 1
  last: u32,
  start: u32,  // row group of the matrix at which the first workgroup begins
  y_stride: u32,  // words of an output row
  y_at: u32,  // where in it row 0 of these matrices is
  planned: u32,
  items: u32,
  entries: u32,
  divide: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> acts: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> plan: array<u32>;
@group(0) @binding(5) var<storage, read_write> y: array<u32>;

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
  return dot4(a.x, b.x) + dot4(a.y, b.y) + dot4(a.z, b.z) + dot4(a.w, b.w);
}

// T of section 4; no subnormal and no overflow can occur.
fn joined(high: i32, low: i32) -> real {
  if (PLANES == 1u) { return from_int(high); }
  return add_normal(mul_normal(from_int(high), TWO_TO_8), from_int(low));
}

var<workgroup> part: array<u32, 256>;

@compute @workgroup_size(256)
fn matmul(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let rows_here = 256u / SUPERS;
  let at = items_of(group.y);
  let begin = p.start + group.x * (rows_here / 8u);
  let row_group = begin + lane / (8u * SUPERS);
  let super_lane = (lane / 8u) % SUPERS;
  let stored = at.matrix * p.row_groups + row_group;
  let held = row_group < p.row_groups && stored >= p.first && stored < p.last;
  let tile = (stored - p.first) * p.supers * TILE + lane % 8u;
  let mine = (lane / (8u * SUPERS)) * 8u + lane % 8u;

  // The row whose superblocks this lane adds.
  let row = 8u * begin + lane;
  let row_stored = at.matrix * p.row_groups + row / 8u;
  let adds = lane < rows_here && row < p.rows && row_stored >= p.first && row_stored < p.last;

  for (var i = 0u; i < at.count; i++) {
    let item = item_at(at.first + i);
    let x = (item / p.divide) * p.supers * ACT;
    var sum = 0u;
    for (var s0 = 0u; s0 < bound(p.supers); s0 += SUPERS) {
      let s = s0 + super_lane;
      var t = 0u;
      if (held && s < p.supers) {
        let a = x + s * ACT;
        t = mul(acts[a + 36u].x, superblock(tile + s * TILE, lane % 8u, a));
      }
      workgroupBarrier();
      part[super_lane * rows_here + mine] = t;
      workgroupBarrier();
      // A superblock beyond the row's end gave +0, which changes no sum.
      for (var j = 0u; j < SUPERS; j++) { sum = add(sum, part[j * rows_here + lane % rows_here]); }
    }
    if (adds) { y[item * p.y_stride + p.y_at + row] = sum; }
  }
}
