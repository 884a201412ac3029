// Sums and maxima over a workgroup of 256 invocations, four values to one at a time.

var<workgroup> lanes: array<u32, 256>;
var<workgroup> four: array<u32, 4>;

// tree of the four values at i, i + step ….
fn tree_step(i: u32, step: u32) -> real {
  return add(
    add(lanes[i], lanes[i + 2u * step]), add(lanes[i + step], lanes[i + 3u * step]));
}

// Section 2: tree(v_0 ... v_255), v_lane being an invocation's value; every invocation gets it.
fn tree256(lane: u32, value: real) -> real {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 64u) { lanes[lane] = tree_step(lane, 64u); }
  workgroupBarrier();
  if (lane < 16u) { lanes[lane] = tree_step(lane, 16u); }
  workgroupBarrier();
  if (lane < 4u) { four[lane] = tree_step(lane, 4u); }
  workgroupBarrier();
  return add(add(four[0], four[2]), add(four[1], four[3]));
}

fn max_step(i: u32, step: u32) -> u32 {
  return max(max(lanes[i], lanes[i + step]), max(lanes[i + 2u * step], lanes[i + 3u * step]));
}

// The largest of 256 unsigned integers.
fn max256(lane: u32, value: u32) -> u32 {
  lanes[lane] = value;
  workgroupBarrier();
  if (lane < 64u) { lanes[lane] = max_step(lane, 64u); }
  workgroupBarrier();
  if (lane < 16u) { lanes[lane] = max_step(lane, 16u); }
  workgroupBarrier();
  if (lane < 4u) { four[lane] = max_step(lane, 4u); }
  workgroupBarrier();
  return max(max(four[0], four[1]), max(four[2], four[3]));
}
