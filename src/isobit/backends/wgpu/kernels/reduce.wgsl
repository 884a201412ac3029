// Sums and maxima over the first n invocations of a workgroup, n a power of four; every invocation
// gets the result. Needs scalar.

var<workgroup> lanes: array<u32, 256>;

// tree of the four values at i, i + step ….
fn tree_step(i: u32, step: u32) -> real {
  let v = vec4(lanes[i], lanes[i + step], lanes[i + 2u * step], lanes[i + 3u * step]);
  if (summands(v)) { return add_normal(add_normal(v.x, v.z), add_normal(v.y, v.w)); }
  return add(add(v.x, v.z), add(v.y, v.w));
}

// Section 2: tree(v_0 … v_(n-1)), v_lane being an invocation's value.
fn tree(lane: u32, value: real, n: u32) -> real {
  workgroupBarrier();
  lanes[lane] = value;
  for (var step = n / 4u; step > 0u; step = step / 4u) {
    workgroupBarrier();
    if (lane < step) { lanes[lane] = tree_step(lane, step); }
  }
  workgroupBarrier();
  return lanes[0];
}

// The largest of n unsigned integers.
fn largest(lane: u32, value: u32, n: u32) -> u32 {
  workgroupBarrier();
  lanes[lane] = value;
  for (var step = n / 4u; step > 0u; step = step / 4u) {
    workgroupBarrier();
    if (lane < step) {
      lanes[lane] = max(
        max(lanes[lane], lanes[lane + step]), max(lanes[lane + 2u * step], lanes[lane + 3u * step]));
    }
  }
  workgroupBarrier();
  return lanes[0];
}
