// Scalar arithmetic with the bits of docs/numerics.md; put in front of every kernel.
//
// A real is a binary32 as its bits in a u32, and so are the floats in all buffers: WGSL may flush
// subnormals, contract a*b+c, reorder sums, assume that no NaN exists, and round division, square
// root and conversions as it likes. Nothing here depends on that. What is left to the device is
// addition and multiplication of normal numbers, each followed by an exclusive or with a zero
// that the compiler cannot know, so that no two operations can be merged.

alias real = u32;

@group(0) @binding(0) var<uniform> opaque: vec4<u32>;  // zero

// A loop's bound, from the parameters: Mesa's software device compiles a kernel anew for every value
// that it finds there, at every dispatch.
fn bound(n: u32) -> u32 { return n + opaque.x; }

const SIGN = 0x80000000u;
const INFINITY = 0x7f800000u;
const NAN = 0x7fc00000u;
const ONE = 0x3f800000u;
const TWO_TO_8 = 0x43800000u;

fn magnitude(a: real) -> u32 { return a & 0x7fffffffu; }
fn negate(a: real) -> real { return a ^ SIGN; }

// a + b and a * b where no operand or result is subnormal, or flushing it to zero does no harm.
fn add_normal(a: real, b: real) -> real {
  return bitcast<u32>(bitcast<f32>(a) + bitcast<f32>(b)) ^ opaque.x;
}
fn mul_normal(a: real, b: real) -> real {
  return bitcast<u32>(bitcast<f32>(a) * bitcast<f32>(b)) ^ opaque.x;
}
fn sub_normal(a: real, b: real) -> real { return add_normal(a, negate(b)); }
fn add_normal4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
  return bitcast<vec4<u32>>(bitcast<vec4<f32>>(a) + bitcast<vec4<f32>>(b)) ^ opaque.xxxx;
}
fn mul_normal4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
  return bitcast<vec4<u32>>(bitcast<vec4<f32>>(a) * bitcast<vec4<f32>>(b)) ^ opaque.xxxx;
}

// Where long sums are safe without looking at each step, which costs instructions: a kernel tries
// that, and goes through add and mul if a value is none of these.
//
// Zeros and magnitudes in [2^-75, 2^100): multiples of 2^-98, and so is whatever they sum up to.
fn summands(v: vec4<u32>) -> bool {
  let m = v & vec4(0x7fffffffu);
  return all((m == vec4(0u)) | (m - vec4(52u << 23u) < vec4(175u << 23u)));
}
// Zeros and magnitudes in [2^-37, 2^40): products of two are summands, those of three are normal.
fn factors(v: vec4<u32>) -> bool {
  let m = v & vec4(0x7fffffffu);
  return all((m == vec4(0u)) | (m - vec4(90u << 23u) < vec4(77u << 23u)));
}

// (-1)^sign * sig * 2^(e - 31), rounded; bit 0 of sig also stands for all lower bits that are lost.
// sig has bit 31 set.
fn pack(sign: u32, e: i32, sig: u32) -> real {
  if (e > 127) { return sign | INFINITY; }
  var s = sig;
  var field = e + 126;
  if (e < -126) {
    let shift = u32(min(-126 - e, 31));
    s = (sig >> shift) | select(0u, 1u, (sig & ((1u << shift) - 1u)) != 0u);
    field = 0;
  }
  let lost = s & 0xffu;
  let odd = (s >> 8u) & 1u;
  // A carry out of the significand runs into the exponent, which is then right.
  return sign | ((u32(field) << 23u) + (s >> 8u) + select(0u, 1u, lost + odd > 128u));
}

// A finite number's significand with bit 23 set, and its exponent; not for zero.
struct Parts { sig: u32, e: i32 }
fn parts(a: real) -> Parts {
  let field = (a >> 23u) & 0xffu;
  let fraction = a & 0x7fffffu;
  if (field != 0u) { return Parts(fraction | 0x800000u, i32(field) - 127); }
  let shift = countLeadingZeros(fraction) - 8u;
  return Parts(fraction << shift, -126 - i32(shift));
}

// a * 2^64 for |a| < 2^-100, and the way back: no subnormal takes part in a float operation.
fn scale_up(a: real) -> real {
  if (magnitude(a) >= 0x800000u) { return a + (64u << 23u); }
  return (a & SIGN) | bitcast<u32>(f32(magnitude(a)) * 0x1p-85f);
}
fn scale_down(a: real) -> real {
  if (magnitude(a) >= (65u << 23u)) { return a - (64u << 23u); }
  return (a & SIGN) | u32(bitcast<f32>(magnitude(a)) * 0x1p+85f);
}

