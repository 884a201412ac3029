// Formats of one to three bits, and NVFP4: what blocks.wgsl asks for. Needs bytes and blocks.
//
// A row of a grid is 16 bits: eight codes of two, or four of four (isobit/gguf/grids.h).

@group(0) @binding(6) var<storage, read> grid: array<u32>;  // two rows a word; else nothing

const IQ2_XXS = 16u;
const IQ2_XS = 17u;
const IQ3_XXS = 18u;
const IQ1_S = 19u;
const IQ3_S = 21u;
const IQ2_S = 22u;
const IQ1_M = 29u;
const TQ1_0 = 34u;
const TQ2_0 = 35u;
const NVFP4 = 40u;
const Q1_0 = 41u;
const Q2_0 = 42u;

fn row_of(index: u32) -> u32 { return grid[index / 2u] >> (16u * (index & 1u)); }

// Codes above 0; those negated whose bit is set.
fn signed(codes: u32, bits: u32) -> u32 {
  let ones = spread_bits(bits);
  return (codes ^ (ones * 255u)) + ones;
}
// Seven sign bits, and the eighth that makes their number even; then those from value k on.
fn seven_signs(seven: u32, k: u32) -> u32 {
  return (seven | ((countOneBits(seven) & 1u) << 7u)) >> (k % 8u);
}

fn iq1(row: u32, k: u32, negative: bool) -> u32 {
  let eights = spread_pairs(row >> (2u * (k % 8u))) << 3u;  // 8 too large
  return less(eights + select(0x09090909u, 0x07070707u, negative), 16u);
}
fn iq2(row: u32, k: u32, signs: u32) -> u32 {  // 8, 25 or 43
  let i = spread_pairs(row >> (2u * (k % 8u)));
  return signed(0x08080808u + 17u * i + ((i >> 1u) & 0x01010101u), signs);
}
fn iq3(row: u32, signs: u32) -> u32 {
  let i = spread_nibbles(row);
  if (FORMAT == IQ3_S) { return signed(0x01010101u + 2u * i, signs); }  // 1, 3 … 15
  let top = (i & (i >> 1u) & (i >> 2u)) & 0x01010101u;
  return signed(0x04040404u + 8u * i + 2u * top, signs);  // 4, 12 … 52, 62
}

// The n-th digits of bytes that are 256 * x / 243, of 0 to 2, highest first.
fn digits(bytes: u32, n: u32) -> u32 {
  let powers = array(1u, 3u, 9u, 27u, 81u);
  let even = ((bytes & 0x00ff00ffu) * powers[n]) & 0x00ff00ffu;
  let odd = (((bytes >> 8u) & 0x00ff00ffu) * powers[n]) & 0x00ff00ffu;
  return (((even * 3u) >> 8u) & 0x00ff00ffu) | ((odd * 3u) & 0xff00ff00u);
}

// Codes of values k … k + 3 of the superblock.
fn codes(at: Super, k: u32) -> u32 {
  let e = k / 8u;  // of 32 eights
  let h = k / 32u;
  switch FORMAT {
    case IQ1_S: {
      let high = load16(at, 34u + 2u * h);
      let index = load8(at, 2u + e) | (((high >> (3u * (e % 4u))) & 7u) << 8u);
      return iq1(row_of(index), k, high >= 0x8000u);
    }
    case IQ1_M: {
      let high = load8(at, 32u + e / 2u) >> (4u * (e % 2u));
      return iq1(row_of(load8(at, e) | ((high & 7u) << 8u)), k, (high & 8u) != 0u);
    }
    case IQ2_XXS: {
      let seven = (load32(at, 6u + 8u * h) >> (7u * (e % 4u))) & 127u;
      return iq2(row_of(load8(at, 2u + 8u * h + e % 4u)), k, seven_signs(seven, k));
    }
    case IQ2_XS: {
      let q = load16(at, 2u + 2u * e);
      return iq2(row_of(q & 511u), k, seven_signs(q >> 9u, k));
    }
    case IQ2_S: {
      let high = (load8(at, 66u + h) >> (2u * (e % 4u))) & 3u;
      return iq2(row_of(load8(at, 2u + e) | (high << 8u)), k, load8(at, 34u + e) >> (k % 8u));
    }
    case IQ3_XXS: {
      let seven = (load32(at, 66u + 4u * h) >> (7u * (e % 4u))) & 127u;
      return iq3(row_of(load8(at, 2u + k / 4u)), seven_signs(seven, k));
    }
    case IQ3_S: {
      let high = (load8(at, 66u + h) >> (k / 4u % 8u)) & 1u;
      return iq3(row_of(load8(at, 2u + k / 4u) | (high << 8u)), load8(at, 74u + e) >> (k % 8u));
    }
    case TQ1_0: {
      if (k < 160u) { return less(digits(load32(at, k % 32u), h), 1u); }
      if (k < 240u) { return less(digits(load32(at, 32u + k % 16u), (k - 160u) / 16u), 1u); }
      return less(digits(load32(at, 48u), (k - 240u) / 4u), 1u);
    }
    case TQ2_0: {
      let pairs = load32(at, 32u * (k / 128u) + k % 32u) >> (2u * (h % 4u));
      return less(pairs & 0x03030303u, 1u);
    }
    case Q1_0: {
      let bits = load8(at, 18u * (k / 128u) + 2u + k % 128u / 8u) >> (k % 8u);
      return less(spread_bits(bits) << 1u, 1u);
    }
    case Q2_0: { return less(spread_pairs(load8(at, 18u * (k / 64u) + 2u + k % 64u / 4u)), 1u); }
    case NVFP4: {
      let four = load32(at, 36u * (k / 64u) + 4u + 8u * (k % 64u / 16u) + k % 8u);
      return fp4((four >> (4u * (e % 2u))) & 0x0f0f0f0fu);
    }
    default: { return 0u; }
  }
}

