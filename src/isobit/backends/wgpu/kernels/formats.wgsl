// Formats without a file of their own: what blocks.wgsl asks for. Needs bytes and blocks.

const Q4_0 = 2u;
const Q4_1 = 3u;
const Q5_0 = 6u;
const Q5_1 = 7u;
const Q8_0 = 8u;
const Q2_K = 10u;
const Q3_K = 11u;
const Q4_K = 12u;
const Q5_K = 13u;
const Q6_K = 14u;

// Codes k … k + 3 of a block of 32 values whose four-bit codes begin at `byte`.
fn nibbles(at: Super, byte: u32, k: u32) -> u32 {
  return (load32(at, byte + k % 16u) >> (4u * (k / 16u))) & 0x0f0f0f0fu;
}
fn fifth(at: Super, byte: u32, k: u32) -> u32 { return spread_bits(load32(at, byte) >> k) << 4u; }

// Codes of values k … k + 3 of the superblock.
fn codes(at: Super, k: u32) -> u32 {
  let block = (k / 32u) * (BYTES / 8u);  // where a format of 32 values has its block
  let j = k % 32u;
  let h = k / 128u;
  let i = k % 128u;
  switch FORMAT {
    case Q8_0: { return load32(at, block + 2u + j); }
    case Q4_0: { return less(nibbles(at, block + 2u, j), 8u); }
    case Q4_1: { return nibbles(at, block + 4u, j); }
    case Q5_0: { return less(nibbles(at, block + 6u, j) | fifth(at, block + 2u, j), 16u); }
    case Q5_1: { return nibbles(at, block + 8u, j) | fifth(at, block + 4u, j); }
    case Q2_K: { return (load32(at, 16u + 32u * h + j) >> (2u * (i / 32u))) & 0x03030303u; }
    case Q3_K: {
      let low = (load32(at, 32u + 32u * h + j) >> (2u * (i / 32u))) & 0x03030303u;
      return less(low | (((load32(at, j) >> (k / 32u)) & 0x01010101u) << 2u), 4u);
    }
    case Q4_K, Q5_K: {
      let start = select(16u, 48u, FORMAT == Q5_K);
      let low = (load32(at, start + 32u * (k / 64u) + j) >> (4u * (k / 32u % 2u))) & 0x0f0f0f0fu;
      if (FORMAT == Q4_K) { return low; }
      return low | (((load32(at, 16u + j) >> (k / 32u)) & 0x01010101u) << 4u);
    }
    case Q6_K: {
      let low = (load32(at, 64u * h + i % 64u) >> (4u * (i / 64u))) & 0x0f0f0f0fu;
      let top = (load32(at, 128u + 32u * h + j) >> (2u * (i / 32u))) & 0x03030303u;
      return less(low | (top << 4u), 32u);
    }
    default: { return 0u; }
  }
}

// Sub-scale and min of the 16 values 16 * g ….
fn scale_of(at: Super, g: u32) -> i32 {
  switch FORMAT {
    case Q2_K: { return i32(load8(at, g) & 15u); }
    case Q3_K: {
      let low = (load8(at, 96u + g % 8u) >> (4u * (g / 8u))) & 15u;
      let top = (load8(at, 104u + g % 4u) >> (2u * (g / 4u))) & 3u;
      return i32(low | (top << 4u)) - 32;
    }
    case Q4_K, Q5_K: { return i32(six_bits(at, 4u, 0u, g / 2u)); }
    case Q6_K: { return i32(load8(at, 192u + g) << 24u) >> 24u; }
    default: { return 1; }
  }
}
fn min_of(at: Super, g: u32) -> i32 {
  switch FORMAT {
    case Q2_K: { return i32(load8(at, g) >> 4u); }
    case Q4_K, Q5_K: { return i32(six_bits(at, 8u, 4u, g / 2u)); }
    default: { return 1; }
  }
}
fn six_bits(at: Super, byte: u32, shift: u32, g: u32) -> u32 {
  let first = load8(at, byte + g % 4u);
  if (g < 4u) { return first & 63u; }
  return ((load8(at, 8u + g) >> shift) & 15u) | ((first >> 2u) & 48u);
}

// Where d and dmin are in the block of value k; none: no dmin.
fn d_at(k: u32) -> u32 {
  switch FORMAT {
    case Q2_K: { return 80u; }
    case Q3_K: { return 108u; }
    case Q6_K: { return 208u; }
    case Q4_K, Q5_K: { return 0u; }
    default: { return (k / 32u) * (BYTES / 8u); }
  }
}
fn d_of(at: Super, k: u32) -> real { return from_half(load16(at, d_at(k))); }
fn dmin_of(at: Super, k: u32) -> real {
  return from_half(load16(at, d_at(k) + 2u)) ^ select(0u, SIGN, FORMAT < Q2_K);
}
// How many 16 values share a d.
fn groups_of_d() -> u32 { return select(16u, 2u, FORMAT < Q2_K); }
fn has_mins() -> bool {
  return FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q2_K || FORMAT == Q4_K || FORMAT == Q5_K;
}
