// y = W x for quantised weights (docs/numerics.md, section 4). Needs scalar, a dot file, a file that
// defines `load` and `superblock` for the weights' format (q4_k, q6_k, iq4, formats) and sorted_pairs.
//
// Weights lie in tiles of 8 rows by one superblock (layout.py). A lane makes a row's superblock; 8
// lanes side by side read a line of 128 bytes. All of it is on its way before anything else is read,
// and serves every pair of the group.

override LANES: u32 = 256u;  // of a workgroup
override SUPERS: u32 = 8u;  // lanes of one row: a power of two, at most 8
override PLANES: u32 = 2u;
override TILE_VEC4: u32;  // vec4s of a tile
const ACT = 37u;  // vec4s of a superblock of activations (quantise.wgsl)

struct Params {
  supers: u32,  // of a row
  rows: u32,  // of a matrix
  row_blocks: u32,  // eights of rows of a matrix
  first: u32,  // row groups of the stack that `weights` holds: first … last - 1
  last: u32,
  start: u32,  // row group of the matrix at which the first workgroup begins
  y_stride: u32,  // words of an output row
  y_at: u32,  // where in it row 0 of these matrices is
  planned: u32,
  n_pairs: u32,
  groups_at: u32,
  top_k: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> acts: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> routing: array<u32>;
@group(0) @binding(5) var<storage, read_write> y: array<u32>;

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
  return dot4(a.x, b.x) + dot4(a.y, b.y) + dot4(a.z, b.z) + dot4(a.w, b.w);
}

// T of section 4; no subnormal and no overflow can occur.
fn joined(high: i32, low: i32) -> real {
  if (PLANES == 1u) { return from_int(high); }
  return add_normal(mul_normal(from_int(high), TWO_TO_8), from_int(low));
}

// d * T - dmin * M: multiples of 2^-24 below 2^54, so that no subnormal and no overflow can occur.
fn scaled(d: real, total: real, dmin: real, mins: real) -> real {
  if ((magnitude(d) >= INFINITY) || (magnitude(dmin) >= INFINITY)) { return NAN; }
  return sub_normal(mul_normal(d, total), mul_normal(dmin, mins));
}

var<workgroup> staged: array<vec4<u32>, 296>;  // 8 superblocks of activations
var<workgroup> part: array<u32, 256>;
var<workgroup> sums: array<u32, 256>;  // of the superblocks so far, where a row has more than 8

// A row's superblocks in ascending order; one beyond its end gave +0, which changes no sum.
fn added(first: real, row: u32, rows: u32) -> real {
  var sum = first;
  var usual = true;
  for (var j = 0u; j < SUPERS; j += 4u) {
    let at = min(vec4(j) + vec4(0u, 1u, 2u, 3u), vec4(SUPERS - 1u)) * rows + row;
    var t = vec4(part[at.x], part[at.y], part[at.z], part[at.w]);
    if (SUPERS < 4u) { t = select(vec4(0u), t, vec4(0u, 1u, 2u, 3u) < vec4(SUPERS)); }
    usual = usual && summands(t);
    sum = add_normal(add_normal(add_normal(add_normal(sum, t.x), t.y), t.z), t.w);
  }
  if (usual && summands(vec4(first))) { return sum; }
  sum = first;
  for (var j = 0u; j < SUPERS; j++) { sum = add(sum, part[j * rows + row]); }
  return sum;
}

@compute @workgroup_size(LANES)
fn matmul(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let rows_here = LANES / SUPERS;
  let at = group_of(group.y);
  let begin = p.start + group.x * (rows_here / 8u);
  let row_block = begin + lane / (8u * SUPERS);
  let super_lane = (lane / 8u) % SUPERS;
  let stored = at.matrix * p.row_blocks + row_block;
  let held = row_block < p.row_blocks && stored >= p.first && stored < p.last;
  let weight_tile = (stored - p.first) * p.supers * TILE_VEC4;
  let mine = (lane / (8u * SUPERS)) * 8u + lane % 8u;

  // The row whose superblocks this lane adds.
  let row = 8u * begin + lane;
  let row_stored = at.matrix * p.row_blocks + row / 8u;
  let adds = lane < rows_here && row < p.rows && row_stored >= p.first && row_stored < p.last;

  for (var s0 = 0u; s0 < bound(p.supers); s0 += SUPERS) {
    let live = held && s0 + super_lane < p.supers;
    // A lane without a superblock of its own loads one that others load too.
    let s = min(s0 + super_lane, p.supers - 1u);
    let weight = load(select(0u, weight_tile, held) + s * TILE_VEC4 + lane % 8u, lane % 8u);
    for (var i = 0u; i < at.count; i++) {
      let pair = pair_at(at.first + i);
      let x = ((pair / p.top_k) * p.supers + s0) * ACT;
      let n = min(SUPERS, p.supers - s0) * ACT;
      for (var k = lane; k < bound(n); k += LANES) { staged[k] = acts[x + k]; }
      workgroupBarrier();
      var t = 0u;
      if (live) {
        let a = super_lane * ACT;
        t = mul(staged[a + 36u].x, superblock(weight, a));
      }
      part[super_lane * rows_here + mine] = t;
      workgroupBarrier();
      if (adds) {
        var sum = 0u;
        if (s0 > 0u) { sum = sums[i * rows_here + lane]; }
        sum = added(sum, lane, rows_here);
        if (s0 + SUPERS < p.supers) {
          sums[i * rows_here + lane] = sum;
        } else {
          y[pair * p.y_stride + p.y_at + row] = sum;
        }
      }
    }
  }
}
