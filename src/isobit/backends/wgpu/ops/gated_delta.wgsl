// The gated delta rule (docs/numerics.md, section 12). Needs scalar.
//
// LANES invocations share a column of a head's state S [SIZE, columns]: invocation l has its rows l,
// l + LANES, …, so that the first levels of a tree are its own, and keeps them, four in a vector,
// for all tokens of a run. The sums that are left meet in workgroup memory, those with k and those
// with q in turns: one barrier each is enough. What is missing in fours is -0, which changes no sum.

override SIZE: u32;  // a power of two, at most 512
override LANES: u32;  // of a column: a power of two, at most 16
override CORRECTS: u32;  // 1: what the state has of a key is taken off its value

struct Params {
  heads: u32,
  key_heads: u32,
  together: u32,  // value heads, one behind the other, of a key head
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

const MINUS_ZEROS = vec4(SIGN);
var<private> s: array<vec4<u32>, 8>;  // an invocation's rows of its column
var<private> products: array<vec4<u32>, 8>;

// Four of mul and add: the careful way around is long, and one loop through it is enough.
fn mul4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
  let x = a & vec4(0x7fffffffu);
  let y = b & vec4(0x7fffffffu);
  let normal = (x - 0x800000u < vec4(0x7f000000u)) & (y - 0x800000u < vec4(0x7f000000u));
  let between = (x >> vec4(23u)) + (y >> vec4(23u)) - 129u < vec4(250u);
  let zero = (min(x, y) == vec4(0u)) & (max(x, y) < vec4(INFINITY));
  if (all((normal & between) | zero)) { return mul_normal4(a, b); }
  var r = a;
  for (var i = 0u; i < 4u; i++) { r[i] = mul(a[i], b[i]); }
  return r;
}
fn add4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
  let larger = max(a & vec4(0x7fffffffu), b & vec4(0x7fffffffu));
  if (all((larger - 0x0d800000u < vec4(0x71800000u)) | (larger == vec4(0u)))) {
    return add_normal4(a, b);
  }
  var r = a;
  for (var i = 0u; i < 4u; i++) { r[i] = add(a[i], b[i]); }
  return r;
}
fn tree4(v: vec4<u32>) -> real {
  let two = add4(v, v.zwxy);
  return add4(two, two.yxwz).x;
}

// The tree of an invocation's products.
fn own_tree(fours: u32) -> real {
  for (var half = fours / 2u; half > 0u; half = half / 2u) {
    for (var i = 0u; i < half; i++) { products[i] = add4(products[i], products[i + half]); }
  }
  return tree4(products[0]);
}

// Rows 4i … 4i + 3 of a column among an invocation's rows: which there are, and where in a vector.
fn there(i: u32) -> vec4<bool> { return vec4(4u * i) + vec4(0u, 1u, 2u, 3u) < vec4(SIZE / LANES); }
fn at(i: u32, base: u32, step: u32) -> vec4<u32> {
  return vec4(base) + min(vec4(4u * i) + vec4(0u, 1u, 2u, 3u), vec4(SIZE / LANES - 1u)) * step;
}

// The sum that lane `by` of a column left, or -0.
fn left(in_k: bool, by: u32, column: u32) -> real {
  if (by >= LANES) { return SIGN; }
  let i = by * (256u / LANES) + column;
  return select(with_q[i], with_k[i], in_k);
}

// The tree of a column's sums.
fn column_tree(in_k: bool, column: u32) -> real {
  var sums: array<vec4<u32>, 4>;
  for (var i = 0u; i < 4u; i++) {
    sums[i] = vec4(
      left(in_k, 4u * i, column), left(in_k, 4u * i + 1u, column),
      left(in_k, 4u * i + 2u, column), left(in_k, 4u * i + 3u, column));
  }
  return tree4(add4(add4(sums[0], sums[2]), add4(sums[1], sums[3])));
}

@compute @workgroup_size(256)
fn gated_delta(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let columns_here = 256u / LANES;
  let local = lane % columns_here;
  let column = group.x * columns_here + local;
  let mine = lane / columns_here;
  let live = column < p.columns;
  let head = group.y;
  let run = p.runs_at + 3u * group.z;
  let first = batch[run];
  let end = batch[run + 1u];
  let fours = max(1u, SIZE / LANES / 4u);
  let key_head = head / p.together % p.key_heads;
  let state = ((batch[run + 2u] * p.heads + head) * SIZE + mine) * p.columns + min(column, p.columns - 1u);
  let begins = batch[first] == 0u;  // its position
  for (var i = 0u; i < fours; i++) {
    let from_state = at(i, state, LANES * p.columns);
    s[i] = vec4(
      states[from_state.x], states[from_state.y], states[from_state.z], states[from_state.w]);
    if (begins) { s[i] = vec4(0u); }
  }
  for (var t = first; t < end; t++) {
    let keep = vec4(exp_real(decay[p.decay_at + t * p.decay_stride + head]));
    let key = p.k_at + t * p.k_stride + key_head * SIZE + mine;
    let query = p.q_at + t * p.q_stride + key_head * SIZE + mine;
    for (var i = 0u; i < fours; i++) {
      let from_k = at(i, key, LANES);
      let keys = vec4(k[from_k.x], k[from_k.y], k[from_k.z], k[from_k.w]);
      s[i] = mul4(s[i], keep);
      if (CORRECTS == 1u) { products[i] = select(MINUS_ZEROS, mul4(s[i], keys), there(i)); }
    }
    var value = v[p.v_at + t * p.v_stride + head * p.columns + min(column, p.columns - 1u)];
    if (CORRECTS == 1u) {
      with_k[lane] = own_tree(fours);
      workgroupBarrier();
      value = sub(value, column_tree(true, local));
    }
    let d = vec4(mul(value, beta[p.beta_at + t * p.beta_stride + head]));
    for (var i = 0u; i < fours; i++) {
      let from_k = at(i, key, LANES);
      let from_q = at(i, query, LANES);
      let keys = vec4(k[from_k.x], k[from_k.y], k[from_k.z], k[from_k.w]);
      let queries = vec4(q[from_q.x], q[from_q.y], q[from_q.z], q[from_q.w]);
      s[i] = add4(s[i], mul4(keys, d));
      products[i] = select(MINUS_ZEROS, mul4(s[i], queries), there(i));
    }
    with_q[lane] = own_tree(fours);
    workgroupBarrier();
    let made = column_tree(false, local);
    if (live && mine == 0u) { y[(t * p.heads + head) * p.columns + column] = made; }
    if (CORRECTS == 0u) { workgroupBarrier(); }  // else that of the sums with k lies between
  }
  for (var i = 0u; i < SIZE / LANES; i++) {
    if (live) { states[state + i * LANES * p.columns] = s[i / 4u][i % 4u]; }
  }
}
