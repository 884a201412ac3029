// The gated delta rule (docs/numerics.md, section 12). Needs scalar.
//
// LANES invocations share a column of a head's state S [SIZE, columns]: invocation l has its rows l,
// l + LANES, …, so that the first levels of a tree are its own, and keeps them for all tokens of a
// run. The sums that are left meet in workgroup memory, those with k and those with q in turns: one
// barrier each is enough.

override SIZE: u32;  // a power of two, at most 512
override LANES: u32;  // of a column: a power of two, at most 16

struct Params {
  heads: u32,
  key_heads: u32,
  columns: u32,
  runs_at: u32,  // in `batch`: first token, last token + 1 and state of each sequence
  q_at: u32,
  q_stride: u32,
  k_at: u32,
  k_stride: u32,
  v_at: u32,
  v_stride: u32,
  beta_at: u32,
  beta_stride: u32,
  decay_at: u32,
  decay_stride: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> q: array<u32>;
@group(0) @binding(3) var<storage, read> k: array<u32>;
@group(0) @binding(4) var<storage, read> v: array<u32>;
@group(0) @binding(5) var<storage, read> beta: array<u32>;
@group(0) @binding(6) var<storage, read> decay: array<u32>;
@group(0) @binding(7) var<storage, read> batch: array<u32>;
@group(0) @binding(8) var<storage, read_write> states: array<u32>;  // [sequences, heads, SIZE, columns]
@group(0) @binding(9) var<storage, read_write> y: array<u32>;  // [rows, heads, columns]

var<workgroup> with_k: array<u32, 256>;
var<workgroup> with_q: array<u32, 256>;

var<private> s: array<u32, 32>;  // an invocation's rows of its column
var<private> products: array<u32, 32>;

// The tree of an invocation's products.
fn own_tree() -> real {
  for (var half = SIZE / LANES / 2u; half > 0u; half = half / 2u) {
    for (var i = 0u; i < half; i++) { products[i] = add(products[i], products[i + half]); }
  }
  return products[0];
}

// The tree of a column's sums.
fn column_tree(sums: ptr<function, array<u32, 16>>) -> real {
  for (var half = LANES / 2u; half > 0u; half = half / 2u) {
    for (var i = 0u; i < half; i++) { (*sums)[i] = add((*sums)[i], (*sums)[i + half]); }
  }
  return (*sums)[0];
}

@compute @workgroup_size(256)
fn gated_delta(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let columns_here = 256u / LANES;
  let column = group.x * columns_here + lane % columns_here;
  let mine = lane / columns_here;
  let live = column < p.columns;
  let head = group.y;
  let run = p.runs_at + 3u * group.z;
  let first = batch[run];
  let end = batch[run + 1u];
  let rows = SIZE / LANES;
  let state = ((batch[run + 2u] * p.heads + head) * SIZE + mine) * p.columns + column;
  for (var i = 0u; i < rows; i++) {
    s[i] = 0u;
    if (live && batch[first] != 0u) { s[i] = states[state + i * LANES * p.columns]; }
  }
  var sums: array<u32, 16>;
  for (var t = first; t < end; t++) {
    let keep = exp_real(decay[p.decay_at + t * p.decay_stride + head]);
    let key = p.k_at + t * p.k_stride + (head % p.key_heads) * SIZE + mine;
    let query = p.q_at + t * p.q_stride + (head % p.key_heads) * SIZE + mine;
    for (var i = 0u; i < rows; i++) {
      s[i] = mul(s[i], keep);
      products[i] = mul(s[i], k[key + i * LANES]);
    }
    with_k[lane] = own_tree();
    workgroupBarrier();
    for (var i = 0u; i < LANES; i++) { sums[i] = with_k[i * columns_here + lane % columns_here]; }
    var value = 0u;
    if (live) { value = v[p.v_at + t * p.v_stride + head * p.columns + column]; }
    let d = mul(sub(value, column_tree(&sums)), beta[p.beta_at + t * p.beta_stride + head]);
    for (var i = 0u; i < rows; i++) {
      s[i] = add(s[i], mul(k[key + i * LANES], d));
      products[i] = mul(s[i], q[query + i * LANES]);
    }
    with_q[lane] = own_tree();
    workgroupBarrier();
    if (live && mine == 0u) {
      for (var i = 0u; i < LANES; i++) { sums[i] = with_q[i * columns_here + lane % columns_here]; }
      y[(t * p.heads + head) * p.columns + column] = column_tree(&sums);
    }
  }
  for (var i = 0u; i < rows; i++) {
    if (live) { states[state + i * LANES * p.columns] = s[i]; }
  }
}
