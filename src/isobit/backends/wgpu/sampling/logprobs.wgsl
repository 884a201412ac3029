// What rows of logits say of their next tokens (docs/numerics.md, section 11): a row a workgroup.
// A row of `found` begins with the most likely id, the log-probabilities of p.given ids, then the p.top most likely
// ids and theirs; of a row that is not finite -1 and NaN. Needs scalar and reduce.

struct Params {
  vocabulary: u32,
  given: u32,
  top: u32,
  width: u32,  // words of a row of `found`
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> logits: array<u32>;
@group(0) @binding(3) var<storage, read> ids: array<u32>;
@group(0) @binding(4) var<storage, read_write> found: array<u32>;

const LARGEST_NEGATIVE = 0xff7fffffu;
const NOT_FINITE = 0xffffffffu;

var<workgroup> sums: array<vec2<u32>, 256>;  // low and high words

fn plus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  let low = a.x + b.x;
  return vec2(low, a.y + b.y + select(0u, 1u, low < a.x));
}

// floor(e * 2^40) of 0 <= e <= 1.
fn weight(e: real) -> vec2<u32> {
  if (e == 0u) { return vec2(0u); }
  let x = parts(e);
  let shift = x.e + 17;
  if (shift < 0) { return vec2(select(0u, x.sig >> u32(min(-shift, 31)), shift > -24), 0u); }
  return vec2(x.sig << u32(shift), (x.sig >> 1u) >> u32(31 - shift));
}

// The logarithm of a positive normal number.
fn log_real(a: real) -> real {
  let n = (bitcast<i32>(a) - 0x3f3504f3) >> 23u;
  let f = sub_normal(bitcast<u32>(bitcast<i32>(a) - (n << 23u)), ONE);
  var c = array<u32, 7>(
    0x3e02adb6u, 0xbe06c2a1u, 0x3e116d0eu, 0xbe2a3922u, 0x3e4cd004u, 0xbe800113u, 0x3eaaaaaau);
  var s = 0xbd9c5ac4u;
  for (var i = 0u; i < 7u; i++) { s = add_normal(mul_normal(s, f), c[i]); }
  let q = mul_normal(f, f);
  let turns = from_int(n);
  var y = add_normal(mul_normal(mul_normal(q, f), s), mul_normal(turns, 0xb95e8083u));
  y = add_normal(sub_normal(y, mul_normal(q, 0x3f000000u)), f);
  return add_normal(y, mul_normal(turns, 0x3f318000u));
}

// The logarithm of w * 2^-40, of a sum w of weights, which is at least 2^40.
fn log_total(w: vec2<u32>) -> real {
  let zeros = countLeadingZeros(w.y);  // 0 to 23
  let low = w.x << zeros;
  let top = (w.y << zeros) | ((w.x >> 1u) >> (31u - zeros)) | select(0u, 1u, low != 0u);
  return log_real(pack(0u, 23 - i32(zeros), top));
}

fn below(z: real, m: real) -> real {  // the largest by how much, and finite
  let x = sub(z, m);
  return select(x, LARGEST_NEGATIVE, x == (SIGN | INFINITY));
}

// Equal logits compare as equals here: there is one zero.
fn key_of(z: real) -> u32 { return order(select(z, 0u, magnitude(z) == 0u)); }

@compute @workgroup_size(256)
fn measure(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let base = group.x * p.vocabulary;
  let out = group.x * p.width;
  var highest = 0u;
  var broken = 0u;
  for (var i = lane; i < bound(p.vocabulary); i += 256u) {
    let z = logits[base + i];
    highest = max(highest, order(z));
    broken |= select(0u, 1u, magnitude(z) >= INFINITY);
  }
  let m = from_order(largest(lane, highest, 256u));
  let finite = largest(lane, broken, 256u) == 0u;
  var all = 0u;  // the logarithm of what the weights sum to
  if (p.given + p.top > 0u) {
    var sum = vec2(0u);
    if (finite) {
      for (var i = lane; i < bound(p.vocabulary); i += 256u) {
        sum = plus(sum, weight(exp_real(below(logits[base + i], m))));
      }
    }
    sums[lane] = sum;
    for (var step = 128u; step > 0u; step = step / 2u) {
      workgroupBarrier();
      if (lane < step) { sums[lane] = plus(sums[lane], sums[lane + step]); }
    }
    workgroupBarrier();
    all = log_total(max(sums[0], vec2(0u, select(256u, 0u, finite))));
  }
  for (var i = lane; i < bound(p.given); i += 256u) {
    let z = logits[base + ids[group.x * p.given + i]];
    found[out + 1u + i] = select(NAN, sub(below(z, m), all), finite);
  }
  // The largest after the last one that was found, again and again.
  var last_key = 0xffffffffu;
  var last_id = 0xffffffffu;
  for (var rank = 0u; rank < bound(max(p.top, 1u)); rank++) {
    var key = 0u;
    for (var i = lane; i < bound(p.vocabulary); i += 256u) {
      let other = key_of(logits[base + i]);
      let after = other < last_key || (other == last_key && i > last_id);
      key = select(key, max(key, other), after || rank == 0u);
    }
    key = largest(lane, key, 256u);
    var id = 0u;  // the complement: the lowest is the largest
    for (var i = lane; i < bound(p.vocabulary); i += 256u) {
      let same = key_of(logits[base + i]) == key;
      let after = key != last_key || i > last_id || rank == 0u;
      id = select(id, max(id, ~i), same && after);
    }
    id = ~largest(lane, id, 256u);
    last_key = key;
    last_id = id;
    if (lane == 0u) {
      if (rank == 0u) { found[out] = select(NOT_FINITE, id, finite); }
      if (rank < p.top) {
        let at = out + 1u + p.given + 2u * rank;
        found[at] = select(NOT_FINITE, id, finite);
        found[at + 1u] = select(NAN, sub(below(logits[base + min(id, p.vocabulary - 1u)], m), all), finite);
      }
    }
  }
}
