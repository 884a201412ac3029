// Every scalar primitive, applied to columns of bit patterns. Needs scalar, reduce and a dot file.

struct Params { primitive: u32 }
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> in_a: array<u32>;
@group(0) @binding(3) var<storage, read> in_b: array<u32>;
@group(0) @binding(4) var<storage, read> in_c: array<u32>;
@group(0) @binding(5) var<storage, read_write> result: array<u32>;

// The order is that of selftest.py.
fn apply(primitive: u32, a: u32, b: u32, c: u32) -> u32 {
  let amax = max(magnitude(a), magnitude(b));
  switch primitive {
    case 0u { return add(a, b); }
    case 1u { return sub(a, b); }
    case 2u { return mul(a, b); }
    case 3u { return div(a, b); }
    case 4u { return root(magnitude(a)); }
    case 5u { return from_int(bitcast<i32>(a)); }
    case 6u { return bitcast<u32>(nearest_int(a)); }
    case 7u { return from_half(a & 0xffffu); }
    case 8u { return exp_real(a); }
    case 9u { return maximum(a, b); }
    case 10u { return block_of(amax, 1u).d; }
    case 11u { return block_of(amax, 2u).d; }
    case 12u { return bitcast<u32>(quantise(b, block_of(amax, 1u).r)); }
    case 13u { return bitcast<u32>(quantise(b, block_of(amax, 2u).r)); }
    // Chains of plain operations, which a compiler might merge or reorder.
    case 14u { return add_normal(mul_normal(a, b), c); }
    case 15u { return add_normal(c, negate(mul_normal(a, b))); }
    case 16u { return add_normal(mul_normal(a, b), mul_normal(a, c)); }
    case 17u { return add_normal(add_normal(a, b), c); }
    case 18u { return add_normal(add_normal(a, b), negate(a)); }
    case 19u { return mul_normal(mul_normal(a, b), c); }
    case 20u { return bitcast<u32>(dot4(a, b)); }
    default { return 0u; }
  }
}

@compute @workgroup_size(256)
fn scalars(@builtin(global_invocation_id) id: vec3<u32>) {
  let i = id.x;
  if (i >= arrayLength(&result)) { return; }
  result[i] = apply(p.primitive, in_a[i], in_b[i], in_c[i]);
}

// tree256 of each 256 values of a (primitive 0), their largest magnitude (1).
@compute @workgroup_size(256)
fn groups(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let a = in_a[256u * group.x + lane];
  var value: u32;
  if (p.primitive == 0u) { value = tree(lane, a, 256u); } else { value = largest(lane, magnitude(a), 256u); }
  if (lane == 0u) { result[group.x] = value; }
}
