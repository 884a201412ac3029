// A superblock from its fields in a tile: the same as isobit.gguf.formats. Needs a file that says what
// the fields of a format are: codes, scale_of, min_of, has_mins, d_of, dmin_of, groups_of_d.
//
// A tile holds a superblock of 8 rows in chunks of 16 bytes, the rows' first chunks, then their
// second …; what is left of a superblock behind whole chunks follows, row by row (layout.py).

override FORMAT: u32;  // ggml's number
override BYTES: u32;  // of a row's superblock

struct Super { weight_tile: u32, row: u32 }

// The 16 bits at an even byte of a row's superblock.
fn load16(at: Super, byte: u32) -> u32 {
  let chunks = BYTES / 16u;
  var b = 16u * (8u * (byte / 16u) + at.row) + byte % 16u;
  if (byte >= 16u * chunks) { b = 128u * chunks + at.row * (BYTES % 16u) + byte - 16u * chunks; }
  return (weights[at.weight_tile + b / 16u][(b / 4u) % 4u] >> (8u * (b & 2u))) & 0xffffu;
}
fn load32(at: Super, byte: u32) -> u32 { return load16(at, byte) | (load16(at, byte + 2u) << 16u); }
fn load8(at: Super, byte: u32) -> u32 {
  return (load16(at, byte & 0xfffffffeu) >> (8u * (byte & 1u))) & 255u;
}

// `first` is the row's first vec4 in its tile.
fn load(first: u32, row: u32) -> Super { return Super(first - row, row); }

// t of section 4; `a`: the activations.
fn superblock(at: Super, a: u32) -> real {
  let per_block = groups_of_d();
  var t = 0u;
  var high = 0;
  var low = 0;
  var mins = 0;
  for (var g = 0u; g < 16u; g++) {
    let k = 16u * g;
    let c = vec4(codes(at, k), codes(at, k + 4u), codes(at, k + 8u), codes(at, k + 12u));
    let scale = scale_of(at, g);
    high += scale * dot16(c, staged[a + g]);
    if (PLANES == 2u) { low += scale * dot16(c, staged[a + 16u + g]); }
    mins += min_of(at, g) * bitcast<i32>(staged[a + 32u + g / 4u][g % 4u]);
    if (g % per_block == per_block - 1u) {
      var dmin = 0u;
      var m = 0u;
      if (has_mins()) {
        dmin = dmin_of(at, k);
        m = from_int(mins);
      }
      let u = scaled(d_of(at, k), joined(high, low), dmin, m);
      t = select(u, add_normal(t, u), per_block < 16u);
      high = 0;
      low = 0;
      mins = 0;
    }
  }
  return t;
}
