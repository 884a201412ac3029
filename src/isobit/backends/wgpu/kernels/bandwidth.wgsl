// How fast the device reads its memory, for comparison. Needs scalar.

struct Params { n: u32, stride: u32 }  // words of 16 bytes, invocations
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;

// Nothing is written unless the bits of all words happen to make one number.
@compute @workgroup_size(256)
fn bandwidth(@builtin(global_invocation_id) id: vec3<u32>) {
  var sum = vec4<u32>(0u);
  for (var i = id.x; i < p.n; i += 4u * p.stride) {
    for (var k = 0u; k < 4u; k++) {
      let at = i + k * p.stride;
      if (at < p.n) { sum ^= x[at]; }
    }
  }
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345u) { y[0] = 1u; }
}
