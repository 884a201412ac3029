// y = W x for F32, F16 and BF16 weights (docs/numerics.md, section 4). Needs scalar, reduce and sorted_pairs.

override FORMAT: u32;  // ggml's number: 0 F32, 1 F16, 30 BF16

struct Params {
  columns: u32,
  rows: u32,  // of a matrix
  first: u32,  // rows of the stack that `weights` holds: first … last - 1
  last: u32,
  start: u32,  // row of the matrix at which the first workgroup begins
  y_stride: u32,  // words of an output row
  y_at: u32,  // where in it row 0 of these matrices is
  x_at: u32,
  planned: u32,
  n_pairs: u32,
  groups_at: u32,
  top_k: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> weights: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<u32>;
@group(0) @binding(4) var<storage, read> routing: array<u32>;
@group(0) @binding(5) var<storage, read_write> y: array<u32>;

fn value(i: u32) -> real {
  if (FORMAT == 0u) { return weights[i]; }
  let half = (weights[i / 2u] >> (16u * (i % 2u))) & 0xffffu;
  if (FORMAT == 1u) { return from_half(half); }
  return half << 16u;
}

// Any values, one after another.
fn slowly(lane: u32, w: u32, from_x: u32) -> real {
  var sum = 0u;
  for (var k = lane; k < bound(p.columns); k += 256u) {
    sum = add(sum, mul(value(w + k), x[from_x + k]));
  }
  return sum;
}

// A row a workgroup at a time; lane j is lane j of sum256.
@compute @workgroup_size(256)
fn matmul_floats(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let at = group_of(group.y);
  for (var row = p.start + group.x; row < p.rows; row += groups.x) {
    let stored = at.matrix * p.rows + row;
    if (stored < p.first || stored >= p.last) { continue; }
    let w = (stored - p.first) * p.columns;
    for (var i = 0u; i < at.count; i++) {
      let pair = pair_at(at.first + i);
      let from_x = p.x_at + (pair / p.top_k) * p.columns;
      // Four values at a time, 256 apart, so that no load waits for another's value.
      var sum = 0u;
      var usual = true;
      for (var k0 = lane; k0 < bound(p.columns); k0 += 1024u) {
        let k = vec4(k0) + vec4(0u, 256u, 512u, 768u);
        let inside = k < vec4(p.columns);  // beyond the row's end +0, which changes no sum
        let j = min(k, vec4(p.columns - 1u));
        var a = vec4(value(w + j.x), value(w + j.y), value(w + j.z), value(w + j.w));
        var b = vec4(x[from_x + j.x], x[from_x + j.y], x[from_x + j.z], x[from_x + j.w]);
        a = select(vec4(0u), a, inside);
        b = select(vec4(0u), b, inside);
        usual = usual && factors(a) && factors(b);
        let products = mul_normal4(a, b);
        sum = add_normal(add_normal(sum, products.x), products.y);
        sum = add_normal(add_normal(sum, products.z), products.w);
      }
      if (!usual) { sum = slowly(lane, w, from_x); }
      let total = tree(lane, sum, 256u);
      if (lane == 0u) { y[pair * p.y_stride + p.y_at + row] = total; }
    }
  }
}
