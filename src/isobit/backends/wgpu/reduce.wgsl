// Sums and maxima over a workgroup of 256 invocations.

var<workgroup> lanes: array<u32, 256>;

// Section 2: tree(v_0 ... v_255), v_lane being an invocation's value; every invocation gets it.
fn tree256(lane: u32, value: real) -> real {
  lanes[lane] = value;
  workgroupBarrier();
  for (var n = 128u; n > 0u; n = n >> 1u) {
    if (lane < n) { lanes[lane] = add(lanes[lane], lanes[lane + n]); }
    workgroupBarrier();
  }
  let result = lanes[0];
  workgroupBarrier();
  return result;
}

// The largest of 256 unsigned integers.
fn max256(lane: u32, value: u32) -> u32 {
  lanes[lane] = value;
  workgroupBarrier();
  for (var n = 128u; n > 0u; n = n >> 1u) {
    if (lane < n) { lanes[lane] = max(lanes[lane], lanes[lane + n]); }
    workgroupBarrier();
  }
  let result = lanes[0];
  workgroupBarrier();
  return result;
}
