// Sums and maxima over a workgroup of 256 invocations, in two steps of 16.

var<workgroup> lanes: array<u32, 256>;
var<workgroup> sixteen: array<u32, 16>;

fn add4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
  return vec4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
}

// tree of 16 values, a being the first four.
fn tree16(a: vec4<u32>, b: vec4<u32>, c: vec4<u32>, d: vec4<u32>) -> real {
  let v = add4(add4(a, c), add4(b, d));
  return add(add(v.x, v.z), add(v.y, v.w));
}

fn lanes4(i: u32, step: u32) -> vec4<u32> {
  return vec4(lanes[i], lanes[i + step], lanes[i + 2u * step], lanes[i + 3u * step]);
}
fn sixteen4(i: u32) -> vec4<u32> {
  return vec4(sixteen[i], sixteen[i + 1u], sixteen[i + 2u], sixteen[i + 3u]);
}

// Section 2: tree(v_0 ... v_255), v_lane being an invocation's value; every invocation gets it.
fn tree256(lane: u32, value: real) -> real {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 16u) {
    sixteen[lane] = tree16(
      lanes4(lane, 16u), lanes4(lane + 64u, 16u), lanes4(lane + 128u, 16u), lanes4(lane + 192u, 16u));
  }
  workgroupBarrier();
  return tree16(sixteen4(0u), sixteen4(4u), sixteen4(8u), sixteen4(12u));
}

// The largest of 256 unsigned integers.
fn max256(lane: u32, value: u32) -> u32 {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 16u) {
    let a = max(lanes4(lane, 16u), lanes4(lane + 64u, 16u));
    let b = max(lanes4(lane + 128u, 16u), lanes4(lane + 192u, 16u));
    let m = max(a, b);
    sixteen[lane] = max(max(m.x, m.y), max(m.z, m.w));
  }
  workgroupBarrier();
  let a = max(sixteen4(0u), sixteen4(4u));
  let b = max(sixteen4(8u), sixteen4(12u));
  let m = max(a, b);
  return max(max(m.x, m.y), max(m.z, m.w));
}
