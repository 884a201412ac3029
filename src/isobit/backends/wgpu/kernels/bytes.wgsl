// Four bytes in a word.

// Four codes below 128, less a zero point: signed bytes.
fn less(codes: u32, zero: u32) -> u32 {
  return (codes + (128u - zero) * 0x01010101u) ^ 0x80808080u;
}

// Bit `bit` of each byte as a mask of that byte.
fn mask_of(indices: u32, bit: u32) -> u32 { return ((indices >> bit) & 0x01010101u) * 255u; }

// Bits 0 … 3 to the lowest bit of each of four bytes.
fn spread_bits(v: u32) -> u32 { return ((v & 15u) * 0x00204081u) & 0x01010101u; }
// Bits 0 … 7, two for each byte.
fn spread_pairs(v: u32) -> u32 {
  let b = v & 255u;
  return (b | (b << 6u) | (b << 12u) | (b << 18u)) & 0x03030303u;
}
// Bits 0 … 15, four for each byte.
fn spread_nibbles(v: u32) -> u32 {
  return (v & 15u) | ((v & 0xf0u) << 4u) | ((v & 0xf00u) << 8u) | ((v & 0xf000u) << 12u);
}

// Four-bit floats (sign, two bits of exponent, one of fraction) in four bytes, doubled: 0 … 4 are
// themselves, 5 6 7 stand for 6 8 12.
fn fp4(floats: u32) -> u32 {
  let b0 = floats & 0x01010101u;
  let b1 = (floats >> 1u) & 0x01010101u;
  let b2 = (floats >> 2u) & 0x01010101u;
  let size = (floats & 0x07070707u) + (b2 & b0) + 2u * (b2 & b1) + 2u * (b2 & b1 & b0);
  let minus = size & mask_of(floats, 3u);
  return less(0x0c0c0c0cu + (size ^ minus) - minus, 12u);
}
