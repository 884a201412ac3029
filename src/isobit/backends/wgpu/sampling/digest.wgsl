// A level of the tree of digests of rows (isobit.numerics.digest): SHA-256 (FIPS 180-4) of each piece of
// up to 64 words of a row, a piece an invocation. Memory is little-endian, the words of SHA-256 are not. Needs
// scalar.

struct Params {
  words: u32,  // of a row
  stride: u32,  // words from row to row
  found_at: u32,
  found_stride: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> rows: array<u32>;
@group(0) @binding(3) var<storage, read_write> found: array<u32>;  // 8 words a piece

struct State {
  abcd: vec4<u32>,
  efgh: vec4<u32>,
}

fn right(x: u32, n: u32) -> u32 { return (x >> n) | (x << (32u - n)); }

fn swapped(x: u32) -> u32 {  // its bytes
  return (x << 24u) | ((x & 0xff00u) << 8u) | ((x >> 8u) & 0xff00u) | (x >> 24u);
}

fn round(s: State, w: u32) -> State {
  let a = s.abcd.x;
  let e = s.efgh.x;
  let t = s.efgh.w + (right(e, 6u) ^ right(e, 11u) ^ right(e, 25u)) +
    (s.efgh.z ^ (e & (s.efgh.y ^ s.efgh.z))) + w;
  let u = (right(a, 2u) ^ right(a, 13u) ^ right(a, 22u)) +
    ((a & s.abcd.y) | (s.abcd.z & (a | s.abcd.y)));
  return State(vec4(t + u, s.abcd.xyz), vec4(s.abcd.w + t, s.efgh.xyz));
}

fn four(s: State, w: vec4<u32>, k: vec4<u32>) -> State {
  let x = w + k;
  return round(round(round(round(s, x.x), x.y), x.z), x.w);
}

fn late(x: u32) -> u32 { return right(x, 17u) ^ right(x, 19u) ^ (x >> 10u); }

fn early(x: u32) -> u32 { return right(x, 7u) ^ right(x, 18u) ^ (x >> 3u); }

// The four words of the schedule after sixteen.
fn next(a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) -> vec4<u32> {
  let before = vec4(early(a.y), early(a.z), early(a.w), early(b.x));
  let w = a + before + vec4(c.yzw, d.x);
  let x = w.x + late(d.z);
  let y = w.y + late(d.w);
  return vec4(x, y, w.z + late(x), w.w + late(y));
}

fn block(start: State, a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) -> State {
  var s = start;
  var w0 = a;
  var w1 = b;
  var w2 = c;
  var w3 = d;
  s = four(s, w0, vec4(0x428a2f98u, 0x71374491u, 0xb5c0fbcfu, 0xe9b5dba5u));
  s = four(s, w1, vec4(0x3956c25bu, 0x59f111f1u, 0x923f82a4u, 0xab1c5ed5u));
  s = four(s, w2, vec4(0xd807aa98u, 0x12835b01u, 0x243185beu, 0x550c7dc3u));
  s = four(s, w3, vec4(0x72be5d74u, 0x80deb1feu, 0x9bdc06a7u, 0xc19bf174u));
  w0 = next(w0, w1, w2, w3);
  s = four(s, w0, vec4(0xe49b69c1u, 0xefbe4786u, 0x0fc19dc6u, 0x240ca1ccu));
  w1 = next(w1, w2, w3, w0);
  s = four(s, w1, vec4(0x2de92c6fu, 0x4a7484aau, 0x5cb0a9dcu, 0x76f988dau));
  w2 = next(w2, w3, w0, w1);
  s = four(s, w2, vec4(0x983e5152u, 0xa831c66du, 0xb00327c8u, 0xbf597fc7u));
  w3 = next(w3, w0, w1, w2);
  s = four(s, w3, vec4(0xc6e00bf3u, 0xd5a79147u, 0x06ca6351u, 0x14292967u));
  w0 = next(w0, w1, w2, w3);
  s = four(s, w0, vec4(0x27b70a85u, 0x2e1b2138u, 0x4d2c6dfcu, 0x53380d13u));
  w1 = next(w1, w2, w3, w0);
  s = four(s, w1, vec4(0x650a7354u, 0x766a0abbu, 0x81c2c92eu, 0x92722c85u));
  w2 = next(w2, w3, w0, w1);
  s = four(s, w2, vec4(0xa2bfe8a1u, 0xa81a664bu, 0xc24b8b70u, 0xc76c51a3u));
  w3 = next(w3, w0, w1, w2);
  s = four(s, w3, vec4(0xd192e819u, 0xd6990624u, 0xf40e3585u, 0x106aa070u));
  w0 = next(w0, w1, w2, w3);
  s = four(s, w0, vec4(0x19a4c116u, 0x1e376c08u, 0x2748774cu, 0x34b0bcb5u));
  w1 = next(w1, w2, w3, w0);
  s = four(s, w1, vec4(0x391c0cb3u, 0x4ed8aa4au, 0x5b9cca4fu, 0x682e6ff3u));
  w2 = next(w2, w3, w0, w1);
  s = four(s, w2, vec4(0x748f82eeu, 0x78a5636fu, 0x84c87814u, 0x8cc70208u));
  w3 = next(w3, w0, w1, w2);
  s = four(s, w3, vec4(0x90befffau, 0xa4506cebu, 0xbef9a3f7u, 0xc67178f2u));
  return State(start.abcd + s.abcd, start.efgh + s.efgh);
}

// Word i of a piece of n words, padded: a bit, zeros, its number of bits.
fn word(first: u32, n: u32, last: u32, i: u32) -> u32 {
  if (i < n) { return swapped(rows[first + i]); }
  return select(select(0u, 32u * n, i == last), 0x80000000u, i == n);
}

fn words(first: u32, n: u32, last: u32, i: u32) -> vec4<u32> {
  return vec4(
    word(first, n, last, i), word(first, n, last, i + 1u),
    word(first, n, last, i + 2u), word(first, n, last, i + 3u));
}

@compute @workgroup_size(64)
fn digest(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let piece = 64u * group.x + lane;
  if (64u * piece >= p.words) { return; }
  let n = min(64u, p.words - 64u * piece);
  let first = group.y * p.stride + 64u * piece;
  let blocks = (n + 18u) / 16u;
  let last = 16u * blocks - 1u;
  var s = State(
    vec4(0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au),
    vec4(0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u));
  for (var i = 0u; i < bound(last); i += 16u) {
    s = block(
      s, words(first, n, last, i), words(first, n, last, i + 4u),
      words(first, n, last, i + 8u), words(first, n, last, i + 12u));
  }
  let out = p.found_at + group.y * p.found_stride + 8u * piece;
  for (var i = 0u; i < 4u; i++) {
    found[out + i] = swapped(s.abcd[i]);
    found[out + 4u + i] = swapped(s.efgh[i]);
  }
}
