// The product of two vectors of four signed bytes, packed into words: for devices without WGSL's own.
fn dot4(a: u32, b: u32) -> i32 {
  let x = vec4(bitcast<i32>(a)) << vec4(24u, 16u, 8u, 0u) >> vec4(24u);
  let y = vec4(bitcast<i32>(b)) << vec4(24u, 16u, 8u, 0u) >> vec4(24u);
  return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