// Sub-scale of the 16 values 16 * g ….
fn scale_of(at: Super, g: u32) -> i32 {
  switch FORMAT {
    case IQ1_S: { return i32((load16(at, 34u + 2u * (g / 2u)) >> 12u) & 7u) * 2 + 1; }
    case IQ1_M: { return i32((load16(at, 48u + 2u * (g / 4u)) >> (3u * (g % 4u))) & 7u) * 2 + 1; }
    case IQ2_XXS: { return i32(load16(at, 8u + 8u * (g / 2u)) >> 12u) * 2 + 1; }
    case IQ2_XS: { return nibble_scale(at, 66u, g); }
    case IQ2_S: { return nibble_scale(at, 74u, g); }
    case IQ3_XXS: { return i32(load16(at, 68u + 4u * (g / 2u)) >> 12u) * 2 + 1; }
    case IQ3_S: { return nibble_scale(at, 106u, g / 2u); }
    default: { return 1; }
  }
}
fn nibble_scale(at: Super, byte: u32, g: u32) -> i32 {
  return i32((load8(at, byte + g / 2u) >> (4u * (g % 2u))) & 15u) * 2 + 1;
}

fn min_of(at: Super, g: u32) -> i32 { return 0; }
fn has_mins() -> bool { return false; }
fn dmin_of(at: Super, k: u32) -> real { return 0u; }

// A half divided by a power of two.
fn divided(half: u32, power: u32) -> real {
  let d = from_half(half);
  return select(d - (power << 23u), d, magnitude(d) == 0u || magnitude(d) >= INFINITY);
}
// Half of what a byte of four exponent and three mantissa bits stands for, without its sign;
// 0x7F alone for 0.
fn half_e4m3(byte: u32) -> real {
  let e = (byte >> 3u) & 15u;
  let m = select(8u, 0u, e == 0u) | (byte & 7u);
  let power = bitcast<f32>((max(e, 1u) + 116u) << 23u);  // 2^(e - 11)
  return select(bitcast<u32>(f32(m) * power), 0u, byte == 127u);
}

fn d_of(at: Super, k: u32) -> real {
  switch FORMAT {
    case IQ1_S, IQ2_XXS, IQ2_XS, IQ2_S: { return divided(load16(at, 0u), 3u); }
    case IQ1_M: {
      let low = (load16(at, 48u) >> 12u) | ((load16(at, 50u) >> 8u) & 0xf0u);
      return divided(low | ((load16(at, 52u) >> 4u) & 0xf00u) | (load16(at, 54u) & 0xf000u), 3u);
    }
    case IQ3_XXS: { return divided(load16(at, 0u), 2u); }
    case TQ1_0: { return from_half(load16(at, 52u)); }
    case TQ2_0: { return from_half(load16(at, 64u)); }
    case Q1_0: { return from_half(load16(at, 18u * (k / 128u))); }
    case Q2_0: { return from_half(load16(at, 18u * (k / 64u))); }
    case NVFP4: { return half_e4m3(load8(at, 36u * (k / 64u) + k % 64u / 16u)); }
    default: { return from_half(load16(at, 0u)); }
  }
}
// How many 16 values share a d.
fn groups_of_d() -> u32 {
  switch FORMAT {
    case Q1_0: { return 8u; }
    case Q2_0: { return 4u; }
    case NVFP4: { return 1u; }
    default: { return 16u; }
  }
}
