// Rows of 32-bit words side by side: all of them, or those that the batch names. Needs scalar.

struct Params {
  n: u32,  // words of a row
  x_at: u32,
  x_stride: u32,
  rows_at: u32,  // where `batch` names the rows to take, + 1; 0 for all
  y_at: u32,
}
@group(0) @binding(1) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> x: array<u32>;
@group(0) @binding(3) var<storage, read> batch: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(256)
fn copy(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = 256u * group.x + lane;
  var row = group.y;
  if (p.rows_at != 0u) { row = batch[p.rows_at - 1u + row]; }
  if (i < p.n) { y[p.y_at + group.y * p.n + i] = x[p.x_at + row * p.x_stride + i]; }
}