fn add(a: real, b: real) -> real {
  let larger = max(magnitude(a), magnitude(b));
  if (larger < 0x0d800000u) {  // both below 2^-100: only then can the sum be subnormal
    return scale_down(add_normal(scale_up(a), scale_up(b)));
  }
  if (larger >= 0x7f000000u) { return add_large(a, b, larger); }
  return add_normal(a, b);
}

// A magnitude of 2^127 or more takes part: add at an eighth, so that the sum cannot overflow.
fn add_large(a: real, b: real, larger: u32) -> real {
  if (larger > INFINITY || (larger == INFINITY && magnitude(a) == magnitude(b) && a != b)) { return NAN; }
  if (larger == INFINITY) { return select(b, a, magnitude(a) == INFINITY); }
  let x = select(a - (3u << 23u), a & SIGN, magnitude(a) < (4u << 23u));
  let y = select(b - (3u << 23u), b & SIGN, magnitude(b) < (4u << 23u));
  let sum = add_normal(x, y);
  if (magnitude(sum) >= (252u << 23u)) { return (sum & SIGN) | INFINITY; }
  if (magnitude(sum) == 0u) { return sum; }
  return sum + (3u << 23u);
}

fn sub(a: real, b: real) -> real { return add(a, negate(b)); }

fn mul(a: real, b: real) -> real {
  let ea = (a >> 23u) & 0xffu;
  let eb = (b >> 23u) & 0xffu;
  if (ea - 1u < 254u && eb - 1u < 254u && ea + eb - 129u < 250u) { return mul_normal(a, b); }
  let sign = (a ^ b) & SIGN;
  let larger = max(magnitude(a), magnitude(b));
  let smaller = min(magnitude(a), magnitude(b));
  if (larger > INFINITY || (larger == INFINITY && smaller == 0u)) { return NAN; }
  if (larger == INFINITY) { return sign | INFINITY; }
  if (smaller == 0u) { return sign; }
  let x = parts(a);
  let y = parts(b);
  // The product has 47 or 48 bits: its bits from 24 up out of 12-bit halves, the rest modulo 2^32.
  let x1 = x.sig >> 12u;
  let x0 = x.sig & 0xfffu;
  let y1 = y.sig >> 12u;
  let y0 = y.sig & 0xfffu;
  let middle = x1 * y0 + x0 * y1 + ((x0 * y0) >> 12u);
  let high = x1 * y1 + (middle >> 12u);
  let low = x.sig * y.sig;
  let top = (high << 8u) | ((low >> 16u) & 0xffu);
  let shift = countLeadingZeros(top);  // 0 or 1
  let rest = select(0u, 1u, (low & 0xffffu) != 0u);
  return pack(sign, x.e + y.e + 1 - i32(shift), (top << shift) | rest);
}

// (a * b) * c and a * b + c * d: the careful operations are long, and one way around them is enough.
fn mul3(a: real, b: real, c: real) -> real {
  if (factors(vec4(a, b, c, 0u))) { return mul_normal(mul_normal(a, b), c); }
  return mul(mul(a, b), c);
}
fn dot2(a: real, b: real, c: real, d: real) -> real {
  if (factors(vec4(a, b, c, d))) { return add_normal(mul_normal(a, b), mul_normal(c, d)); }
  return add(mul(a, b), mul(c, d));
}

// a / b: the device's quotient of the significands, 26 bits of which the last 6 may be wrong, made
// exact by its remainder, which 32 bits hold.
fn div(a: real, b: real) -> real {
  let sign = (a ^ b) & SIGN;
  if (max(magnitude(a), magnitude(b)) > INFINITY) { return NAN; }
  if (magnitude(a) == magnitude(b) && (magnitude(a) == 0u || magnitude(a) == INFINITY)) { return NAN; }
  if (magnitude(a) == INFINITY || magnitude(b) == 0u) { return sign | INFINITY; }
  if (magnitude(a) == 0u || magnitude(b) == INFINITY) { return sign; }
  let x = parts(a);
  let y = parts(b);
  let small = select(0u, 1u, x.sig < y.sig);
  let scaled = x.sig << small;
  // scaled * 2^25 / y.sig, in [2^25, 2^26), less 64.
  let below = u32(f32(scaled) / f32(y.sig) * 0x1p+25f) - 64u;
  let left = (scaled << 25u) - below * y.sig;
  let more = left / y.sig;
  let inexact = select(0u, 1u, left != more * y.sig);
  return pack(sign, x.e - y.e - i32(small), ((below + more) << 6u) | inexact);
}

// Square root: the device's, 24 bits of which the last 5 may be wrong, made exact bit by bit.
fn root(a: real) -> real {
  if (magnitude(a) == 0u || a == INFINITY) { return a; }
  if (a > INFINITY) { return NAN; }
  let x = parts(a);
  let half = x.e >> 1u;
  // The radicand, in [2^46, 2^48), is sig shifted by 23 or 24.
  let scaled = x.sig << u32(x.e & 1);
  var result = u32(sqrt(f32(scaled)) * 0x1.6a09e6p+11f);
  result = max(result, (1u << 23u) + 32u) - 32u;
  var rest = (scaled << 23u) - result * result;
  for (var bit = 32u; bit != 0u; bit = bit >> 1u) {
    let taken = (2u * result + bit) * bit;
    if (rest >= taken) {
      rest -= taken;
      result += bit;
    }
  }
  for (var i = 0; i < 2; i++) {
    rest = rest << 2u;
    let taken = (result << 2u) | 1u;
    result = result << 1u;
    if (rest >= taken) {
      rest -= taken;
      result |= 1u;
    }
  }
  return pack(0u, half, (result << 6u) | select(0u, 1u, rest != 0u));
}

// Exact halves of at most 20 bits, rounded once by their sum.
fn from_int(n: i32) -> real {
  return add_normal(bitcast<u32>(f32(n & -4096)), bitcast<u32>(f32(n & 4095)));
}

// The integer nearest to a, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves it in the bits.
fn nearest_int(a: real) -> i32 {
  return bitcast<i32>(add_normal(a, 0x4b400000u)) - 0x4b400000;
}

fn from_half(h: u32) -> real {
  let sign = (h & 0x8000u) << 16u;
  let field = (h >> 10u) & 31u;
  let fraction = h & 0x3ffu;
  if (field == 31u) { return sign | INFINITY | (fraction << 13u); }
  if (field == 0u) { return sign | bitcast<u32>(f32(fraction) * 0x1p-24f); }
  return sign | ((field + 112u) << 23u) | (fraction << 13u);
}

// Unsigned integers that compare as finite reals do (-0 below +0).
fn order(a: real) -> u32 { return select(a | SIGN, ~a, (a & SIGN) != 0u); }
fn from_order(o: u32) -> real { return select(~o, o ^ SIGN, (o & SIGN) != 0u); }
fn maximum(a: real, b: real) -> real { return select(b, a, order(a) >= order(b)); }

// Section 5. No subnormal can change the result: r and the products are added to constants.
fn exp_real(a: real) -> real {
  if (magnitude(a) > INFINITY) { return a; }
  if (a > 0xc2ae0000u) { return 0u; }                       // below -87
  let x = select(a, 0x42b00000u, a < SIGN && a > 0x42b00000u);  // at most 88
  let i = nearest_int(mul_normal(x, 0x3fb8aa3bu));
  let n = bitcast<u32>(f32(i));
  let r = add_normal(add_normal(x, negate(mul_normal(n, 0x3f318000u))), negate(mul_normal(n, 0xb95e8083u)));
  var p = add_normal(mul_normal(0x3ab511e7u, r), 0x3c091d10u);
  p = add_normal(mul_normal(p, r), 0x3d2aac79u);
  p = add_normal(mul_normal(p, r), 0x3e2aaa49u);
  p = add_normal(mul_normal(p, r), 0x3efffffeu);
  p = add_normal(mul_normal(p, r), ONE);
  p = add_normal(mul_normal(p, r), ONE);
  return mul_normal(p, u32(i + 127) << 23u);
}

// 1 / (1 + exp(-a)).
fn logistic(a: real) -> real { return div(ONE, add_normal(ONE, exp_real(negate(a)))); }

// Section 3: scale and reciprocal of a block whose largest magnitude is amax. A value that is
// flushed gives 0, as it would anyway.
struct Block { d: real, r: real }
fn block_of(amax: u32, planes: u32) -> Block {
  if (amax >= INFINITY) { return Block(NAN, 0u); }
  if (amax < 0x0f800000u) { return Block(0u, 0u); }  // 2^-96
  let two = planes == 2u;
  let d = mul_normal(amax, select(0x3c010204u, 0x38008183u, two));
  return Block(d, div(select(0x42fe0000u, 0x46fefe00u, two), amax));
}
fn quantise(a: real, r: real) -> i32 {
  if (r == 0u) { return 0; }
  return nearest_int(mul_normal(a, r));
}

// q = 256 * high + low, both signed bytes.
fn low_byte(q: i32) -> i32 { return ((q + 128) & 255) - 128; }
fn high_byte(q: i32) -> i32 { return (q - low_byte(q)) >> 8u; }
